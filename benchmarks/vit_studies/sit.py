"""SiT's slim network taught by every layer of the whole one, against the same network taught by labels alone."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean
from typing import Any

import torch

from vistok.bench.vit_trial import ViTTrial
from vistok.vit.sit import SiT, labels_alone, lesson

TITLE = "SiT: feature distillation against plain cross-entropy, at equal tokens"


def study(trial: ViTTrial, quick: bool = False) -> Iterator[dict[str, Any]]:
    """Accuracy over the seeds after equal steps from the same start; "tokens" are those of the last stage. Slimming is
    after blocks 3, 6 and 9, so that the start is not lost in it: with the default's, after 1, 2 and 3, eighty steps
    taught neither student anything."""
    steps, batch, seeds = (2, 4, 1) if quick else (250, 32, 2)
    system, teacher = SiT(stage_blocks=(3, 3, 3)), trial.classifier
    for name, loss in (("labels alone", labels_alone), ("distilled", lesson(system.loss(), teacher))):
        found = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            student = system.build(teacher)
            trial.fit(student, steps, loss=loss, batch_size=batch, peak_lr=1e-3, seed=seed)
            found.append(trial.accuracy(model=student))
        yield {
            "loss": name,
            "tokens": student.counts[-1],
            "of": student.counts[0],
            "steps": steps,
            "seeds": seeds,
            "accuracy": mean(found),
            "lowest": min(found),
            "highest": max(found),
            "teacher": trial.accuracy(),
        }
