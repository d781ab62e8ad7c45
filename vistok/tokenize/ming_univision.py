"""Ming-UniVision: compact continuous latents that a causal decoder expands into features, from which pixels are drawn.

What: a ViT makes latents of few channels; a causal transformer with a cache expands them into wide semantic features,
token by token if need be; a pixel decoder turns each feature into a few finer tokens and those into pixels. A language
model that generates predicts the next latent by a flow head and is fed the expanded feature, not the latent.
Source: Ming-UniVision; inclusionAI/Ming-UniVision (inference).

The training is from memory and unverified: pixels, and semantic features aligned to a frozen teacher's
(``build(teacher=...)``), both while a share of the latents, drawn for each picture, is masked. Depths are chosen here.
The published pixel decoder runs in float32; here it has the model's dtype. How the head's rows are guided is said by
what it is given (the released code infers it from a batch of 2 or 3), and a velocity of length 0 stays so under
``renorm`` (the released code divides by it).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.core.codes import Codes
from vistok.core.losses import pixel
from vistok.parts.diffusion_transformer import grid_sinusoids
from vistok.parts.flow_decoder import Alignment, checked_teacher
from vistok.parts.flow_head import LatentHead
from vistok.parts.quantize import Identity
from vistok.parts.tokenizer import Tokenizer
from vistok.parts.vision import FrozenVision
from vistok.tokenize._semantic import Past, PixelDecoder, SemanticDecoder

CARD = Card(
    title="Ming-UniVision: Joint Image Understanding and Generation with a Unified Continuous Tokenizer",
    kind="trained",
    site="pixels to a grid of continuous latents, to semantic features, to pixels; a flow head on a language model",
    paper="Ming-UniVision: Joint Image Understanding and Generation with a Unified Continuous Tokenizer",
    repository="inclusionAI/Ming-UniVision",
    mechanism=("transformation",),
    claim="Compact latents expand into features that name objects better than the latents do, and still give pixels.",
    departures=(
        "the released head guesses from a batch of 2 or 3 rows that it is to guide; here it is given the conditions",
        "the released head divides by the length of a velocity that may be 0",
    ),
)

SIZES = {"T": (96, 3, 3, 3, 3), "L": (1024, 24, 24, 24, 16)}
"""Width, blocks of encoder, semantic and pixel decoder, and heads; T is this project's."""


