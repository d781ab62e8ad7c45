"""HaloNet's operator as timm has it: offsets of strided queries in strides."""

from __future__ import annotations

import torch

from vistok.attend.halonet import HaloAttn


def run(case):
    h = case.hyper
    operator = HaloAttn(
        h["dim"],
        h["heads"],
        h["block"],
        h["halo"],
        h["stride"],
        h["qk_ratio"],
        h["bias"],
        h["avg_down"],
        h["scale_pos"],
        parity="authors",
    )
    operator.load_state_dict({n.removeprefix("param."): t for n, t in case.inputs.items() if n.startswith("param.")})
    with torch.no_grad():
        return {"out": operator(case.inputs["x"])}
