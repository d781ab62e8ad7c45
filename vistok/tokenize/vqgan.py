"""VQGAN: a convolutional tokenizer on a grid, as LlamaGen trains it; with several scales it is VAR's.

What: a picture goes through residual convolutions to a coarse map, each place of which takes the nearest code; a
mirror of the network draws the picture. With ``scales`` the map is coded coarse to fine, each scale what the coarser
ones left over. Source: Esser et al., arXiv 2012.09841 (CompVis/taming-transformers), in the forms of LlamaGen (Sun et
al., arXiv 2406.06525) and VAR (Tian et al., arXiv 2404.02905). A control: what other tokenizers are held against.

``load_published`` reads the weights of all three by the names in their repositories.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.parts.conv import ConvDecoder, ConvEncoder
from vistok.parts.quantize import MultiScale, VectorQuantizer
from vistok.parts.tokenizer import Tokenizer
from vistok.tokenize.vq_grid import VQGrid

CARD = Card(
    title="Taming Transformers for High-Resolution Image Synthesis",
    kind="control",
    site="pixels to one discrete token a place of a coarse map, and back",
    paper="Esser et al., 2021, arXiv 2012.09841; as in LlamaGen (arXiv 2406.06525) and VAR (arXiv 2404.02905)",
    repository="FoundationVision/LlamaGen",
    claim="Convolutions reconstruct better than a transformer of as many codes after as many steps.",
)


class VQGANNetwork(Tokenizer):
    """The tokenizer. ``kernel``: side of the convolutions before and after the codebook."""

    def __init__(
        self,
        image: int,
        width: int,
        mults: tuple[int, ...],
        blocks: int,
        channels: int,
        kernel: int,
        bottleneck: VectorQuantizer | MultiScale,
    ) -> None:
        super().__init__()
        self.encoder = ConvEncoder(channels, width, mults, blocks)
        self.decoder = ConvDecoder(channels, width, mults, blocks)
        if image % self.encoder.factor:
            raise ValueError(f"image: got {image}, must be a multiple of {self.encoder.factor}")
        side = image // self.encoder.factor
        if isinstance(bottleneck, MultiScale) and bottleneck.scales[-1] != side:
            raise ValueError(f"scales: got {bottleneck.scales}, the last must be {side}, the side of the map")
        self.image, self.grid, self.bottleneck = image, (side, side), bottleneck
        self.down = nn.Conv2d(channels, bottleneck.dim, kernel, padding=kernel // 2)
        self.up = nn.Conv2d(bottleneck.dim, channels, kernel, padding=kernel // 2)

    @property
    def tokens(self) -> int:
        assert self.grid is not None
        return self.grid[0] * self.grid[1]

    def latents(self, images: Tensor) -> Tensor:
        return self.down(self.encoder(2 * images - 1)).flatten(2).transpose(1, 2)

    def render(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        assert self.grid is not None
        return (self.decoder(self.up(z.transpose(1, 2).unflatten(2, self.grid))) + 1) / 2

    def load_published(self, state: dict[str, Tensor]) -> None:
        """Weights under the names of LlamaGen, VAR or taming-transformers (the tokenizer's alone, no discriminator).

        Raises ValueError where they are of another size or layout.
        """
        own = renamed(state, len(self.encoder.levels))
        table = own.pop("bottleneck.codebook", None)
        missing, unexpected = self.load_state_dict(own, strict=False)
        lacks = [key for key in missing if not key.startswith("bottleneck.") or "mixers" in key]
        if lacks or unexpected or table is None:
            lacks += [] if table is not None else ["bottleneck.codebook"]
            raise ValueError(f"state: lacks {lacks}, has besides {unexpected}; must be of this size and layout")
        inner = self.bottleneck.inner if isinstance(self.bottleneck, MultiScale) else self.bottleneck
        assert isinstance(inner, VectorQuantizer)
        inner.fill(table)


@dataclass(frozen=True)
class VQGAN:
    """The tokenizer; the defaults are LlamaGen's of factor 16. VAR: channels 32, codes 4096, dim 32, kernel 3, norm
    "none", scales 1 2 3 4 5 6 8 10 13 16, mixers 4."""

    image: int = 256
    """Side of a picture in pixels."""
    width: int = 128
    """Channels of the finest level."""
    mults: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each level over those of the finest; each level after the first halves the map."""
    blocks: int = 2
    """Residual blocks of a level; the decoder has one more."""
    channels: int = 256
    """Channels of the map between the networks and the codes."""
    kernel: int = 1
    """Side of the convolutions to the codes' channels and back."""
    codes: int = 16384
    """Codes of the codebook."""
    dim: int = 8
    """Channels of a code."""
    norm: Literal["none", "both", "lookup"] = "both"
    """Whether codes and vectors have length 1: never, always, or for the choice only."""
    scales: tuple[int, ...] = ()
    """Sides of the maps that are coded, coarse to fine; () for the map alone."""
    mixers: int = 0
    """Convolutions that smooth what a scale adds."""
    restart_after: int | None = 100
    """Training steps after which an unused code is put back into use; None: never."""

    def build(self) -> VQGANNetwork:
        """An untrained tokenizer."""
        table = VectorQuantizer(self.codes, self.dim, norm=self.norm, restart_after=self.restart_after)
        bottleneck = MultiScale(table, self.scales, mixers=self.mixers) if self.scales else table
        made = VQGANNetwork(self.image, self.width, self.mults, self.blocks, self.channels, self.kernel, bottleneck)
        made.recipe = self
        return made


_PARTS = (
    (r"^quantize\.embedding\.weight$", "bottleneck.codebook"),
    (r"^quantize\.quant_resi\.qresi_ls\.", "bottleneck.mixers."),
    (r"^quant_conv\.", "down."),
    (r"^post_quant_conv\.", "up."),
    (r"\.conv_in\.", ".first."),
    (r"\.norm_out\.", ".norm."),
    (r"\.conv_out\.", ".last."),
    (r"\.nin_shortcut\.", ".skip."),
    (r"\.proj_out\.", ".out."),
    (r"\.mid\.block_1\.", ".middle.0."),
    (r"\.mid\.attn_1\.", ".middle.1."),
    (r"\.mid\.block_2\.", ".middle.2."),
    (r"\.mid\.(\d)\.", r".middle.\1."),
)
_LEFT = ("quantize.codebook_used", "quantize.ema_vocab_hit_SV")
"""Meters of training."""


def renamed(state: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """A state of LlamaGen, VAR or taming-transformers under our names.

    ``levels``: of the networks. taming-transformers and VAR number the decoder's from the finest on, LlamaGen in their
    order. A level with attention has it behind each of its residual blocks.
    """
    attended = {m[1] for key in state if (m := re.match(r"((?:en|de)coder\.\w+\.\d+)\.attn\.", key))}
    found: dict[str, Tensor] = {}
    apart: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key in _LEFT:
            continue
        for theirs, ours in _PARTS:
            key = re.sub(theirs, ours, key)
        level = re.match(r"(encoder|decoder)\.(conv_blocks|down|up)\.(\d+)\.(.*)", key)
        if level:
            net, kind, number, rest = level.groups()
            i = levels - 1 - int(number) if kind == "up" else int(number)
            step = 2 if f"{net}.{kind}.{number}" in attended else 1
            key = re.sub(r"^(?:res|block)\.(\d+)", lambda m: f"levels.{i}.{step * int(m[1])}", rest)  # noqa: B023
            key = re.sub(r"^attn\.(\d+)", lambda m: f"levels.{i}.{2 * int(m[1]) + 1}", key)  # noqa: B023
            key = re.sub(r"^(down|up)sample\.conv", lambda m: f"{m[1]}s.{i}", key)  # noqa: B023
            key = f"{net}.{key}"
        if part := re.match(r"(.*\.)([qkv])\.(weight|bias)$", key):
            apart.setdefault(f"{part[1]}qkv.{part[3]}", {})[part[2]] = value
        else:
            found[key] = value
    return found | {key: torch.cat([parts[name] for name in "qkv"]) for key, parts in apart.items()}


def claim(trial: TokenizeTrial, steps: int = 200) -> Outcome:
    """PSNR on held-out pictures of 64 codes of 512, by a transformer and by convolutions; holds at 0.2 dB more."""
    side = trial.size // 8
    recipes = (
        VQGrid("T", trial.size, side, 512, 8, 20),
        VQGAN(trial.size, 16, (1, 2, 2), 1, 32, 1, 512, 8, "both", (), 0, 20),
    )
    found, sizes = [], []
    for recipe in recipes:
        torch.manual_seed(trial.seed)
        model = recipe.build()
        sizes.append(sum(p.numel() for p in model.parameters()))
        trial.fit(model, steps)
        found.append(trial.psnr(model))
    note = f"{steps} steps of 32 pictures; {sizes[0]} and {sizes[1]} parameters"
    return Outcome("PSNR of 64 tokens, dB", found[0], found[1], found[1] >= found[0] + 0.2, note)