class MingTokNetwork(Tokenizer):
    """The tokenizer; ``recipe`` has its hyper-parameters. Its codes are latents, less ``mean``, over ``scale``."""

    mean: Tensor
    scale: Tensor

    def __init__(self, recipe: MingUniVision, teacher: FrozenVision | None = None) -> None:
        super().__init__()
        self.recipe, self.image, side = recipe, recipe.image, recipe.image // recipe.patch
        self.grid = (side, side)
        width, low, semantic, fine, heads = SIZES[recipe.size]
        self.embed = nn.Conv2d(3, width, recipe.patch, recipe.patch)
        self.blocks = nn.ModuleList(Block(width, heads, 4.0, qkv_bias=True) for _ in range(low))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, recipe.dim)
        self.bottleneck: Identity = Identity(recipe.dim)
        self.masked = nn.Parameter(0.02 * torch.randn(recipe.dim))
        self.semantic = SemanticDecoder(recipe.dim, width, semantic, heads)
        self.drawer = PixelDecoder(width, fine, heads, recipe.patch, recipe.finer)
        self._teacher = checked_teacher(teacher, recipe.teacher_dim)
        self.alignment = Alignment(width, recipe.teacher_dim) if recipe.teacher_dim else None
        self.register_buffer("mean", torch.zeros(recipe.dim))
        self.register_buffer("scale", torch.ones(()))

    @property
    def tokens(self) -> int:
        assert self.grid is not None
        return self.grid[0] * self.grid[1]

    def latents(self, images: Tensor) -> Tensor:
        assert self.grid is not None
        x = self.embed(2 * images - 1).flatten(2).transpose(1, 2)
        x = x + grid_sinusoids(self.grid, x.shape[2], x.device).to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return (self.out(self.norm(x)) - self.mean) / self.scale

    @torch.no_grad()
    def measure(self, images: Tensor) -> None:
        """Set ``mean`` and ``scale`` so that latents of ``images`` are centred and of standard deviation 1."""
        z = self.latents(images) * self.scale + self.mean
        self.mean.copy_(z.mean((0, 1)))
        self.scale.copy_((z - self.mean).square().mean().sqrt())

    def expand(self, latents: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        """Semantic features (B, M, width) of normalised latents (B, M, dim), and the cache to go on from."""
        return self.semantic(latents * self.scale + self.mean, past)

    def to_pixels(self, features: Tensor) -> Tensor:
        """(B, 3, H, W): pictures of all tokens' semantic features (B, N, width), not clamped."""
        assert self.grid is not None
        return (self.drawer(features, self.grid) + 1) / 2

    def render(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.to_pixels(self.expand(z)[0])

    def objective(self, images: Tensor) -> Tensor:
        """Errors of pixels, and the features' distance from a teacher, with a share of the latents masked."""
        codes: Codes = self.encode(images)
        assert codes.z is not None and self.grid is not None
        share = self.recipe.mask_ratio * torch.rand(len(images), 1)
        gone = (torch.rand(codes.z.shape[:2]) < share).to(images.device)
        features, _ = self.expand(torch.where(gone[..., None], self.masked, codes.z.to(self.dtype)))
        made = self.to_pixels(features)
        loss = pixel(made, images, "l1") + pixel(made, images)
        if self.alignment is not None:
            for teacher in self._teacher:
                loss = loss + self.alignment(features, teacher(images), self.grid, teacher.grid)
        return loss


@torch.no_grad()
def generate(
    model: MingTokNetwork, head: LatentHead, hidden: Callable[[Tensor | None], Tensor], **how: Any
) -> tuple[Tensor, Tensor]:
    """All latents (B, N, dim) and their semantic features (B, N, width), one after another.

    ``hidden``: the language model, given the last feature (B, width), None at first, to the head's condition (B, cond).
    ``how``: of ``LatentHead.sample``.
    """
    found, feature, past = [], None, None
    for _ in range(model.tokens):
        latent = head.sample(hidden(feature), **how)
        features, past = model.expand(latent[:, None].to(model.dtype), past)
        feature = features[:, 0]
        found.append((latent, feature))
    return torch.stack([latent for latent, _ in found], 1), torch.stack([feature for _, feature in found], 1)


@dataclass(frozen=True)
class MingUniVision:
    """The tokenizer by its size, and its flow head."""

    size: Literal["T", "L"] = "L"
    """Width, blocks and heads: see ``SIZES``."""
    image: int = 512
    """Side of a picture in pixels."""
    patch: int = 32
    """Side of a token's patch in pixels."""
    finer: int = 2
    """Into how many tokens the pixel decoder splits each, along a side."""
    dim: int = 32
    """Channels of a latent."""
    mask_ratio: float = 0.5
    """Largest share of a picture's latents that training masks."""
    teacher_dim: int = 1024
    """Channels of the teacher's features to which the semantic features are aligned; 0: no alignment."""
    head_width: int = 1024
    """Width of the flow head."""
    head_depth: int = 12
    """Blocks of the flow head."""

    def build(self, teacher: FrozenVision | None = None) -> MingTokNetwork:
        """An untrained tokenizer; ``teacher`` is used in training, and not saved. Raises ValueError for misfits."""
        if self.size not in SIZES:
            raise ValueError(f"size: got {self.size!r}, must be one of {', '.join(SIZES)}")
        if self.image % self.patch or self.patch % self.finer:
            raise ValueError(f"patch: got {self.patch}, must divide image, {self.image}, by a multiple of {self.finer}")
        return MingTokNetwork(self, teacher)

    def build_head(self, cond: int) -> LatentHead:
        """An untrained flow head for hidden states of ``cond`` channels."""
        return LatentHead(self.dim, cond, self.head_width, self.head_depth)


def claim(trial: TokenizeTrial, steps: int = 150) -> Outcome:
    """Objects that a linear read-out names right, of the latents (all of them) and of the mean semantic feature.

    Both of one tokenizer that learns pixels and the zoo's vision transformer; a second one, alike, learns pixels only.
    Holds if the features are better by 0.02 and the teacher costs 0.5 dB at most.
    """
    side, quality = trial.size, []
    for teacher in (None, trial.vision()):
        recipe = MingUniVision("T", side, side // 4, 4, 16, 0.25, 96 if teacher else 0)
        torch.manual_seed(trial.seed)
        model = recipe.build(teacher)
        trial.fit(model, steps, batch_size=16)
        quality.append(trial.psnr(model))
    latents = trial.probe(lambda images: model.latents(images).flatten(1))
    features = trial.probe(lambda images: model.expand(model.latents(images))[0].mean(1))
    told = f"PSNR {quality[0]:.2f} dB without the teacher, {quality[1]:.2f} with"
    holds = features >= latents + 0.02 and quality[1] >= quality[0] - 0.5
    return Outcome("objects named right, latents and features", latents, features, holds, told)
