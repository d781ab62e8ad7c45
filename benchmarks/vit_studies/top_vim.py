"""A small Vim trained whole and then pruned without further training, with naive scans and with aligned ones."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean
from typing import Any

import torch

from vistok.bench.vit_trial import ViTTrial
from vistok.vit.top_vim import TopViM, kept_patches

TITLE = "ToP-ViM: aligned against naive scans, off the shelf"


def study(trial: ViTTrial, quick: bool = False) -> Iterator[dict[str, Any]]:
    """Accuracy, mean of the seeds, when a share ``keep`` stays after each of two blocks; "whole" is without pruning."""
    steps, batch, seeds = (1, 4, 1) if quick else (300, 16, 2)
    keeps = (0.9, 0.8, 0.6, 0.4)
    whole: list[float] = []
    found: dict[tuple[float, bool], list[float]] = {(keep, align): [] for keep in keeps for align in (False, True)}
    vit = trial.classifier
    size, patch = vit.patch_embed.img_size[0], vit.patch_embed.patch_size[0]
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = TopViM(size, patch, 64, 6, 4, prune_after=(1, 3)).build(vit.num_classes)
        model.pruning = False
        trial.fit(model, steps, dense=True, batch_size=batch, peak_lr=2e-3, seed=seed)
        whole.append(trial.accuracy(model=model))
        model.pruning = True
        for model.keep, model.align in found:
            found[model.keep, model.align].append(trial.accuracy(model=model))
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
