"""Cosmos Tokenizer for pictures: wavelets in front of convolutions, and finite scalars as codes.

What: two Haar transforms make a picture a sixteenth of the places with 48 channels before the first convolution; a
VQGAN without attention but in the middle makes a coarse map of it, whose channels are rounded to a few levels each.
Source: NVIDIA, arXiv 2501.03575; NVIDIA/Cosmos-Tokenizer. A control: what other tokenizers are held against.

``load_published`` reads the state of DI16x16 and DI8x8 by the names of the repository (as state dicts; the files
published are TorchScript, which this library does not run).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.core.wavelet import haar, inverse_haar
from vistok.parts.conv import ConvDecoder, ConvEncoder
from vistok.parts.quantize import FSQ
from vistok.parts.tokenizer import Tokenizer
from vistok.tokenize.vqgan import renamed

CARD = Card(
    title="Cosmos Tokenizer",
    kind="control",
    site="pixels to one discrete token a place of a coarse map, and back",
    paper="NVIDIA, 2025, arXiv 2501.03575",
    repository="NVIDIA/Cosmos-Tokenizer",
    claim="Wavelets as patches reconstruct better than raw patches of the same size.",
)


class CosmosNetwork(Tokenizer):
    """The tokenizer. ``patch``: side of what the transform folds into channels, ``factor`` that of a token."""

    def __init__(
        self,
        image: int,
        patch: int,
        factor: int,
        width: int,
        mults: tuple[int, ...],
        blocks: int,
        channels: int,
        levels: tuple[int, ...],
        patches: Literal["haar", "raw"],
    ) -> None:
        super().__init__()
        for name, value in (("patch", patch), ("factor", factor)):
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name}: got {value}, must be a power of two")
        if factor < patch or image % factor:
            raise ValueError(f"factor: got {factor}, must be {patch} or more and divide image, {image}")
        if patches not in ("haar", "raw"):
            raise ValueError(f"patches: got {patches!r}, must be 'haar' or 'raw'")
        halvings, inside = int(math.log2(factor // patch)), 3 * patch**2
        self.times, self.patch, self.patches = int(math.log2(patch)), patch, patches
        self.encoder = ConvEncoder(channels, width, mults, blocks, "middle", inside, halvings, width)
        self.decoder = ConvDecoder(channels, width, mults, blocks, "middle", channels=inside, halvings=halvings)
        self.image, self.grid = image, (image // factor, image // factor)
        self.bottleneck = FSQ(levels)
        self.down, self.up = nn.Conv2d(channels, len(levels), 1), nn.Conv2d(len(levels), channels, 1)

    @property
    def tokens(self) -> int:
        assert self.grid is not None
        return self.grid[0] * self.grid[1]

    def latents(self, images: Tensor) -> Tensor:
        x = 2 * images - 1
        x = haar(x, self.times) if self.patches == "haar" else pixel_unshuffle(x, self.patch)
        return self.down(self.encoder(x)).flatten(2).transpose(1, 2)

    def render(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        assert self.grid is not None
        x = self.decoder(self.up(z.transpose(1, 2).unflatten(2, self.grid)))
        x = inverse_haar(x, self.times) if self.patches == "haar" else pixel_shuffle(x, self.patch)
        return (x + 1) / 2

    def load_published(self, state: dict[str, Tensor]) -> None:
        """Weights under the names of Cosmos-Tokenizer's DiscreteImageTokenizer. ValueError for another size."""
        missing, unexpected = self.load_state_dict(renamed(state, len(self.encoder.levels)), strict=False)
        lacks = [key for key in missing if not key.startswith("bottleneck.")]
        if lacks or unexpected:
            raise ValueError(f"state: lacks {lacks}, has besides {unexpected}; must be of this size")


@dataclass(frozen=True)
class Cosmos:
    """The tokenizer; the defaults are DI16x16's."""

    image: int = 1024
    """Side of a picture in pixels."""
    patch: int = 4
    """Side of the patches that the wavelets fold."""
    factor: int = 16
    """Side of a token in pixels (DI8x8: 8)."""
    width: int = 128
    """Channels of the first convolution."""
    mults: tuple[int, ...] = (2, 4, 4)
    """Channels of each level over ``width``."""
    blocks: int = 2
    """Residual blocks of a level; the decoder has one more."""
    channels: int = 256
    """Channels of the map between the networks and the codes."""
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    """Levels of each channel of a code."""
    patches: Literal["haar", "raw"] = "haar"
    """Whether patches are wavelets or pixels."""

    def build(self) -> CosmosNetwork:
        """An untrained tokenizer."""
        sizes = self.image, self.patch, self.factor, self.width, self.mults, self.blocks, self.channels
        made = CosmosNetwork(*sizes, self.levels, self.patches)
        made.recipe = self
        return made


def claim(trial: TokenizeTrial, steps: int = 300) -> Outcome:
    """PSNR on held-out pictures of codes of 4 x 4 pixels, of raw patches and of wavelets; holds at 0.2 dB more."""
    found = []
    for patches in ("raw", "haar"):
        torch.manual_seed(trial.seed)
        model = Cosmos(trial.size, 2, 4, 24, (1, 2), 1, 32, (8, 5, 5), patches).build()
        trial.fit(model, steps)
        found.append(trial.psnr(model))
    return Outcome(f"PSNR of {(trial.size // 4) ** 2} tokens, dB", found[0], found[1], found[1] >= found[0] + 0.2)
