"""MMTok: one picture a case; ``exclude`` names padding that must never be picked."""

from __future__ import annotations

import torch

from vistok.host.reducer import Evidence, Reduction
from vistok.reduce.mmtok import MMTok, cover


def run(case):
    evidence = Evidence(**{name: case.inputs[name] for name in ("features", "encoder_features", "text")})
    hyper = case.hyper
    system = MMTok(tau_text=hyper["tau_t"], tau_vision=hyper["tau_v"], alpha=hyper["alpha"])
    if not hyper.get("exclude"):
        reduction = system.reduce(evidence, hyper["keep"])
    else:
        barred = torch.zeros(evidence.features.shape[:2], dtype=torch.bool)
        barred[:, hyper["exclude"]] = True
        picks = cover(*system.coverage(evidence), system.alpha, hyper["keep"], barred)
        reduction = Reduction.select(evidence.features, picks)
    return {"keep": reduction.keep, "tokens": reduction.tokens}
