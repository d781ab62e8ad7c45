"""YOPO: its mask, its MLP, and attention with given masks (of the released code: nothing is gathered or left out)."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from vistok.core.effort import attend, gated_mlp, local_mask


def run(case):
    hyper, inputs = case.hyper, case.inputs
    if "grid" in hyper:
        return {"allowed": local_mask(tuple(hyper["grid"]), hyper["window"]).to(torch.uint8)}
    span = slice(hyper["start"], hyper["start"] + hyper["N"])
    if "w_gate" in inputs:
        x = inputs["hidden_states"]
        weights = [(inputs[name].T, None) for name in ("w_gate", "w_up", "w_down")]
        out = gated_mlp(x, *weights, silu, hyper["I"])
        out[:, span] = gated_mlp(x[:, span], *weights, silu, int(hyper["I"] / hyper["ratio"]))
        return {"hidden_states": out}
    active, k = inputs["head_active"].bool(), inputs["key"]
    sees = active if hyper["layer"] < hyper["stop_layer"] else torch.zeros_like(active)
    visual = torch.zeros(k.shape[2], dtype=torch.bool)
    visual[span] = True
    unseen = (~sees[:, None] & visual).expand(len(k), -1, -1)
    out = attend(inputs["query"], k, inputs["value"], inputs["attention_mask"], unseen=unseen).transpose(1, 2)
    out[:, span] = out[:, span] * active[:, None]
    return {"output": out}
