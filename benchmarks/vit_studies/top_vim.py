"""A small Vim trained whole and then pruned without further training, with naive scans and with aligned ones."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean
from typing import Any

import torch

from vistok.bench.vit_trial import ViTTrial
from vistok.vit.top_vim import CLAIMED_ON, kept_patches, small

TITLE = "ToP-ViM: aligned against naive scans, pruned without further training"


def study(trial: ViTTrial, quick: bool = False) -> Iterator[dict[str, Any]]:
    """Accuracy on colours, mean of the seeds, a share ``keep`` left after each of two blocks; "whole": not pruned."""
    steps, batch, seeds = (1, 4, 1) if quick else (300, 16, 3)
    keeps = (0.9, 0.8, 0.6, 0.4)
    whole: list[float] = []
    found: dict[tuple[float, bool], list[float]] = {(keep, align): [] for keep in keeps for align in (False, True)}
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = small(trial)
        model.pruning = False
        trial.fit(model, steps, task=CLAIMED_ON, batch_size=batch, peak_lr=2e-3, seed=seed)
        whole.append(trial.score(CLAIMED_ON, model)["accuracy"])
        model.pruning = True
        for model.keep, model.align in found:
            found[model.keep, model.align].append(trial.score(CLAIMED_ON, model)["accuracy"])
    for keep in keeps:
        naive, aligned = (mean(found[keep, align]) for align in (False, True))
        yield {
            "keep": keep,
            "tokens": kept_patches(kept_patches(model.patches, keep), keep),
            "of": model.patches,
            "steps": steps,
            "seeds": seeds,
            "naive": naive,
            "aligned": aligned,
            "whole": mean(whole),
        }
