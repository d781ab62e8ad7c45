"""A small STViT with super tokens against a plain ViT of no fewer operations, both from scratch, on textures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vistok.bench.vit_trial import TEST_SEED, ViTTrial
from vistok.vit.stvit_supertoken import SMALL
from vistok.world import derive_seed
from vistok.zoo.vit import to_pixels
from vistok.zoo.vit_tasks import ViTBatch, ViTTask

TITLE = "STViT with super tokens against a plain ViT, on textures"


def study(trial: ViTTrial, quick: bool = False) -> Iterator[dict[str, Any]]:
    """Accuracy over the seeds after equal steps from scratch; "operations" of one picture."""
    steps, batch, seeds = (2, 4, 1) if quick else (200, 16, 3)
    task, size = Textures(), trial.size
    classes = len(task.classes)
    for name in ("plain ViT", "STViT"):
        found = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            model: Any = SMALL.build(classes) if name == "STViT" else plain(size, classes)
            trial.fit(model, steps, task=task, batch_size=batch, peak_lr=2e-3, seed=seed)
            found.append(task.score(model, trial.pictures, seed=TEST_SEED, size=size)["accuracy"])
        yield {
            "network": name,
            "operations": operations(model, size),
            "steps": steps,
            "seeds": seeds,
            "accuracy": mean(found),
            "lowest": min(found),
            "highest": max(found),
            "chance": 1 / classes,
        }


def plain(size: int, classes: int) -> VisionTransformer:
    """A ViT of 8 px patches."""
    return VisionTransformer(size, 8, embed_dim=96, depth=6, num_heads=4, num_classes=classes)


def operations(model: nn.Module, size: int) -> int:
    """Floating-point operations of one picture of ``size`` pixels a side."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size))
    spent: int = counter.get_total_flops()
    return spent


@dataclass(frozen=True)
class Textures(ViTTask):
    """Which of eight patterns fills the picture, in any two colours, at any angle and many scales, under noise.

    Loss: cross-entropy of the logits.
    """

    name = "textures"
    classes = ("stripes", "checks", "plaid", "dots", "rings", "waves", "bricks", "cells")

    def draw(self, start: int, n: int, *, seed: int = 0, split: str = "train", size: int = 96) -> ViTBatch:
        seeds = [derive_seed(seed, number, split) for number in range(start, start + n)]
        drawn = [texture(one, size, len(self.classes)) for one in seeds]
        images = torch.from_numpy(np.stack([image for image, _ in drawn]))
        return ViTBatch(images, torch.tensor([label for _, label in drawn]), images.new_zeros(images.shape[:3]))

    def loss(self, model: Any, batch: ViTBatch, heads: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        logits = model(to_pixels(batch.images)).float()
        return nn.functional.cross_entropy(logits, batch.label), (logits.argmax(1) == batch.label).float().mean()

    def score(self, model: Any, n: int, *, seed: int = 1, size: int = 96) -> dict[str, float]:
        model.eval()
        with torch.no_grad():
            right = [
                model(to_pixels(batch.images, model)).argmax(1).cpu() == batch.label
                for batch in self.pieces(n, seed=seed, size=size)
            ]
        return {"accuracy": torch.cat(right).float().mean().item()}


def texture(seed: int, size: int, classes: int) -> tuple[NDArray[np.uint8], int]:
    """A picture (size, size, 3) and the number of its pattern."""
    rng = np.random.default_rng(seed)
    label, angle = int(rng.integers(classes)), rng.uniform(0, np.pi)
    period, shift = rng.uniform(7, 16), rng.uniform(-size / 2, size / 2, 2)
    y, x = np.mgrid[:size, :size] - size / 2
    x, y = x + shift[0], y + shift[1]
    u = (np.cos(angle) * x + np.sin(angle) * y) * 2 * np.pi / period
    v = (np.cos(angle) * y - np.sin(angle) * x) * 2 * np.pi / period
    row = np.floor(v / np.pi)
    third = [np.cos(u * np.cos(a) + v * np.sin(a)) for a in (0, 2 * np.pi / 3, 4 * np.pi / 3)]
    level = (
        np.sin(u),
        np.sign(np.sin(u) * np.sin(v)),
        (np.sin(u) + np.sin(v)) / 2,
        np.where(np.cos(u) + np.cos(v) > 0.8, 1.0, -1.0),
        np.sin(np.hypot(u, v)),
        np.sin(u + 2 * np.sin(v)),
        np.where((np.sin(v) ** 2 < 0.1) | (np.sin(u / 2 + row * np.pi / 2) ** 2 < 0.03), 1.0, -1.0),
        sum(third) * 2 / 3,
    )[label]
    dark, light = rng.uniform(0, 255, (2, 3))
    image = dark + (light - dark) * (level[..., None] + 1) / 2 + rng.normal(0, 12, (size, size, 3))
    return image.clip(0, 255).astype(np.uint8), label
