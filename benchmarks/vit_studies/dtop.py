"""What a segmenter loses when patches leave it early, by how sure a head must be, and by how many a class stay."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean
from typing import Any

from vistok.bench.vit_trial import ViTTrial
from vistok.vit.dtop import measure, train_heads
from vistok.zoo.vit_tasks import Scenes

TITLE = "DToP: mIoU against the share of patches that leave, and the patches a class that stay"


def study(trial: ViTTrial, quick: bool = False) -> Iterator[dict[str, Any]]:
    """mIoU, mean of the seeds, by ``p0`` and patches kept a class; linear heads trained on the frozen segmenter.

    "left": share of the patches that have left before the last block. "cost": operations of the blocks, as a share of
    those on all patches. "base": mIoU of the segmenter as it is, which p0 = 1 is.
    """
    steps, seeds = (1, 1) if quick else (150, 3)
    settings = [(0.9, 5), (0.9, 0)]
    if not quick:
        settings = [(0.9999, 5), (0.999, 5), (0.99, 5), *settings, (0.7, 5), (0.7, 0)]
    base = trial.miou()
    vit = trial.fresh(Scenes())
    models = [train_heads(trial, vit, steps, seed) for seed in range(seeds)]
    for p0, keep in settings:
        miou, left, cost = zip(*(measure(trial, model, p0, keep) for model in models), strict=True)
        yield {
            "p0": p0,
            "keep_per_class": keep,
            "steps": steps,
            "seeds": seeds,
            "left": mean(left),
            "cost": mean(cost),
            "miou": mean(miou),
            "base": base,
        }
