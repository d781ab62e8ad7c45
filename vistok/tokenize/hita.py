"""Hita: tokens of the whole picture stand before those of its patches, and both are causal.

What: learned carriers read a convolutional encoder's map and a frozen vision model's features; a second transformer is
causal over [carriers | patches in raster order], so that patches see all carriers. Carriers and patches have a codebook
each. In the decoder a causal transformer over the same order is read ``shift`` places early: slot i of the map knows
patches up to i - shift only and must take the rest from the carriers. Source: Zheng et al., arXiv 2507.02358;
CVMI-Lab/Hita.

The last ``shift`` patches are read nowhere, as in the released code: their ids are stored and no pixel depends on
them; ``shift=0`` reads all. The convolutional decoder is not causal. Variant "U" also learns to give the vision model's
patches back from the carriers (cosine), with mask tokens that see the carriers and one another.

Departures: no interpolation of positions to other picture sizes; the pixel loss is the project's, of which the released
one doubles the square; perceptual and adversarial losses are the trainer's. ``vision=""`` leaves the vision model out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.core.losses import distillation, pixel
from vistok.parts.conv import ConvDecoder, ConvEncoder
from vistok.parts.quantize import Stretches, VectorQuantizer
from vistok.parts.tokenizer import Tokenizer
from vistok.parts.vision import FrozenVision
from vistok.tokenize._holistic import FusionDecoder, HolisticGenerator, Stack

CARD = Card(
    title="Holistic Tokenizer for Autoregressive Image Generation",
    kind="trained",
    site="pixels to discrete tokens of the whole picture, then of its patches, and back",
    paper="Zheng et al., 2025, arXiv 2507.02358",
    repository="CVMI-Lab/Hita",
    needs=("features of a frozen vision model",),
    mechanism=("transformation",),
    merge="learned carriers that read map and vision features by attention; patches stay beside them",
    claim="A model of the codes learns faster with the holistic tokens before the patches than behind them.",
)


class HitaNetwork(Tokenizer):
    """Tokens [carriers | patches, row after row]. ``vision``: the frozen model that the encoder also looks through."""

    def __init__(self, recipe: Hita, vision: FrozenVision | None = None) -> None:
        super().__init__()
        width, carriers, dims = recipe.dim, recipe.carriers, (recipe.carrier_dim, recipe.patch_dim)
        conv: dict[str, Any] = dict(width=recipe.width, mults=recipe.mults, blocks=recipe.blocks)
        stack: dict[str, Any] = dict(
            width=width, depth=recipe.depth, heads=recipe.heads, mlp=recipe.mlp, dropout=recipe.dropout
        )
        self.encoder, self.decoder = ConvEncoder(width, **conv), ConvDecoder(width, **conv)
        side, left = divmod(recipe.image, self.encoder.factor)
        if left:
            raise ValueError(f"image: got {recipe.image}, must be a multiple of {self.encoder.factor}")
        if recipe.variant not in ("V", "U"):
            raise ValueError(f"variant: got {recipe.variant!r}, must be 'V' or 'U'")
        if vision is not None and not vision.prefix:
            raise ValueError("vision: must be made with prefix=True: its class token is read, too")
        if recipe.variant == "U" and vision is None:
            raise ValueError("variant: got 'U', which needs a vision model whose features to give back")
        self.recipe, self.image, self.side, self.vision = recipe, recipe.image, side, vision
        self.stretches = [carriers, side**2]
        self.positions = nn.Parameter(width**-0.5 * torch.randn(1, side**2, width))
        self.carriers = nn.Parameter(width**-0.5 * torch.randn(carriers, width))
        if vision is not None:
            self.project = nn.Sequential(
                nn.Linear(vision.dim, width, bias=False),
                nn.LayerNorm(width),
                nn.ReLU(),
                nn.Linear(width, width, bias=False),
                nn.LayerNorm(width),
            )
        self.reading, self.ordered = Stack(**stack), Stack(**stack)
        self.down = nn.ModuleList(nn.Linear(width, dim) for dim in dims)
        self.up = nn.ModuleList(nn.Linear(dim, width) for dim in dims)
        books = [VectorQuantizer(recipe.codes, dim, norm="both", restart_after=recipe.restart_after) for dim in dims]
        self.bottleneck: Stretches = Stretches(books, self.stretches)
        seen = vision.dim if vision is not None and recipe.variant == "U" else 0
        self.fusion = FusionDecoder(carriers, side, recipe.shift, semantic=seen, **stack)

    @property
    def tokens(self) -> int:
        return sum(self.stretches)

    def seen(self, images: Tensor) -> Tensor | None:
        """(B, 1 + patches, D): the vision model's class token and patches, without its registers."""
        if self.vision is None:
            return None
        found = self.vision(images)
        return torch.cat([found[:, :1], found[:, self.vision.model.num_prefix_tokens :]], 1).to(self.dtype)

    def latents(self, images: Tensor, seen: Tensor | None = None) -> Tensor:
        patches = self.encoder(2 * images - 1).flatten(2).transpose(1, 2) + self.positions
        parts = [self.carriers.expand(len(images), -1, -1), patches]
        seen = self.seen(images) if seen is None else seen
        if seen is not None:
            parts.insert(1, self.project(seen))
        x = self.reading(torch.cat(parts, 1))
        x = self.ordered(torch.cat([x[:, : self.stretches[0]], x[:, -self.stretches[1] :]], 1), causal=True)
        narrow = [down(part) for down, part in zip(self.down, x.split(self.stretches, 1), strict=True)]
        return torch.cat([pad(part, (0, self.bottleneck.dim - part.shape[2])) for part in narrow], 1)

    def wide(self, z: Tensor) -> list[Tensor]:
        """Carriers and patches of the decoder, (B, n, width) each, of codes ``z`` (B, N, D)."""
        parts = z.to(self.dtype).split(self.stretches, 1)
        return [up(part[..., : up.in_features]) for up, part in zip(self.up, parts, strict=True)]

    def render(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        slots = self.fusion(*self.wide(z)).transpose(1, 2).unflatten(2, (self.side, self.side))
        return (self.decoder(slots) + 1) / 2

    def objective(self, images: Tensor) -> Tensor:
        seen = self.seen(images)
        codes = self.bottleneck(self.latents(images, seen))
        made = self.render_codes(codes)
        loss = pixel(made, images, "l1") + pixel(made, images) + codes.loss
        if self.vision is None or not hasattr(self.fusion, "semantic"):
            return loss
        assert seen is not None
        told = self.fusion.features(self.wide(codes.z)[0], self.vision.grid)
        return loss + distillation(told, seen[:, 1:])


@dataclass(frozen=True)
class Hita:
    """A tokenizer by its sizes."""

    image: int = 336
    """Side of a picture in pixels."""
    width: int = 128
    """Channels of the convolutions at full resolution."""
    mults: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Times ``width`` at each level; each level but the last halves the side."""
    blocks: int = 2
    """Residual blocks a level."""
    dim: int = 512
    """Channels of the transformers."""
    depth: int = 3
    """Blocks of each of the three transformers."""
    heads: int = 8
    """Heads of a block."""
    mlp: int = 2048
    """3/2 of the hidden channels of a block's gated MLP."""
    dropout: float = 0.1
    """Of attention, in training."""
    carriers: int = 128
    """Holistic tokens."""
    shift: int = 4
    """How many places early the decoder is read; the last so many patches are lost."""
    codes: int = 16384
    """Codes of each of the two tables."""
    carrier_dim: int = 12
    """Channels of a holistic code."""
    patch_dim: int = 8
    """Channels of a patch's code."""
    vision: str = "vit_large_patch14_reg4_dinov2"
    """timm's name of the frozen model that the encoder looks through; "": none."""
    vision_size: int = 224
    """Side of the picture that it is shown."""
    variant: Literal["V", "U"] = "V"
    """ "U": the carriers learn to give the vision model's patches back."""
    restart_after: int | None = 100
    """Training steps after which an unused code is put back into use; None: never."""

    def build(self, vision: FrozenVision | None = None) -> HitaNetwork:
        """An untrained tokenizer. ``vision``: the frozen model with its weights (``prefix=True``), else random ones."""
        if vision is None and self.vision:
            vision = FrozenVision.of(self.vision, prefix=True, img_size=self.vision_size)
        return HitaNetwork(self, vision)


def claim(trial: TokenizeTrial, steps: int = 150) -> Outcome:
    """Nats that a held-out picture's codes cost a small model, patches first and holistic tokens first.

    One tokenizer of 16 holistic tokens and 64 patches, without a vision model; two models of its codes, of one size,
    trained for two thirds of the tokenizer's ``steps``. Only the order of the codes differs. Holds at 1% less.
    """
    torch.manual_seed(trial.seed)
    model = Hita(
        trial.size, 20, (1, 1, 2), 1, 96, 2, 3, 384, 0.0, 16, 4, 256, 8, 8, vision="", restart_after=20
    ).build()
    trial.fit(model, steps, batch_size=16)
    model.eval()
    found = []
    for first in ("patches", "carriers"):
        torch.manual_seed(trial.seed)
        reader = HolisticGenerator(256, 16, model.tokens, first)
        found.append(trial.code_loss(model, reader, max(1, 2 * steps // 3)))
    note = f"PSNR of the tokenizer {trial.psnr(model):.2f} dB"
    return Outcome("nats a picture", found[0], found[1], found[1] <= 0.99 * found[0], note)
