"""PlainMamba's operator, as released and with everything in the order of the scan, and the tables of its orders."""

from __future__ import annotations

import torch

from vistok.attend.plainmamba import PlainMamba2D, serpentine_orders


def run(case):
    hyper = case.hyper
    size = tuple(hyper["size"])
    if "size" in case.inputs:
        return dict(zip(("order", "inverse", "direction"), serpentine_orders(*size), strict=True))
    parity = "authors" if hyper["parity"] else "paper"
    model = PlainMamba2D(hyper["dim"], hyper["state"], hyper["conv"], bias=hyper["bias"], parity=parity)
    state = {n.removeprefix("param."): t for n, t in case.inputs.items() if n.startswith("param.")}
    if not hyper["parity"]:  # what was corrected there adds the bias twice all the same
        state["dt_proj.bias"] = 2 * state["dt_proj.bias"]
    model.load_state_dict(state)
    with torch.no_grad():
        return {"out": model(case.inputs["x"], size)}
