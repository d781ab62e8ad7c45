"""TCPA against VPT-deep of as many parameters, and a new head alone, at several learning rates: the frozen classifier
learns to name colours."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import product
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vistok.bench.vit_trial import ViTTrial
from vistok.vit.tcpa import TCPA, transfer, vpt_deep
from vistok.world import COLOUR_NAMES
from vistok.zoo.vit import to_pixels

TITLE: str = "TCPA: eight colours on a frozen classifier of shapes and digits, prompts and head trained"


class Head(nn.Module):
    """A new head on the frozen classifier's features: linear probing."""

    def __init__(self, vit: Any, classes: int) -> None:
        super().__init__()
        self.vit, self.head = copy.deepcopy(vit).requires_grad_(False), nn.Linear(vit.num_features, classes)

    def train(self, mode: bool = True) -> Head:
        """The frozen classifier stays in evaluation mode."""
        super().train(mode)
        self.vit.eval()
        return self

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits (B, classes)."""
        with torch.no_grad():
            features = self.vit.forward_head(self.vit.forward_features(pictures), pre_logits=True)
        logits: Tensor = self.head(features)
        return logits


def _head_loss(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    logits = model(to_pixels(batch.images)).float()
    return cross_entropy(logits, batch.label), (logits.argmax(1) == batch.label).float().mean()


def study(trial: ViTTrial, quick: bool = False) -> Iterator[dict[str, Any]]:
    """Accuracy over the seeds after equal steps on equal pictures, at each peak learning rate: which of the prompts
    are the better ones hangs on it."""
    steps, seeds, rates = (2, 1, (1e-1,)) if quick else (100, 2, (1e-2, 4e-2, 1e-1))
    systems = {"head only": None, "VPT-deep": vpt_deep(TCPA()), "TCPA": TCPA()}
    for (name, system), rate in product(systems.items(), rates):
        found = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            if system is None:
                model: nn.Module = Head(trial.classifier, len(COLOUR_NAMES))
                loss: Any = _head_loss
            else:
                model, loss = system.build(trial.classifier, len(COLOUR_NAMES)), system.loss(steps)
            found.append(transfer(trial, model, loss, steps, seed, rate))
        yield {
            "trained": name,
            "learning rate": rate,
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "steps": steps,
            "seeds": seeds,
            "accuracy": mean(found),
            "lowest": min(found),
            "highest": max(found),
        }
