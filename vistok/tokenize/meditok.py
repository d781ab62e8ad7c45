"""MedITok: tokens of medical pictures, held first to a vision encoder and then to a text encoder.

What: encoder, causal attention projection to 64 channels, eight books of 8 channels each on the sphere, projection
back, decoder. A head on the quantised tokens gives one vector for the picture, which contrast and cosine hold to a
target: of the same picture from a frozen vision encoder in the first stage, of its caption from a medical text encoder
in the second. The architecture is UniTok's; the order of the two constraints is what is new. Source: Ma et al., arXiv
2505.19225; Masaaki-75/meditok.

    first stage:   loss = model.objective(pictures)                with build(teacher=...)
    second stage:  loss = model.aligned(pictures, text vectors)    of the model that the first stage left

Departures: the encoder is VQGAN's convolutions followed by plain transformer blocks, and the decoder its mirror, where
the released ones are ViTamin's hybrids. The weights of contrast and cosine in each stage are unknown: 1 here.
Perceptual and adversarial losses (a discriminator on DINO's features) and the entropy term (weight 0) are left to the
trainer. CT slices: ``vistok.world.phantoms`` windows them after they are read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import normalize

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.core.losses import distillation, info_nce, pixel
from vistok.parts.conv import ConvDecoder, ConvEncoder
from vistok.parts.projection import AttentionProjection
from vistok.parts.quantize import Product, VectorQuantizer
from vistok.parts.tokenizer import Tokenizer
from vistok.parts.vision import FrozenVision
from vistok.tokenize._dual import laid, rows
from vistok.tokenize._phantoms import read_out, slices
from vistok.world.phantoms import FINDINGS, WINDOWS

CARD = Card(
    title="MedITok: A Unified Tokenizer for Medical Image Synthesis and Interpretation",
    kind="trained",
    site="pixels to tokens on a grid with an id in each of eight books, and back",
    paper="Ma et al., 2025, arXiv 2505.19225",
    repository="Masaaki-75/meditok",
    needs=("vectors of a frozen vision encoder and of a text encoder, in training",),
    mechanism=("transformation",),
    claim="Held to a vision encoder first and to text then, tokens tell more of the finding than held to text alone.",
)

WARMEST = math.log(100)


class MedITokNetwork(Tokenizer):
    """The tokenizer; ``recipe`` has its hyper-parameters. ``teacher`` (frozen, not saved): of the first stage."""

    bottleneck: Product

    def __init__(self, recipe: MedITok, teacher: FrozenVision | None = None) -> None:
        super().__init__()
        books, width = recipe.num_codebooks, recipe.width
        if recipe.dim % books or recipe.vocab_size % books:
            told = f"{recipe.dim} channels and the {recipe.vocab_size} codes"
            raise ValueError(f"num_codebooks: got {books}, must divide the {told}")
        if teacher is not None and teacher.dim != recipe.embed:
            raise ValueError(f"teacher: has features of {teacher.dim} channels, must have embed, {recipe.embed}")
        self.recipe, self.image, self._teacher = recipe, recipe.image, () if teacher is None else (teacher,)
        norm = partial(nn.LayerNorm, eps=1e-6)

        def blocks() -> nn.Sequential:
            each = (Block(width, recipe.heads, 4.0, qkv_bias=True, norm_layer=norm) for _ in range(recipe.depth))
            return nn.Sequential(*each, norm(width))

        self.stem = ConvEncoder(width, recipe.stem, recipe.mults, recipe.blocks, attention=False)
        side = recipe.image // self.stem.factor
        self.grid = (side, side)
        self.encoder, self.decoder = blocks(), blocks()
        self.down = AttentionProjection(width, recipe.dim, recipe.heads)
        self.up = AttentionProjection(recipe.dim, width, recipe.heads)
        how: dict[str, Any] = dict(norm="both", restart_after=recipe.restart_after)
        each = [VectorQuantizer(recipe.vocab_size // books, recipe.dim // books, **how) for _ in range(books)]
        self.bottleneck = Product(each, reduce="mean")
        self.painter = ConvDecoder(width, recipe.stem, recipe.mults, recipe.blocks, attention=False)
        if recipe.embed:
            self.head = nn.Sequential(norm(width), nn.Linear(width, recipe.embed))
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def tokens(self) -> int:
        assert self.grid is not None
        return self.grid[0] * self.grid[1]

    def latents(self, images: Tensor) -> Tensor:
        return self.down(self.encoder(rows(self.stem(2 * images - 1))))

    def render(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        assert self.grid is not None
        return (self.painter(laid(self.decoder(self.up(z)), self.grid)) + 1) / 2

    def embed(self, z: Tensor) -> Tensor:
        """(B, embed) of length 1: the picture as one vector, from its quantised tokens ``z`` (B, N, dim)."""
        if not self.recipe.embed:
            raise ValueError("embed: got 0 in the recipe, must be the channels of the targets")
        return normalize(self.head(self.up(z.to(self.dtype)).mean(1)).float(), dim=-1)

    def aligned(self, images: Tensor, target: Tensor) -> Tensor:
        """Pixels' errors, the books' losses, and how far ``embed`` is from ``target`` (B, embed), a scalar.

        ``target``, which gets no gradient, is the vision encoder's (first stage) or the text encoder's (second).
        """
        made, codes = self(images)
        assert codes.z is not None
        found, recipe = self.embed(codes.z), self.recipe
        scale = self.logit_scale.clamp(max=WARMEST).exp()
        near = recipe.contrast * info_nce(found, target.detach(), scale) + recipe.cosine * distillation(found, target)
        return 0.2 * pixel(made, images, "l1") + pixel(made, images) + codes.loss + near

    def objective(self, images: Tensor) -> Tensor:
        """The first stage with a teacher, whose features are averaged over patches; without one, pixels alone."""
        for teacher in self._teacher:
            with torch.no_grad():
                target = teacher(images).mean(1)
            return self.aligned(images, target)
        made, codes = self(images)
        return 0.2 * pixel(made, images, "l1") + pixel(made, images) + codes.loss


@dataclass(frozen=True)
class MedITok:
    """A tokenizer by its sizes."""

    image: int = 256
    """Side of a picture in pixels."""
    vocab_size: int = 32768
    """Codes of all books together."""
    num_codebooks: int = 8
    """Books: ids of a token."""
    dim: int = 64
    """Channels of a token, shared out among the books."""
    width: int = 1024
    """Channels of the transformers."""
    depth: int = 14
    """Blocks of each of them."""
    heads: int = 16
    """Heads of the blocks and of the attention projections."""
    stem: int = 128
    """Channels of the convolutions at full resolution."""
    mults: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Times as many at each level."""
    blocks: int = 1
    """Residual blocks of a level."""
    embed: int = 768
    """Channels of the targets; 0: no head, and pixels alone."""
    contrast: float = 1.0
    """Weight of InfoNCE to the targets of the batch."""
    cosine: float = 1.0
    """Weight of 1 - cosine to a picture's own target."""
    restart_after: int | None = 100
    """Training steps after which an unused code is put back into use; None: never."""

    def build(self, teacher: FrozenVision | None = None) -> MedITokNetwork:
        """An untrained tokenizer; ``teacher`` is used in training, and not saved. ValueError for sizes that clash."""
        return MedITokNetwork(self, teacher)


