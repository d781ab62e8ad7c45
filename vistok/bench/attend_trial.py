"""Measuring the claims of attention operators: their time on this machine, and small networks on handwritten digits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from vistok.world.real import digits


@dataclass
class AttendTrial:
    """What a claim of the attend family is measured with; see ``vistok.catalogue.AttendTrial``."""

    seed: int = 0
    repeats: int = 5

    def milliseconds(self, runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """Median milliseconds of each of ``runs``, taken in turn, without gradients; the first of each warms up."""
        taken: dict[str, list[float]] = {name: [] for name in runs}
        with torch.inference_mode():
            for turn in range(self.repeats + 1):
                for name, run in runs.items():
                    started = time.perf_counter()
                    run()
                    if turn:
                        taken[name].append(1e3 * (time.perf_counter() - started))
        return {name: statistics.median(times) for name, times in taken.items()}

    def draw(self, rng: torch.Generator, count: int = 64) -> tuple[Tensor, Tensor]:
        """``count`` digits to train on: (count, 1, 8, 8) float32 in -1 .. 1, and which they are, (count,) int64."""
        pictures, labels = _digits(test=False)
        which = torch.randint(len(labels), (count,), generator=rng)
        return pictures[which], labels[which]

    def fit(
        self,
        model: nn.Module,
        steps: int,
        *,
        loss: Callable[[nn.Module, torch.Generator], Tensor] | None = None,
        peak_lr: float = 2e-3,
    ) -> list[float]:
        """Train ``model`` in place, and return the losses. It is left in evaluation mode.

        By default it tells digits, pictures as from ``draw`` to logits (B, 10). ``loss``: instead, (model, rng) -> a
        scalar; equal seeds draw equal batches.
        """
        loss = self._cross_entropy if loss is None else loss
        rng = torch.Generator().manual_seed(self.seed)
        wanted = [p for p in model.parameters() if p.requires_grad]
        optimizer = AdamW(wanted, lr=peak_lr, weight_decay=0.05)
        pace = OneCycleLR(optimizer, peak_lr, total_steps=steps, pct_start=0.1)
        model.train()
        losses = []
        for _ in range(steps):
            found = loss(model, rng)
            optimizer.zero_grad()
            found.backward()
            nn.utils.clip_grad_norm_(wanted, 1.0)
            optimizer.step()
            pace.step()
            losses.append(found.item())
        model.eval()
        return losses

    def accuracy(self, model: nn.Module, change: Callable[[Tensor], Tensor] | None = None) -> float:
        """Share of 397 digits by other writers that ``model`` tells right, in [0, 1]; ``change``: of the pictures."""
        pictures, labels = _digits(test=True)
        with torch.no_grad():
            found = model(pictures if change is None else change(pictures)).argmax(1)
        return (found == labels).float().mean().item()

    def _cross_entropy(self, model: nn.Module, rng: torch.Generator) -> Tensor:
        pictures, labels = self.draw(rng)
        return cross_entropy(model(pictures), labels)


def _digits(test: bool) -> tuple[Tensor, Tensor]:
    pictures, labels = digits(test)
    return torch.tensor(pictures)[:, None].float() / 127.5 - 1, torch.tensor(labels)
