"""HiPrune: received attention of two layers, with or without the maps that it is the mean of; neighbours wrap."""

from __future__ import annotations

import math

import torch

from vistok.host.reducer import Evidence
from vistok.reduce.hiprune import HiPrune


def run(case):
    hyper = case.hyper
    scores = {}
    for layer in ("mid", "deep"):
        score = case.inputs[f"received_{layer}"]
        if f"attention_{layer}" in case.inputs:  # what the host computes: class-token column left out
            ours = case.inputs[f"attention_{layer}"].mean((1, 2))[:, 1:]
            torch.testing.assert_close(ours, score, rtol=1e-5, atol=1e-8)
        scores[layer] = score if score.dim() == 2 else score[None]
    n = scores["mid"].shape[1]
    grid = tuple(hyper["grid"]) if "grid" in hyper else (math.isqrt(n), math.isqrt(n))
    keep = hyper["keep"] if "keep" in hyper else round(n * hyper["ratio"])
    evidence = Evidence(
        features=case.inputs.get("features", scores["mid"][..., None]),
        grid=grid,
        received_attention=(scores["mid"], scores["deep"]),
    )
    return {"keep": HiPrune(alpha=hyper["alpha"], parity="authors").reduce(evidence, keep).keep}
