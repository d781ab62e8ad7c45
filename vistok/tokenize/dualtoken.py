"""DualToken: pixels from a shallow layer of a vision transformer, meaning from a deep one, each with its own codes.

What: the outputs of two layers go through attention projections to narrow vectors, each to a residual stack of codes
that share one table. The pixel side takes a still shallower layer along. The deep layer's codes, projected back by
causal attention, take its place in the transformer, whose last layers and pooling run on; the shallow layer's go to a
convolutional decoder. Source: Song et al., arXiv 2503.14324; songweii/DualToken.

The transformer learns if there is a teacher, its own copy at the start; without one it stays frozen and is its own
teacher. A transformer without attention pooling (the paper's SigLIP2 has it) is pooled by the mean over patches, and a
class token ends where the codes begin. Adversarial (from stage 1) and perceptual losses are the trainer's.

Departures: tables are renewed at the beginning of a step, by averages that begin at one hit a code and by restarts;
the released ones between depths, and their averages begin at 0: the first step replaces codes of fewer than 100 hits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.core.losses import distillation, pixel
from vistok.parts.conv import ConvDecoder, ResidualBlock
from vistok.parts.projection import AttentionProjection
from vistok.parts.quantize import EMAQuantizer, Product, Residual
from vistok.parts.tokenizer import Tokenizer
from vistok.parts.vision import FrozenVision
from vistok.tokenize._dual import compared, hidden, laid, tuned

CARD = Card(
    title="DualToken: Towards Unifying Visual Understanding and Generation with Dual Visual Vocabularies",
    kind="trained",
    site="a shallow and a deep layer of a vision transformer to two stacks of residual codes, and back",
    paper="Song et al., 2025, arXiv 2503.14324",
    repository="songweii/DualToken",
    needs=("layers of a vision transformer",),
    mechanism=("transformation",),
    claim="Two vocabularies tell more of what a picture shows than one of as many bits, at equal fidelity.",
    departures=("the released tables are renewed between the depths of one forward, so that depth 2 sees a new one",),
)


class DualTokenNetwork(Tokenizer):
    """The tokenizer; ``recipe`` has its hyper-parameters. ``teacher`` (frozen, not saved) lets ``vision`` learn.

    ``together``: one stack, twice as deep and wide, of the sum of all projections, which both sides read: what the
    claim is held against.
    """

    bottleneck: Product

    def __init__(
        self, recipe: DualToken, vision: FrozenVision, teacher: FrozenVision | None = None, together: bool = False
    ) -> None:
        super().__init__()
        self.recipe, self.image, self.grid, self.together = recipe, recipe.image, vision.grid, together
        self.vision = vision if teacher is None else tuned(vision)
        self._teacher = (teacher or vision,)
        dim, depth = (2 * recipe.dim, 2 * recipe.depth) if together else (recipe.dim, recipe.depth)
        names = ("semantic", "pixel", "shortcut")
        self.layers = (recipe.layer_semantic, recipe.layer_pixel, recipe.layer_shortcut)
        self.downs = nn.ModuleDict(
            {name: AttentionProjection(vision.dim, dim, recipe.heads, causal=False) for name in names}
        )
        self.ups = nn.ModuleDict({name: AttentionProjection(dim, vision.dim, recipe.heads) for name in names[:2]})
        stacks = [
            Residual([EMAQuantizer(recipe.codes, dim, commitment=5.0, restart_after=recipe.restart_after)], depth)
            for _ in range(1 if together else 2)
        ]
        self.bottleneck = Product(stacks)
        self.widen = ResidualBlock(vision.dim, recipe.latent)
        self.decoder = ConvDecoder(recipe.latent, recipe.width, recipe.mults, recipe.blocks)

    @property
    def tokens(self) -> int:
        return self.vision.grid[0] * self.vision.grid[1]

    def latents(self, images: Tensor) -> Tensor:
        return self.narrowed(hidden(self.vision, images, self.layers))

    def narrowed(self, taps: list[Tensor]) -> Tensor:
        """(B, N, C): the latents, of the outputs of the deep, the shallow and the shallower layer."""
        deep, shallow, shallower = (x.to(self.dtype) for x in taps)
        meaning = self.downs["semantic"](deep)
        looks = self.downs["pixel"](shallow) + self.recipe.weight_shortcut * self.downs["shortcut"](shallower)
        return meaning + looks if self.together else torch.cat([meaning, looks], -1)

    def semantic(self, z: Tensor) -> Tensor:
        """(B, N, dim): the deep layer's codes of ``z``."""
        return z if self.together else z[..., : self.recipe.dim]

    def detail(self, z: Tensor) -> Tensor:
        """(B, N, dim): the shallow layer's codes of ``z``."""
        return z if self.together else z[..., self.recipe.dim :]

    def features(self, z: Tensor) -> Tensor:
        """(B, N, D): the deep layer's output, of codes ``z``."""
        return self.ups["semantic"](self.semantic(z).to(self.dtype))

    def pooled(self, features: Tensor) -> Tensor:
        """(B, D): what the transformer says of the picture, of the deep layer's output."""
        return pooled(self.vision, features, self.layers[0])

    def render(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        seen = laid(self.ups["pixel"](self.detail(z)), self.vision.grid)
        side = self.recipe.image // 2 ** (len(self.recipe.mults) - 1)
        if seen.shape[2:] != (side, side):
            seen = interpolate(seen, (side, side), mode="bilinear")
        return (self.decoder(self.widen(seen)) + 1) / 2

    def objective(self, images: Tensor) -> Tensor:
        """5 times squared error of pixels and distance to the teacher, and the bottleneck's losses.

        The distance (square and cosine) is of what is pooled in stage 0, of the deep layer's output in stage 1, where
        that of the pooled is added.
        """
        taps = hidden(self.vision, images, self.layers)
        codes = self.bottleneck(self.narrowed(taps), grid=self.grid)
        made = self.render_codes(codes)
        assert codes.z is not None
        features = self.features(codes.z)
        with torch.no_grad():
            (teacher,), layer = self._teacher, self.layers[0]
            wanted = taps[0] if teacher is self.vision else hidden(teacher, images, [layer])[0]
            goal = pooled(teacher, wanted, layer)
        whole = distillation(self.pooled(features), goal, "both")
        away = 5 * whole if self.recipe.stage == 0 else 5 * distillation(features, wanted, "both") + whole
        return 5 * pixel(made, images) + away + codes.loss


def pooled(vision: FrozenVision, x: Tensor, layer: int) -> Tensor:
    """(B, D): the output of ``vision`` of its patch features ``x`` (B, N, D) behind ``layer`` (1, 2, ...)."""
    model = vision.model
    for block in model.blocks[layer:]:
        x = block(x)
    x = model.norm(x)
    return model.fc_norm(x.mean(1) if model.attn_pool is None else model.attn_pool(x))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class DualToken:
    """A tokenizer by its sizes; the defaults are those for 256 px."""

    image: int = 256
    """Side of a picture in pixels."""
    vision: str = "vit_so400m_patch16_siglip_256"
    """The vision transformer, by its name in timm."""
    vision_arguments: dict[str, Any] | None = None
    """What timm is told besides, e.g. {"img_size": 32}."""
    layer_semantic: int = 26
    """The layer whose output is the semantic side's; the first is 1."""
    layer_pixel: int = 6
    """That of the pixel side."""
    layer_shortcut: int = 4
    """The layer that the pixel side takes along."""
    weight_shortcut: float = 0.6
    """With this weight."""
    depth: int = 4
    """Codes of a place, on each side; 8 at 384 px."""
    codes: int = 16384
    """Codes of each side's table, which its depths share."""
    dim: int = 32
    """Channels of a code."""
    heads: int = 36
    """Heads of the projections."""
    latent: int = 1024
    """Channels that the pixel decoder takes."""
    width: int = 128
    """Channels of the pixel decoder at full resolution."""
    mults: tuple[int, ...] = (1, 1, 4, 4, 8)
    """Times as many at each level."""
    blocks: int = 2
    """Residual blocks of a level, less one."""
    stage: Literal[0, 1] = 1
    """Of training: whether the pooled output alone is held to the teacher (0), or the layer's as well (1)."""
    restart_after: int | None = 100
    """Training steps after which an unused code is put back into use; None: never."""

    def build(self, vision: FrozenVision | None = None, teacher: FrozenVision | None = None) -> DualTokenNetwork:
        """An untrained tokenizer; ``vision`` in place of the named one, which learns if there is a ``teacher``."""
        if self.stage not in (0, 1):
            raise ValueError(f"stage: got {self.stage}, must be 0 or 1")
        return DualTokenNetwork(self, vision or FrozenVision.of(self.vision, **self.vision_arguments or {}), teacher)


def claim(trial: TokenizeTrial, steps: int = 100, codes: int = 256) -> Outcome:
    """Objects read out of the semantic stack, against one stack of as many bits that does both (see ``compared``).

    On the zoo's frozen vision transformer, layers 11, 3 and 2 of 12; the one stack codes the sum of the projections.
    """
    recipe = DualToken(trial.size, "", None, 11, 3, 2, 0.6, 2, codes, 16, 6, 64, 16, (1, 2, 4), 1, 1, 20)
    vision = trial.vision()
    build = partial(DualTokenNetwork, recipe, vision)
    return compared(trial, partial(build, together=True), build, steps)
