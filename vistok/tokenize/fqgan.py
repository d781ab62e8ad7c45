"""FQGAN: a place has an id in each of two or three books, which are pushed to say different things.

What: a convolutional encoder's map goes through an adapter for each book (a transformer and convolutions) to vectors
on the sphere; the books' results at a place are pushed to be orthogonal; all but the first learn to give a frozen
vision model's class token. The pixel decoder reads all side by side. k books of K codes are a vocabulary of K^k, of
which only k K rows are searched. Source: Bai et al., arXiv 2411.16681; showlab/FQGAN.

Its generator FAR is ``vistok.tokenize._factors``: one context a place, from which the ids are drawn one after another.

Books stand as visual, (middle,) semantic everywhere. The released dual model decodes in this order, but takes and gives
ids the other way round. Perceptual and adversarial losses are the trainer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.core.losses import distillation, pixel
from vistok.parts.conv import ConvDecoder, ConvEncoder, Norm
from vistok.parts.quantize import Product, VectorQuantizer
from vistok.parts.tokenizer import Tokenizer
from vistok.parts.vision import FrozenVision
from vistok.tokenize._dual import Transformer, compared, laid, rows

CARD = Card(
    title="Factorized Visual Tokenization and Generation",
    kind="trained",
    site="pixels to discrete tokens on a grid, each with an id in every book, and back",
    paper="Bai et al., 2024, arXiv 2411.16681",
    repository="showlab/FQGAN",
    needs=("class token of a frozen vision model, in training",),
    mechanism=("transformation",),
    claim="Two small books tell more of what a picture shows than one large book of as many bits, at equal fidelity.",
    departures=("ids stand visual first everywhere; the released dual model takes and gives the semantic ones first",),
)


class Adapter(nn.Module):
    """An encoder's map (B, ``width``, h, w) to a book's vectors (B, h w, ``dim``)."""

    def __init__(self, width: int, hidden: int, dim: int, tokens: int, depth: int, heads: int) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-5)
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.blocks = nn.Sequential(
            norm(width), *(Block(width, heads, 4.0, qkv_bias=True, norm_layer=norm) for _ in range(depth)), norm(width)
        )
        self.narrow = nn.Sequential(
            Norm(width), nn.SiLU(), nn.Conv2d(width, hidden, 3, padding=1), nn.Conv2d(hidden, dim, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        seen = self.blocks(rows(x) + self.positions)
        return rows(self.narrow(laid(seen, (x.shape[2], x.shape[3]))))


class ClassReader(nn.Module):
    """A book's codes (B, N, ``dim``) to a vision model's class token (B, ``out``)."""

    def __init__(self, dim: int, width: int, out: int, tokens: int, depth: int, heads: int) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.Linear(dim, width), nn.GELU())
        self.class_token = nn.Parameter(0.02 * torch.randn(1, width))
        self.body = Transformer(width, width, out, tokens + 1, depth, heads)

    def forward(self, z: Tensor) -> Tensor:
        found: Tensor = self.body(torch.cat([self.class_token.expand(len(z), 1, -1), self.up(z)], 1))
        return found[:, 0]


class FQGANNetwork(Tokenizer):
    """The tokenizer. ``teachers`` (frozen, with their class tokens, not saved) are those of the last books."""

    bottleneck: Product

    def __init__(self, recipe: FQGAN, teachers: Sequence[FrozenVision] = ()) -> None:
        super().__init__()
        told = recipe.teacher_dims
        if len(told) > recipe.books:
            raise ValueError(f"teacher_dims: got {len(told)}, must be at most one for each of the {recipe.books} books")
        if teachers and tuple(t.dim for t in teachers) != tuple(told):
            raise ValueError(f"teachers: have {[t.dim for t in teachers]} channels, must have teacher_dims, {told}")
        self.recipe, self.image, self._teachers = recipe, recipe.image, tuple(teachers)
        self.encoder = ConvEncoder(recipe.adapter_width, recipe.width, recipe.mults, recipe.blocks)
        side = recipe.image // self.encoder.factor
        self.grid = (side, side)
        hidden, dim, width = recipe.latent, recipe.dim, recipe.adapter_width
        self.adapters = nn.ModuleList(
            Adapter(width, hidden, dim, side**2, recipe.adapter_depth, recipe.heads) for _ in range(recipe.books)
        )
        how = dict(norm="both", entropy=recipe.entropy, restart_after=recipe.restart_after)
        books = [VectorQuantizer(recipe.codes, dim, **how) for _ in range(recipe.books)]  # type: ignore[arg-type]
        self.bottleneck = Product(books, disentangle=recipe.disentangle)
        self.readers = nn.ModuleList(
            ClassReader(dim, recipe.reader[0], out, side**2, recipe.reader[1], recipe.heads) for out in told
        )
        self.up = nn.Conv2d(recipe.books * dim, hidden, 1)
        self.decoder = ConvDecoder(hidden, recipe.width, recipe.mults, recipe.blocks)

    @property
    def tokens(self) -> int:
        assert self.grid is not None
        return self.grid[0] * self.grid[1]

    def latents(self, images: Tensor) -> Tensor:
        seen = self.encoder(2 * images - 1)
        return torch.cat([adapter(seen) for adapter in self.adapters], -1)

    def semantic(self, z: Tensor) -> Tensor:
        """(B, N, dim): the last book's part of codes ``z``."""
        return z[..., -self.recipe.dim :]

    def render(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        assert self.grid is not None
        return (self.decoder(self.up(laid(z, self.grid))) + 1) / 2

    def classes(self, z: Tensor) -> list[Tensor]:
        """What the supervised books say of each teacher's class token, (B, D) each."""
        parts = z.to(self.dtype).split(self.recipe.dim, -1)[self.recipe.books - len(self.readers) :]
        return [reader(part) for reader, part in zip(self.readers, parts, strict=True)]

    def objective(self, images: Tensor) -> Tensor:
        """Squared error of pixels, the bottleneck's losses, and 1 - cosine to each teacher's class token."""
        made, codes = self(images)
        loss = pixel(made, images) + codes.loss
        assert codes.z is not None
        for teacher, found in zip(self._teachers, self.classes(codes.z) if self._teachers else (), strict=True):
            loss = loss + self.recipe.semantic_weight * distillation(found, teacher(images)[:, 0])
        return loss


@dataclass(frozen=True)
class FQGAN:
    """A tokenizer by its sizes; the defaults are the dual one with 16 px a token."""

    books: int = 2
    """Ids of a token: 2 or 3; 1 is a plain VQGAN."""
    codes: int = 16384
    """Codes of each book."""
    dim: int = 8
    """Channels of a code."""
    image: int = 256
    """Side of a picture in pixels."""
    teacher_dims: tuple[int, ...] = (1024,)
    """Channels of the teachers' class tokens, for the last books: CLIP-L; of three books (384, 1024), DINO and CLIP."""
    semantic_weight: float = 0.5
    """Weight of the distance from a teacher."""
    disentangle: float = 0.1
    """Weight of the squared cosine between the books' results."""
    entropy: float = 0.03
    """Weight of the entropy regulariser."""
    width: int = 128
    """Channels of encoder and decoder at full resolution."""
    mults: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Times as many at each level; four levels (1, 2, 2, 4) make 8 px a token."""
    blocks: int = 2
    """Residual blocks of a level of the encoder."""
    adapter_width: int = 512
    """Channels of the map that the adapters take."""
    adapter_depth: int = 6
    """Blocks of an adapter."""
    latent: int = 256
    """Channels before a book and before the pixel decoder."""
    reader: tuple[int, int] = (1024, 3)
    """Width and blocks of what reads a class token from codes."""
    heads: int = 8
    """Heads of adapters and readers."""
    restart_after: int | None = 100
    """Training steps after which an unused code is put back into use; None: never."""

    def build(self, teachers: Sequence[FrozenVision] = ()) -> FQGANNetwork:
        """An untrained tokenizer; without ``teachers`` it learns from pixels alone. They are not saved."""
        return FQGANNetwork(self, teachers)


def claim(trial: TokenizeTrial, steps: int = 100, codes: int = 64) -> Outcome:
    """Objects read out of the semantic book of two, against one book of as many bits (see ``compared``).

    The one book has codes^2 codes of twice the channels, and one adapter; it, too, learns the class token of the zoo's
    vision transformer, and its vectors are what is read.
    """
    small = dict(width=16, mults=(1, 2, 4), blocks=1, adapter_width=64, adapter_depth=1, latent=32, heads=4)
    two = FQGAN(2, codes, 8, trial.size, (96,), reader=(64, 1), restart_after=20, **small)  # type: ignore[arg-type]
    one = replace(two, books=1, codes=codes**2, dim=16)
    teachers = [trial.vision(prefix=True)]
    return compared(trial, lambda: one.build(teachers), lambda: two.build(teachers), steps)
