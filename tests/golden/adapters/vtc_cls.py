"""VTC-CLS: complete class-token rows of all layers, class token first; the function ran once an image."""

from __future__ import annotations

from vistok.host.reducer import Evidence
from vistok.reduce.vtc_cls import VTCCLS


def run(case):
    rows = case.inputs["cls_rows"][..., 1:]
    features = case.inputs["encoder_features"]
    reducer = VTCCLS(start_layer=case.hyper["start_layer"])
    layers = tuple(rows[layer] for layer in range(len(rows))[reducer.needs["cls_attention"]])
    evidence = Evidence(features=features, cls_attention=layers)
    reduction = reducer.reduce(evidence, case.hyper["keep"])
    return {"keep": reduction.keep, "tokens": reduction.tokens, "score": reducer.scores(evidence)}
