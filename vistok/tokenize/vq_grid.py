"""Plain VQ on a grid: the control that every other tokenizer has to beat, and a proxy for those that need one.

What: a ViT on patches, one code a patch from one table, a ViT back to patches. Nothing of it is new: ViT-VQGAN (Yu et
al., arXiv 2110.04627) without its adversary. Dead codes are put back into use, without which a table collapses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.parts.quantize import Bottleneck, VectorQuantizer
from vistok.parts.tokenizer import Tokenizer
from vistok.tokenize._latents import SIZES, RGBHead

CARD = Card(
    title="Vector quantisation on a grid",
    kind="control",
    site="pixels to one discrete token a patch, and back",
    paper="",
    claim="With restart of dead codes the codebook is used; without, it collapses.",
)


class GridNetwork(Tokenizer):
    """Pictures of ``image`` px in patches of ``patch``; ``bottleneck`` on the vectors of the grid."""

    def __init__(self, image: int, patch: int, width: int, depth: int, heads: int, bottleneck: Bottleneck) -> None:
        super().__init__()
        if image % patch:
            raise ValueError(f"patch: got {patch}, must divide image, {image}")
        side = image // patch
        self.image, self.grid, self.bottleneck = image, (side, side), bottleneck
        norm = partial(nn.LayerNorm, eps=1e-5)

        def blocks() -> nn.Sequential:
            return nn.Sequential(
                *(Block(width, heads, 4.0, qkv_bias=True, norm_layer=norm) for _ in range(depth)), norm(width)
            )

        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(width**-0.5 * torch.randn(2, side**2, width))
        self.encoder, self.decoder = blocks(), blocks()
        self.down, self.up = nn.Linear(width, bottleneck.dim), nn.Linear(bottleneck.dim, width)
        self.head = RGBHead(width, patch)

    @property
    def tokens(self) -> int:
        return self.positions.shape[1]

    def latents(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        return self.down(self.encoder(x + self.positions[0]))

    def render(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.decoder(self.up(z) + self.positions[1])
        assert self.grid is not None
        return self.head(x.transpose(1, 2).unflatten(2, self.grid))


@dataclass(frozen=True)
class VQGrid:
    """A tokenizer by its size."""

    size: Literal["T", "S", "B", "L"] = "S"
    """Width, blocks and heads of encoder and decoder, those of TiTok."""
    image: int = 256
    """Side of a picture in pixels."""
    patch: int = 16
    """Side of a patch in pixels."""
    codes: int = 4096
    """Codes of the codebook."""
    dim: int = 12
    """Channels of a code."""
    restart_after: int | None = 100
    """Training steps after which an unused code is put back into use; None: never."""

    def build(self, bottleneck: Bottleneck | None = None) -> GridNetwork:
        """An untrained tokenizer; ``bottleneck`` in place of its own, which then cannot be saved."""
        own = VectorQuantizer(self.codes, self.dim, norm="both", restart_after=self.restart_after)
        made = GridNetwork(self.image, self.patch, *SIZES[self.size], own if bottleneck is None else bottleneck)
        made.recipe = self if bottleneck is None else None
        return made


def claim(trial: TokenizeTrial, steps: int = 150) -> Outcome:
    """Share of codes in use on held-out pictures, without and with restart; holds if it doubles at least."""
    used = []
    for restart_after in (None, 20):
        torch.manual_seed(trial.seed)
        model = VQGrid("T", trial.size, trial.size // 8, 512, 8, restart_after).build()
        trial.fit(model, steps)
        used.append(trial.usage(model))
    return Outcome("share of codes in use", used[0], used[1], used[1] >= 2 * used[0])
