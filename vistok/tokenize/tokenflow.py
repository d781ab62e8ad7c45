"""TokenFlow: two codebooks that share their ids, so that one token tells what is there and how it looks.

What: a vision transformer's features and a convolutional encoder's map, side by side on one grid; the id of a place is
the row whose distance in both tables together is least. Coded at several scales, coarse to fine. One decoder gives the
features back from the semantic half, another the pixels from the pixel half. Source: Qu et al., arXiv 2412.03069;
ByteFlow-AI/TokenFlow.

Each half is scaled to length 1 at every scale, as in the released code (the only branch of it that runs), so that what
is left over does not vanish. With a teacher the vision model's blocks learn, all but the last, as published; without
one it stays frozen and is its own teacher. Perceptual and adversarial losses are the trainer's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.core.losses import distillation, pixel
from vistok.parts.conv import ConvDecoder, ConvEncoder
from vistok.parts.quantize import MultiScale, VectorQuantizer
from vistok.parts.tokenizer import Tokenizer
from vistok.parts.vision import FrozenVision
from vistok.tokenize._dual import Transformer, bent, compared, hidden, laid, rows, tuned

CARD = Card(
    title="TokenFlow: Unified Image Tokenizer for Multimodal Understanding and Generation",
    kind="trained",
    site="pixels to discrete tokens of several scales, whose codes have a semantic and a pixel half, and back",
    paper="Qu et al., 2024, arXiv 2412.03069",
    repository="ByteFlow-AI/TokenFlow",
    needs=("features of a vision transformer",),
    mechanism=("transformation",),
    merge="area averages to coarser scales",
    claim="Two codebooks with one id tell more of what a picture shows than one that does both, at equal fidelity.",
)


class TokenFlowNetwork(Tokenizer):
    """The tokenizer; ``recipe`` has its hyper-parameters. ``teacher`` (frozen, not saved) lets ``vision`` learn.

    ``together``: one table on the pixel encoder's map alone, from which both decoders read: what the claim is held
    against.
    """

    def __init__(
        self, recipe: TokenFlow, vision: FrozenVision, teacher: FrozenVision | None = None, together: bool = False
    ) -> None:
        super().__init__()
        self.recipe, self.image, self.grid, self.together = recipe, recipe.image, vision.grid, together
        if recipe.scales[-1:] * 2 != self.grid:
            raise ValueError(f"scales: got {recipe.scales}, must end with the grid of the vision model, {self.grid}")
        layers = len(vision.model.blocks) - 1
        self.vision = vision if teacher is None else tuned(vision, layers)
        self._teacher, self.layer = (teacher or vision,), layers
        parts = (recipe.semantic_dim, recipe.pixel_dim)
        total = sum(parts)
        semantic, detail = (total, total) if together else parts
        self.encoder = ConvEncoder(recipe.latent, recipe.width, recipe.mults, recipe.blocks)
        self.down = nn.Conv2d(recipe.latent, detail, 1)
        self.project = None if together else bent(vision.dim, semantic)
        table = VectorQuantizer(
            recipe.codes,
            total,
            norm="both",
            parts=(total,) if together else parts,
            weights=() if together else (1.0, recipe.pixel_weight),
            restart_after=recipe.restart_after,
        )
        self.bottleneck: MultiScale = MultiScale(table, recipe.scales, gradient="each", drop=recipe.drop)
        places = vision.grid[0] ** 2
        heads = max(1, vision.dim // 64)
        self.feature_decoder = Transformer(semantic, vision.dim, vision.dim, places, recipe.feature_depth, heads)
        self.feature_head = bent(vision.dim, vision.dim)
        self.up = nn.Conv2d(detail, recipe.latent, 1)
        self.decoder = ConvDecoder(recipe.latent, recipe.decoder[0], recipe.mults, recipe.decoder[1])

    @property
    def tokens(self) -> int:
        """Vectors of the finest scale; ids are those of all scales."""
        return self.bottleneck.lengths[-1]

    def semantic(self, z: Tensor) -> Tensor:
        """(B, N, C): the semantic half of codes ``z``, what a language model is given."""
        return z if self.together else z[..., : self.recipe.semantic_dim]

    def detail(self, z: Tensor) -> Tensor:
        """(B, N, C): the pixel half of codes ``z``."""
        return z if self.together else z[..., self.recipe.semantic_dim :]

    def features(self, z: Tensor) -> Tensor:
        """(B, N, D): the vision model's features, of codes ``z``."""
        return self.feature_head(self.feature_decoder(self.semantic(z).to(self.dtype)))

    def latents(self, images: Tensor) -> Tensor:
        return self.joined(images, self.seen(images))

    def seen(self, images: Tensor) -> Tensor | None:
        """(B, N, D): what the vision model says of ``images``; None where its side has no codes."""
        return None if self.together else hidden(self.vision, images, [self.layer])[0]

    def joined(self, images: Tensor, seen: Tensor | None) -> Tensor:
        """(B, N, C): the two halves of the latents, of ``images`` and what is ``seen`` in them."""
        side = self.tokens_side * self.encoder.factor
        fine = rows(self.down(self.encoder(2 * _resized(images.to(self.dtype), side) - 1)))
        if self.project is None or seen is None:
            return fine
        return torch.cat([self.project(seen.to(fine.dtype)), fine], -1)

    def render(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        made = self.decoder(self.up(laid(self.detail(z), (self.tokens_side,) * 2)))
        return (_resized(made, self.recipe.image) + 1) / 2

    def objective(self, images: Tensor) -> Tensor:
        """Squared error of pixels, distance from the teacher's features by cosine, and the bottleneck's losses."""
        seen = self.seen(images)
        codes = self.bottleneck(self.joined(images, seen), grid=self.grid)
        made = self.render_codes(codes)
        assert codes.z is not None
        with torch.no_grad():
            (teacher,) = self._teacher
            known = seen if teacher is self.vision else None
            wanted = hidden(teacher, images, [self.layer])[0] if known is None else known
        return pixel(made, images) + distillation(self.features(codes.z), wanted) + codes.loss

    @property
    def tokens_side(self) -> int:
        """Rows of the finest scale."""
        return self.bottleneck.scales[-1]


def _resized(x: Tensor, side: int) -> Tensor:
    """Pictures (B, 3, S, S) of another side, bicubic; in float32 between, as a CPU has no other."""
    if x.shape[2] == side:
        return x
    return interpolate(x.float(), (side, side), mode="bicubic", antialias=True).to(x.dtype)


@dataclass(frozen=True)
class TokenFlow:
    """A tokenizer by its sizes; the defaults are those for CLIP-B at 224 px."""

    image: int = 224
    """Side of a picture in pixels."""
    codes: int = 32768
    """Rows of the two tables."""
    semantic_dim: int = 32
    """Channels of the semantic table."""
    pixel_dim: int = 8
    """Channels of the pixel table."""
    pixel_weight: float = 1.0
    """Weight of the pixel half's squared distance; the semantic half's is 1."""
    scales: tuple[int, ...] = (1, 2, 4, 6, 8, 10, 12, 14)
    """Rows of each scale's square map, coarse to fine; the last is the vision model's."""
    drop: float = 0.1
    """Probability that a training step leaves out one scale other than the first."""
    vision: str = "vit_base_patch16_clip_224"
    """The vision transformer, by its name in timm."""
    vision_arguments: dict[str, Any] | None = None
    """What timm is told besides, e.g. {"img_size": 32}."""
    feature_depth: int = 3
    """Blocks of the decoder that gives its features back."""
    width: int = 128
    """Channels of the convolutional encoder at full resolution."""
    mults: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Times as many at each level; the last is the grid's."""
    blocks: int = 2
    """Residual blocks of a level of the encoder."""
    latent: int = 256
    """Channels that the encoder gives and the decoder takes."""
    decoder: tuple[int, int] = (128, 2)
    """Channels and residual blocks of the pixel decoder; the enhanced one has (256, 4)."""
    restart_after: int | None = 100
    """Training steps after which an unused code is put back into use; None: never."""

    def build(self, vision: FrozenVision | None = None, teacher: FrozenVision | None = None) -> TokenFlowNetwork:
        """An untrained tokenizer; ``vision`` in place of the named one, which learns if there is a ``teacher``."""
        return TokenFlowNetwork(self, vision or FrozenVision.of(self.vision, **self.vision_arguments or {}), teacher)


_TRIED: dict[str, Any] = dict(
    scales=(1, 2, 4, 8, 12), semantic_dim=8, drop=0.0, feature_depth=1, width=16, mults=(1, 2, 4), blocks=1, latent=32
)


def claim(trial: TokenizeTrial, steps: int = 100, codes: int = 512) -> Outcome:
    """Objects read out of the semantic half, against one table that does both (see ``compared``).

    The zoo's frozen vision transformer is encoder and teacher; the one table is on the pixel encoder's map, as wide as
    both halves. Same scales, ids and decoders.
    """
    recipe = TokenFlow(trial.size, codes, restart_after=20, decoder=(16, 1), **_TRIED)
    vision = trial.vision()
    build = partial(TokenFlowNetwork, recipe, vision)
    return compared(trial, partial(build, together=True), build, steps)