def claim(trial: TokenizeTrial, steps: int = 160) -> Outcome:
    """Findings read out of the tokens of CT phantoms: held to text for all steps, and to the zoo's encoder for half.

    The second half of the steps of two stages is the text's. A text encoder's stand-in gives each finding and window a
    vector of its own. Holds if two stages are better by 5 points and lose 0.5 dB of PSNR at most.
    """
    recipe = MedITok(trial.size, 1024, 4, 16, 96, 2, 6, 16, (1, 2, 4), 1, 96, restart_after=20)
    windows = len(WINDOWS)
    text = torch.randn(len(FINDINGS), windows, 96, generator=torch.Generator().manual_seed(trial.seed))
    found = []
    for first in (0, steps // 2):
        torch.manual_seed(trial.seed)
        model = recipe.build(trial.vision() if first else None)
        done = 0

        def loss(model: MedITokNetwork, images: Tensor, label: Tensor, first: int = first) -> Tensor:
            nonlocal done
            start, done = done * len(images), done + 1
            x, y = slices(start, len(images), trial.size)
            if done <= first:
                return model.objective(x)
            return model.aligned(x, text[y, (start + torch.arange(len(x))) % windows])

        trial.fit(model, steps, batch_size=16, loss=loss)

        def features(z: Tensor, model: MedITokNetwork = model) -> Tensor:
            return model.up(z).mean(1)

        found.append(read_out(model, features, trial.pictures, trial.size))
    (one, fidelity), (two, other) = found
    told = f"PSNR {fidelity:.2f} and {other:.2f} dB"
    return Outcome("findings read out of tokens", one, two, two >= one + 0.05 and other >= fidelity - 0.5, told)
