"""HieraTok: the decoder sees the same latents at several scales, coarse before fine.

What: a ViT encodes to a map of continuous latents; averages of the map over larger cells stand in front of it, and in
the decoder a token sees its own scale and the coarser ones only, so that the whole picture is settled before its
details. Nothing more is stored: coarse tokens are functions of the finest, taken after the bottleneck's noise, as the
scales would disagree otherwise. Source: Chen et al., arXiv 2509.23736; no code was released, this follows the abstract.

Choices that the abstract leaves open: Gaussian latents of 32 channels, scales 1, 2, 4, 8 and 16, positions of a coarse
cell the average of those it covers, a learned vector a scale, and that each coarse scale draws the picture averaged
down to it, with the same head. A chain of divisors, so that a scale is a function of every finer one. The perceptual
and adversarial losses of the paper are the trainer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.core.codes import Codes
from vistok.core.losses import pixel
from vistok.core.visibility import scale_causal
from vistok.parts.quantize import Gaussian
from vistok.tokenize._latents import SIZES
from vistok.tokenize.vq_grid import GridNetwork

CARD = Card(
    title="HieraTok: Multi-Scale Visual Tokenizer Improves Image Reconstruction and Generation",
    kind="trained",
    site="pixels to a map of continuous latents, and back through the map at several scales",
    paper="Chen et al., 2025, arXiv 2509.23736",
    mechanism=("transformation",),
    merge="averages of the map over larger cells, for the decoder only",
    claim="Reconstructs better than the same networks at one scale after as many steps.",
)


def pyramid(z: Tensor, scales: Sequence[int]) -> Tensor:
    """(B, sum of s^2, D): a square map ``z`` (B, s_last^2, D) averaged to ``scales`` s x s, coarse to fine."""
    side = scales[-1]
    whole = z.transpose(1, 2).unflatten(2, (side, side))
    return torch.cat([adaptive_avg_pool2d(whole, s).flatten(2) for s in scales[:-1]] + [whole.flatten(2)], 2).mT


class HieraTokNetwork(GridNetwork):
    """The ViTs of ``vq-grid``; the decoder reads a pyramid of the latents. With one scale it is that tokenizer.

    ``auxiliary``: weight in the objective of what the coarse scales draw, a mean over them.
    """

    visible: Tensor | None

    def __init__(
        self,
        image: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        channels: int,
        scales: Sequence[int],
        kl: float = 1e-6,
        auxiliary: float = 0.0,
    ) -> None:
        super().__init__(image, patch, width, depth, heads, Gaussian(channels, kl))
        side = image // patch
        chain = scales and scales[0] >= 1 and all(a < b and b % a == 0 for a, b in pairwise(scales))
        if not chain or scales[-1] != side:
            raise ValueError(f"scales: got {tuple(scales)}, must rise to the map's {side}, each dividing the next")
        self.scales, self.auxiliary = tuple(scales), auxiliary
        self.up = nn.Linear(channels, width)
        self.scale_embed = nn.Parameter(torch.zeros(len(self.scales), width))
        lengths = [s * s for s in self.scales]
        self.register_buffer("which", torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)), False)
        self.register_buffer("visible", scale_causal(lengths) if len(lengths) > 1 else None, False)

    def decoded(self, z: Tensor) -> list[Tensor]:
        """(B, width, s, s) for each scale s, of latents ``z`` (B, N, channels)."""
        tokens = self.up(pyramid(z, self.scales)) + pyramid(self.positions[1:], self.scales)
        x = tokens + self.scale_embed[self.get_buffer("which")]
        *blocks, norm = self.decoder
        for block in blocks:
            x = block(x, attn_mask=self.visible)
        parts = norm(x).transpose(1, 2).split([s * s for s in self.scales], 2)
        return [part.unflatten(2, (s, s)) for part, s in zip(parts, self.scales, strict=True)]

    def render(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.head(self.decoded(z)[-1])

    def drawn(self, codes: Codes) -> list[Tensor]:
        """(B, 3, s p, s p) for each scale s and patches of p pixels: the picture as that scale knows it."""
        assert codes.z is not None
        return [self.head(x) for x in self.decoded(codes.z.to(self.dtype))]

    def objective(self, images: Tensor) -> Tensor:
        codes = self.encode(images)
        *coarse, made = self.drawn(codes)
        loss = pixel(made, images, "l1") + pixel(made, images) + codes.loss
        if not self.auxiliary or not coarse:
            return loss
        each = [pixel(x, adaptive_avg_pool2d(images, x.shape[-1])) for x in coarse]
        return loss + self.auxiliary * torch.stack(each).mean()


@dataclass(frozen=True)
class HieraTok:
    """A tokenizer by its size."""

    size: Literal["T", "S", "B", "L"] = "B"
    """Width, blocks and heads of encoder and decoder: see ``vistok.tokenize._latents.SIZES``."""
    image: int = 256
    """Side of a picture in pixels."""
    patch: int = 16
    """Side of a patch in pixels."""
    channels: int = 32
    """Channels of a latent."""
    scales: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Sides of the maps that the decoder sees, coarse to fine; the last is that of the latents."""
    kl: float = 1e-6
    """Weight of the latents' divergence from a normal distribution."""
    auxiliary: float = 1.0
    """Weight of the pictures that the coarse scales draw; 0: they draw none."""

    def build(self) -> HieraTokNetwork:
        """An untrained tokenizer. Raises ValueError for an unknown size, or scales that are no chain of divisors."""
        if self.size not in SIZES:
            raise ValueError(f"size: got {self.size!r}, must be one of {', '.join(SIZES)}")
        made = HieraTokNetwork(
            self.image, self.patch, *SIZES[self.size], self.channels, self.scales, self.kl, self.auxiliary
        )
        made.recipe = self
        return made


def claim(trial: TokenizeTrial, steps: int = 200) -> Outcome:
    """PSNR on held-out pictures, of 8 x 8 latents of 4 channels read at one scale and at four.

    Both networks are trained for ``steps`` steps of 16 pictures. Holds if four scales are better by 0.1 dB.
    """
    found = []
    for scales in ((8,), (1, 2, 4, 8)):
        torch.manual_seed(trial.seed)
        model = HieraTok("T", trial.size, trial.size // 8, 4, scales).build()
        trial.fit(model, steps, batch_size=16)
        found.append(trial.psnr(model))
    return Outcome("PSNR, dB", found[0], found[1], found[1] >= found[0] + 0.1)
