"""The gate and pooling in front of attention, and the loss with its gradients."""

from __future__ import annotations

import torch

from vistok.attend.tapadl import TokenAwarePooling, adl_loss


def run(case):
    given = case.inputs
    if "x" in given:
        tap = TokenAwarePooling(case.hyper["dim"], case.hyper["scales"]).eval()
        state = {n.removeprefix("param.dilation_predictor."): t for n, t in given.items() if n.startswith("param.")}
        state |= {f"proj.1.running_{n}": given[f"bn_{n}"] for n in ("mean", "var")}
        tap.load_state_dict(state | {"proj.1.num_batches_tracked": torch.tensor(0)})
        side = int(given["x"].shape[1] ** 0.5)
        with torch.no_grad():
            gate = tap.gate(given["x"].transpose(1, 2).unflatten(2, (side, side)))
            return {"gate": gate.permute(0, 2, 3, 1), "out": tap(given["x"], (side, side))}
    maps = [given[f"attn{i}"].clone().requires_grad_() for i in range(case.hyper["layers"])]
    loss = adl_loss(maps, case.hyper["threshold"], "authors")
    loss.backward()
    return {"loss": loss.detach()[None], **{f"grad{i}": m.grad for i, m in enumerate(maps)}}
