"""UniFlow: features of a pretrained vision transformer as 64-channel latents, drawn patch by patch by a flow of pixels.

What: a bottleneck makes latents of the encoder's features; plain blocks make of them a condition for each patch; a
small head, the same for all patches, draws each patch's pixels from its own condition and noise alone. The encoder
learns along, held to a frozen copy of itself layer by layer: deep and badly aligned layers count more, so that it keeps
what it understands. Source: UniFlow; ZhengrongYue/UniFlow (inference; the distillation from a public review).

The encoder is a plain ViT of this recipe's size, into which ``build(pretrained)`` copies a timm vision transformer;
its frozen copy is the teacher, and is not saved. Unverified in the sheet and chosen here: the distillation's ``beta``
and weight (its weights get no gradient), times that are drawn for each patch, a learned second position embedding, the
share of patches without condition.

Defect of the released code: it initialises all linear layers again after the head was begun at zero, which undoes that
(``parity="authors"``). The default begins with a velocity of zero.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, pixel_shuffle, pixel_unshuffle

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.core.flow import NOISE_FIRST, cfg, power_schedule
from vistok.core.losses import distillation
from vistok.parts.diffusion_transformer import grid_sinusoids
from vistok.parts.flow_decoder import FlowTokenizer, fat_logit_normal, flow_loss, resized
from vistok.parts.flow_head import FlowHead
from vistok.parts.quantize import Identity

CARD = Card(
    title="UniFlow: A Unified Pixel Flow Tokenizer for Visual Understanding and Generation",
    kind="trained",
    site="pixels through a vision transformer to a grid of continuous latents, and back by a flow for each patch",
    paper="UniFlow: A Unified Pixel Flow Tokenizer for Visual Understanding and Generation",
    repository="ZhengrongYue/UniFlow",
    mechanism=("transformation",),
    claim="Layer-wise self-distillation keeps what the encoder understands while it learns to reconstruct.",
    departures=("the released head begins at random, for all linear layers are initialised after its zeros",),
)

SIZES = {"T": (96, 4, 3), "L": (1024, 24, 16)}
"""Width, blocks and heads of the encoder; the decoder is as wide. T is this project's, L that of InternViT-300M."""


def layerwise_distillation(
    students: Sequence[Tensor], teachers: Sequence[Tensor], beta: float
) -> tuple[Tensor, Tensor]:
    """Loss, and weights (L,) that sum to 1, of L layers' features (B, N, D), first to last; no gradient to teachers.

    Layer l is 1 - mean cosine away, and weighs l exp(``beta`` times that), without a gradient of its own.
    """
    pairs = zip(students, teachers, strict=True)
    away = torch.stack([1 - cosine_similarity(s.float(), t.detach().float(), dim=-1).mean() for s, t in pairs])
    weights = torch.arange(1, len(away) + 1, device=away.device) * (beta * away.detach()).exp()
    weights = weights / weights.sum()
    return (weights * away).sum(), weights


def dispersive(z: Tensor) -> Tensor:
    """Log of the mean over all pairs of exp(-distance squared / D) of latents (B, ...) of D numbers each, a scalar."""
    flat = z.float().flatten(1)
    apart = (flat[:, None] - flat).square().mean(2)
    return (-apart).exp().mean().log()


