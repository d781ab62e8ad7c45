"""EViT and top-k at keep rate 0.1 alone and with CLCA around them, fine-tuned alike; and CLCA without each part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from vistok.bench.vit_trial import ViTTrial
from vistok.vit.clca import CLCA, operations

TITLE = "CLCA: cache and head around a reducer that keeps a tenth"

FULL = CLCA(keep=0.1)
ALONE = replace(FULL, gap=False, num_clr=0, head=False)
PARTS = {
    "the reducer alone": ALONE,
    "CLCA": FULL,
    "CLCA without the mean": replace(FULL, gap=False),
    "CLCA without carriers": replace(FULL, num_clr=0),
    "CLCA without the cache": replace(FULL, gap=False, num_clr=0),
    "CLCA without the head": replace(FULL, head=False),
}


def study(trial: ViTTrial, quick: bool = False) -> Iterator[dict[str, Any]]:
    """Accuracy after ``steps`` steps of fine-tuning the zoo's classifier with a new head, equal pictures for equal
    ``seed``; what a part is good for is measured with one seed. ``of the operations``: share of those without
    reduction, cache included."""
    steps, batch, seeds = (2, 4, (0,)) if quick else (30, 32, (0, 1, 2))
    whole = operations(CLCA("topk", keep=1.0, gap=False, num_clr=0, head=False).build(trial.fresh()), trial.size)
    for inner in ("evit", "topk"):
        for parts, system in PARTS.items():
            part = system not in (ALONE, FULL)
            if part and inner == "topk":
                continue
            for seed in seeds[:1] if part else seeds:
                torch.manual_seed(seed)
                vit = trial.fresh()
                vit.reset_classifier(vit.num_classes)
                model = replace(system, inner=inner).build(vit)
                trial.fit(model, steps, batch_size=batch, peak_lr=1e-3, seed=seed)
                yield {
                    "reducer": inner,
                    "with": parts,
                    "steps": steps,
                    "seed": seed,
                    "of the operations": operations(model, trial.size) / whole,
                    "accuracy": trial.accuracy(model=model),
                }
