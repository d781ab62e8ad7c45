"""TransNeXt's aggregated attention, the dense one of its last stage, and the gated MLP."""

from __future__ import annotations

import torch

from vistok.attend.transnext import AggregatedAttention, ConvGLU, DenseAttention

OURS = {"sr.weight": "sr_conv.weight", "sr.bias": "sr_conv.bias"}


def run(case):
    h = case.hyper
    size = tuple(h["size"])
    if "hidden" in h:
        model = ConvGLU(h["dim"], h["hidden"] / h["dim"])
    elif h["sr"] == 1:
        model = DenseAttention(h["dim"], h["heads"], tuple(h["trained"]), h["extrapolation"])
    else:
        shape = h["dim"], h["heads"], tuple(h["trained"]), h["sr"], h["window"]
        model = AggregatedAttention(*shape, h["extrapolation"])
    state = {n.removeprefix("param."): t for n, t in case.inputs.items() if n.startswith("param.")}
    model.load_state_dict({OURS.get(n, n).replace("dwconv.dwconv", "dwconv"): t for n, t in state.items()})
    with torch.no_grad():
        return {"out": model(case.inputs["x"], size)}