class UniFlowNetwork(FlowTokenizer):
    """The tokenizer; ``recipe`` has its hyper-parameters. Encoder and teacher are copies of ``pretrained``."""

    flow = NOISE_FIRST
    mean: Tensor
    std: Tensor

    def __init__(self, recipe: UniFlow, pretrained: Any = None) -> None:
        super().__init__(recipe.image, recipe.patch, recipe.seed)
        self.recipe: UniFlow = recipe
        self.grid = self.size
        width, depth, heads = SIZES[recipe.size]
        self.encoder = VisionTransformer(recipe.image, recipe.patch, 3, 0, "token", width, depth, heads)
        self.down, self.up = Mlp(width, width, recipe.dim), Mlp(recipe.dim, width, width)
        self.blocks = nn.ModuleList(Block(width, heads, 4.0, qkv_bias=True) for _ in range(recipe.global_depth))
        self.positions = nn.Parameter(0.02 * torch.randn(self.tokens, width))
        self.head = FlowHead(3 * recipe.patch**2, width, width, recipe.head_depth)
        self.bottleneck: Identity = Identity(recipe.dim)
        if recipe.parity == "authors":
            self.apply(_again)
        told = getattr(pretrained, "pretrained_cfg", {})
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(told.get(name, (0.5,) * 3)).view(3, 1, 1))
        self._teacher: tuple[VisionTransformer, ...] = ()
        if pretrained is not None:
            try:
                self.encoder.load_state_dict(pretrained.state_dict())
            except RuntimeError as error:
                raise ValueError(f"pretrained: must be a plain ViT of this size: {str(error)[:300]}") from error
            self._teacher = (copy.deepcopy(self.encoder).eval().requires_grad_(False),)

    @property
    def tokens(self) -> int:
        return self.size[0] * self.size[1]

    def features(self, images: Tensor) -> Tensor:
        """(B, N, width): what understanding reads, of pictures (B, 3, H, W) in [0, 1]."""
        return self._layers(self.encoder, images)[0]

    def latents(self, images: Tensor) -> Tensor:
        return self.down(self.features(images))

    def condition(self, z: Tensor) -> Tensor:
        """(B, N, width): what the head is told of each patch, of latents ``z`` (B, N, dim)."""
        x = self.up(z)
        x = x + grid_sinusoids(self.size, x.shape[2], x.device).to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return x + self.positions

    def rows(self, x: Tensor) -> Tensor:
        """(B * N, 3 * patch * patch): the patches of pictures, each in the order (channel, row, column)."""
        return pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2).flatten(0, 1)

    def unrows(self, rows: Tensor) -> Tensor:
        """The inverse of ``rows``."""
        laid = rows.unflatten(0, (-1, self.tokens)).transpose(1, 2).unflatten(2, self.size)
        return pixel_shuffle(laid, self.patch)

    def render(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        told = self.condition(z).flatten(0, 1)
        first, last = self.recipe.interval

        def velocity(x: Tensor, t: Tensor, conditional: bool) -> Tensor:
            shown = told if conditional or not first <= float(t[0]) <= last else torch.zeros_like(told)
            return self.unrows(self.head(self.rows(x), t.repeat_interleave(self.tokens), shown))

        scale = self.recipe.guidance
        schedule = power_schedule(self.recipe.steps, self.recipe.power)
        return self.draw(velocity, len(z), schedule, None if scale == 1 else lambda c, u: cfg(c, u, scale))

    def objective(self, images: Tensor) -> Tensor:
        """The velocity's error for each patch, and with a teacher the layers' distance from its own."""
        features, layers = self._layers(self.encoder, images)
        z = self.bottleneck(self.down(features), grid=self.grid).z
        assert z is not None
        rows, told = self.rows(self.data(images)), self.condition(z.to(self.dtype)).flatten(0, 1)
        lost = (torch.rand(len(rows), 1) < self.recipe.unconditional).to(rows.device)
        told, t = told.masked_fill(lost, 0), fat_logit_normal(len(rows)).to(rows.device)
        loss = flow_loss(self.flow, lambda x, t: self.head(x, t, told), rows, t, torch.randn_like(rows))
        for teacher in self._teacher:
            with torch.no_grad():
                real = self._layers(teacher, images)[1]
            loss = loss + self.recipe.distill * layerwise_distillation(layers, real, self.recipe.beta)[0]
        return loss + self.recipe.dispersive * dispersive(z) if self.recipe.dispersive else loss

    def _layers(self, encoder: VisionTransformer, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Patch features (B, N, width) that a vision transformer gives, and those after each of its blocks."""
        x = ((images - self.mean) / self.std).to(self.dtype)
        found, layers = encoder.forward_intermediates(x, output_fmt="NLC")
        return found[:, encoder.num_prefix_tokens :], layers


def _again(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


@dataclass(frozen=True)
class UniFlow:
    """A tokenizer by its size."""

    size: Literal["T", "L"] = "L"
    """Width, blocks and heads: see ``SIZES``."""
    image: int = 448
    """Side of a picture in pixels."""
    patch: int = 14
    """Side of a patch in pixels, of the encoder and of the flow."""
    dim: int = 64
    """Channels of a latent."""
    global_depth: int = 6
    """Blocks in which the conditions of all patches see one another."""
    head_depth: int = 12
    """Blocks of the head."""
    steps: int = 1
    """Euler's steps of decoding."""
    power: float = 1.0
    """Of the schedule of steps: see ``vistok.core.flow.power_schedule``; 1 is equal steps."""
    guidance: float = 1.0
    """Scale of classifier-free guidance against a condition of zeros; 1: none."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Times, from noise at 0 to data at 1, between which there is guidance."""
    unconditional: float = 0.1
    """Share of the patches that training draws from a condition of zeros."""
    distill: float = 1.0
    """Weight of the distillation from the frozen copy of the encoder."""
    beta: float = 1.0
    """How much more a badly aligned layer counts; 0: by depth alone."""
    dispersive: float = 0.0
    """Weight of the loss that spreads the latents of a batch; 0: without."""
    seed: int = 0
    """Of the noise that decoding begins with."""
    parity: Literal["paper", "authors"] = "paper"
    """ "authors": linear layers begin as released, the head not at zero."""

    def build(self, pretrained: Any = None) -> UniFlowNetwork:
        """A tokenizer whose decoder is untrained; ``pretrained``: a timm VisionTransformer of this size, or None.

        Raises ValueError for an unknown size, and for a transformer that does not fit.
        """
        if self.size not in SIZES:
            raise ValueError(f"size: got {self.size!r}, must be one of {', '.join(SIZES)}")
        return UniFlowNetwork(self, pretrained)


def claim(trial: TokenizeTrial, steps: int = 100) -> Outcome:
    """Objects that a linear read-out of the encoder's mean feature names, after training without and with distillation.

    The encoder first learns the features of the zoo's vision transformer, for ``steps`` steps; then the tokenizer is
    trained from it twice, as long and alike but for the distillation. Holds if the features are better by 0.02.
    """
    side, vision = trial.size, trial.vision()
    recipe = UniFlow("T", side, side // 8, 16, 2, 3)
    torch.manual_seed(trial.seed)
    first = recipe.build()

    def understand(model: UniFlowNetwork, images: Tensor, _: Tensor) -> Tensor:
        return distillation(model.features(images), resized(vision(images), vision.grid, model.size))

    trial.fit(first, steps, batch_size=16, loss=understand)
    found, quality = [], []
    for weight in (0.0, 1.0):
        torch.manual_seed(trial.seed)
        model = UniFlow("T", side, side // 8, 16, 2, 3, distill=weight).build(first.encoder)
        trial.fit(model, steps, batch_size=16)
        found.append(trial.probe(lambda images, model=model: model.features(images).mean(1)))
        quality.append(trial.psnr(model))
    before = trial.probe(lambda images: first.features(images).mean(1))
    told = f"before {before:.3f}; PSNR {quality[0]:.2f} dB without, {quality[1]:.2f} with"
    return Outcome("objects named right by the features", found[0], found[1], found[1] >= found[0] + 0.02, told)
