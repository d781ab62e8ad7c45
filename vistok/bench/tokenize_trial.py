"""Measuring the claims of tokenizers: small ones trained on the spot, and held-out pictures of the world."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, one_hot

from vistok.core.fidelity import psnr
from vistok.core.quantize import count_ids, usage
from vistok.parts.vision import FrozenVision
from vistok.zoo.vit import load_vit
from vistok.zoo.vit_tasks import Objects, ViTBatch
from vistok.zoo.vit_training import Pace, fit

TEST_SEED, TRAIN_SEED = 1, 2
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

    def fit(
        self,
        model: Any,
        steps: int,
        *,
        batch_size: int = 32,
        peak_lr: float = 2e-3,
        loss: Callable[[Any, Tensor, Tensor], Tensor] | None = None,
    ) -> list[float]:
        """Train a module in place on objects and return the losses.

        By default it is a tokenizer and learns its ``objective``. ``loss``: instead, (model, pictures (B, 3, S, S) in
        [0, 1], labels (B,) int64 below 18) -> a scalar.
        """

        def step(model: Any, batch: ViTBatch) -> tuple[Tensor, Tensor]:
            real = self._pictures(batch)
            found = model.objective(real) if loss is None else loss(model, real, batch.label)
            return found, found.detach()

        return fit(model, Objects(), Pace(steps, batch_size, peak_lr), seed=self.seed, size=DRAWN, loss=step)

    def vision(self, prefix: bool = False) -> FrozenVision:
        """The zoo's vision transformer, frozen: an encoder or a teacher, 12 x 12 patches of 96 channels."""
        return FrozenVision(load_vit("vistok-vit", device="cpu"), prefix)

    @torch.no_grad()
    def psnr(self, model: Any, k: int | None = None) -> float:
        """Mean over held-out pictures, in dB, of all tokens or of the first ``k``."""
        found = []
        for real, _ in self.held_out():
            codes = model.encode(real)
            found.append(psnr(model.decode(codes if k is None else codes.prefix(k)), real))
        return float(torch.cat(found).mean())

    @torch.no_grad()
    def probe(self, features: Callable[[Tensor], Tensor], ridge: float = 1e-2) -> float:
        """Share of held-out pictures whose object a linear read-out of ``features`` names right, in [0, 1].

        ``features``: pictures (B, 3, S, S) in [0, 1] to (B, D). The read-out is ridge regression on standardised
        features of four times as many training pictures, solved, not trained.
        """
        x, y = self._featured(features, self.pictures * 4, TRAIN_SEED)
        mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
        x = torch.cat([(x - mean) / std, x.new_ones(len(x), 1)], 1)
        answers = one_hot(y, len(Objects.classes)).double()
        inner = x.t() @ x / len(x)
        weights = torch.linalg.solve(inner + ridge * torch.eye(len(inner), dtype=x.dtype), x.t() @ answers / len(x))
        x, y = self._featured(features, self.pictures, TEST_SEED)
        x = torch.cat([(x - mean) / std, x.new_ones(len(x), 1)], 1)
        return float(((x @ weights).argmax(1) == y).double().mean())

    @torch.no_grad()
    def code_loss(self, model: Any, generator: Any, steps: int, *, peak_lr: float = 2e-3) -> float:
        """Nats a held-out picture's ids cost ``generator``, a ``CausalModel`` that is first trained on ids of others.

        ``model``: the tokenizer, with one id a token.
        """

        def loss(generator: Any, real: Tensor, label: Tensor) -> Tensor:
            with torch.no_grad():
                ids = model.encode(real).ids
            return generator.loss(ids, label if generator.classes else None)

        with torch.enable_grad():
            self.fit(generator, steps, peak_lr=peak_lr, loss=loss)
        found = [
            generator.nats(model.encode(real).ids, label if generator.classes else None)
            for real, label in self.held_out()
        ]
        return float(torch.cat(found).mean())

    @torch.no_grad()
    def usage(self, model: Any) -> float:
        """Share of the codes that held-out pictures use, in [0, 1]; mean over columns of ids."""
        ids = torch.cat([model.encode(real).ids for real, _ in self.held_out()])
        columns = (ids if ids.dim() == 3 else ids[..., None]).unbind(-1)
        sizes = model.bottleneck.sizes
        return sum(float(usage(count_ids(c, size))) for c, size in zip(columns, sizes, strict=True)) / len(sizes)

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of held-out pictures (B, 3, S, S) float32 in [0, 1], and of their objects, (B,) int64 below 18."""
        yield from self._batches(self.pictures, TEST_SEED)

    def _batches(self, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in Objects().pieces(count, seed=seed, size=DRAWN):
            yield self._pictures(batch), batch.label

    def _featured(self, features: Callable[[Tensor], Tensor], count: int, seed: int) -> tuple[Tensor, Tensor]:
        found = [(features(real).double(), label) for real, label in self._batches(count, seed)]
        return torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])

    def _pictures(self, batch: ViTBatch) -> Tensor:
        """(B, 3, size, size) float32 in [0, 1]"""
        drawn = batch.images.permute(0, 3, 1, 2).float() / 255
        return adaptive_avg_pool2d(drawn, (self.size, self.size))
