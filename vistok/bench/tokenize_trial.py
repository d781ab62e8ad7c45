"""Measuring the claims of tokenizers: small ones trained on the spot, and held-out pictures of the world."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from vistok.core.fidelity import psnr
from vistok.core.losses import pixel
from vistok.core.quantize import count_ids, usage
from vistok.zoo.vit_tasks import Objects, ViTBatch
from vistok.zoo.vit_training import Pace, fit

TEST_SEED = 1
DRAWN = 64
"""Side at which pictures are drawn, the smallest that the world draws; averaged down to the trial's."""


@dataclass
class TokenizeTrial:
    """What a claim of the tokenize family is measured with. Every call sees the same held-out pictures."""

    pictures: int = 256
    seed: int = 0
    """Of trainings."""
    size: int = 32
    """Side of a picture in pixels."""

    def fit(self, model: Any, steps: int, *, batch_size: int = 32, peak_lr: float = 2e-3) -> list[float]:
        """Train a tokenizer in place on objects: mean absolute and squared error, and the bottleneck's losses."""

        def loss(model: Any, batch: ViTBatch) -> tuple[Tensor, Tensor]:
            real = self._pictures(batch)
            made, codes = model(real)
            return pixel(made, real, "l1") + pixel(made, real) + codes.loss, psnr(made.detach(), real).mean()

        return fit(model, Objects(), Pace(steps, batch_size, peak_lr), seed=self.seed, size=DRAWN, loss=loss)

    @torch.no_grad()
    def psnr(self, model: Any, k: int | None = None) -> float:
        """Mean over held-out pictures, in dB, of all tokens or of the first ``k``."""
        found = []
        for real in self._held_out():
            codes = model.encode(real)
            found.append(psnr(model.decode(codes if k is None else codes.prefix(k)), real))
        return float(torch.cat(found).mean())

    @torch.no_grad()
    def usage(self, model: Any) -> float:
        """Share of the codes that held-out pictures use, in [0, 1]; mean over columns of ids."""
        ids = torch.cat([model.encode(real).ids for real in self._held_out()])
        columns = (ids if ids.dim() == 3 else ids[..., None]).unbind(-1)
        sizes = model.bottleneck.sizes
        return sum(float(usage(count_ids(c, size))) for c, size in zip(columns, sizes, strict=True)) / len(sizes)

    def _held_out(self) -> Iterator[Tensor]:
        for batch in Objects().pieces(self.pictures, seed=TEST_SEED, size=DRAWN):
            yield self._pictures(batch)

    def _pictures(self, batch: ViTBatch) -> Tensor:
        """(B, 3, size, size) float32 in [0, 1]"""
        drawn = batch.images.permute(0, 3, 1, 2).float() / 255
        return adaptive_avg_pool2d(drawn, (self.size, self.size))
