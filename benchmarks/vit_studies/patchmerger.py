"""PatchMerger's 8 tokens from the middle on, against as many patches by attention and at random, all fine-tuned."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean
from typing import Any

import torch

from vistok.bench.vit_trial import ViTTrial
from vistok.vit.patchmerger import PatchMerger
from vistok.vit.random_drop import RandomDrop
from vistok.vit.topk import TopK

TITLE = "PatchMerger against dropping, at equal tokens and steps"


def study(trial: ViTTrial, quick: bool = False) -> Iterator[dict[str, Any]]:
    """Accuracy over the seeds; all begin with the zoo's classifier. The others choose half a block earlier."""
    steps, batch, seeds = (2, 4, 1) if quick else (80, 32, 3)
    vit = trial.classifier
    middle, system = (len(vit.blocks) - 1) // 2, PatchMerger()
    for name, method in (
        ("merged", None),
        ("by attention", TopK(system.keep, layers=(middle,))),
        ("random", RandomDrop(system.keep, layers=(middle,), seed=None)),
    ):
        found = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = system.build(vit) if method is None else trial.fresh()
            if method is None:
                trial.fit(model, steps, batch_size=batch, seed=seed)
                found.append(trial.accuracy(model=model))
            else:
                trial.fit(model, steps, method=method, batch_size=batch, seed=seed)
                found.append(trial.accuracy(method, model=model))
        yield {
            "tokens are": name,
            "tokens": system.keep,
            "of": vit.patch_embed.num_patches,
            "steps": steps,
            "seeds": seeds,
            "accuracy": mean(found),
            "lowest": min(found),
            "highest": max(found),
            "plain": trial.accuracy(),
        }
