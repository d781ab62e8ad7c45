"""EViT off the shelf, fine-tuned at the keep rate, and fine-tuned while the keep rate falls to it; with and without
the fused token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any

from torch import Tensor

from vistok.bench.vit_trial import ViTTrial
from vistok.host import apply
from vistok.vit.evit import EViT, KeepRateSchedule
from vistok.zoo.vit_tasks import Objects, ViTBatch
from vistok.zoo.vit_training import Loss

TITLE = "EViT: a falling keep rate against a fixed one, in fine-tuning"


def study(trial: ViTTrial, quick: bool = False) -> Iterator[dict[str, Any]]:
    """Accuracy at two keep rates. ``steps``: of fine-tuning the zoo's classifier, equal pictures for all; one seed."""
    steps, batch, keeps = (2, 4, (0.5,)) if quick else (50, 32, (0.7, 0.5))
    for keep in keeps:
        for fuse in (True, False):
            method = EViT(keep=keep, fuse=fuse)
            row = {"keep": keep, "fused token": fuse, "plain": trial.accuracy()}
            yield {**row, "training": "none", "steps": 0, "accuracy": trial.accuracy(method)}
            for training, loss in (("fixed", None), ("falling", falling(method, keep, steps))):
                model = trial.fresh()
                inside = method if loss is None else None
                trial.fit(model, steps, method=inside, loss=loss, batch_size=batch)
                found = trial.accuracy(method, model=model)
                yield {**row, "training": training, "steps": steps, "accuracy": found}


def falling(method: EViT, keep: float, steps: int) -> Loss:
    """The task's loss with the rate of the step: all tokens for a tenth of the steps, ``keep`` from seven tenths on."""
    rate, step = KeepRateSchedule(keep, start=0.1 * steps, length=0.6 * steps), count()

    def loss(model: Any, batch: ViTBatch) -> tuple[Tensor, Tensor]:
        with apply(model, replace(method, keep=rate(next(step)))):
            return Objects().loss(model, batch)

    return loss
