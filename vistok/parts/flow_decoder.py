"""Decoders that draw by a rectified flow: a transformer over noisy patches and tokens, and what such tokenizers share.

What a network's velocity means is ``vistok.core.flow.RectifiedFlow``'s affair: the networks here give bare numbers,
and ``flow_loss`` and ``FlowTokenizer.draw`` say of which flow they are. Source: FlexTok (arXiv 2502.13967), where each
kind of token has a modulation of its own. The head for each token alone is ``vistok.parts.flow_head``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn.functional import interpolate, silu

from vistok.core.flow import (
    Guidance,
    RectifiedFlow,
    Velocity,
    guided,
    logit_normal,
)
from vistok.core.losses import distillation
from vistok.parts.diffusion_transformer import TimeEmbedding, grid_sinusoids, unpatch
from vistok.parts.guidance import APG
from vistok.parts.tokenizer import Tokenizer
from vistok.parts.vision import FrozenVision


def flow_loss(
    flow: RectifiedFlow, model: Callable[[Tensor, Tensor], Tensor], data: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """Mean square error of the velocity that ``model`` gives at times ``t`` (B,) between ``data`` and ``noise``."""
    return flow.loss(flow.velocity(model(flow.mix(data, noise, t), t)), flow.target(data, noise))


def fat_logit_normal(n: int, uniform: float = 0.1) -> Tensor:
    """(n,) times in (0, 1): logit-normal, but a share of ``uniform`` uniform, so that both ends are learned too."""
    return torch.where(torch.rand(n) < uniform, torch.rand(n), logit_normal(n))


# Over the whole picture -------------------------------------------------------------------------------------------


class KindBlock(nn.Module):
    """Attention and MLP that all tokens share, with a modulation by the time for each of ``kinds`` kinds of tokens.

    Tokens of kind ``kinds`` are free: neither modulated nor gated (COMiT's offset). ``zero_init``: the block begins as
    the identity to tokens that are not free (adaLN-zero).
    """

    def __init__(self, width: int, heads: int, kinds: int, mlp_ratio: float = 4.0, zero_init: bool = True) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads: got {heads}, must divide width, {width}")
        self.kinds = kinds
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attention = Attention(width, heads, qkv_bias=True)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.modulation = begin(nn.Linear(width, kinds * 6 * width), zero_init)

    def forward(self, x: Tensor, kind: Tensor, condition: Tensor, seen: Tensor | None = None) -> Tensor:
        """``x`` (B, L, width), ``kind`` (L,) int64, ``condition`` (B, width); ``seen``: attention's mask, or None."""
        told = self.modulation(silu(condition)).unflatten(1, (self.kinds, 6, -1))
        free = torch.zeros_like(told[:, :1])
        free[:, :, [2, 5]] = 1
        told = torch.cat([told, free], 1).index_select(1, kind)
        shift, scale, gate, shift2, scale2, gate2 = told.unbind(2)
        x = x + gate * self.attention(self.norm1(x) * (1 + scale) + shift, attn_mask=seen)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class VelocityHead(nn.Module):
    """Tokens of patches (B, h * w, width) and the time's ``condition`` (B, width) to a map (B, channels, H, W)."""

    def __init__(self, width: int, patch: int, channels: int, zero_init: bool = True) -> None:
        super().__init__()
        self.patch = patch
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = begin(nn.Linear(width, 2 * width), zero_init)
        self.out = begin(nn.Linear(width, patch * patch * channels), zero_init)

    def forward(self, x: Tensor, size: tuple[int, int], condition: Tensor) -> Tensor:
        shift, scale = self.modulation(silu(condition))[:, None].chunk(2, -1)
        return unpatch(self.out(self.norm(x) * (1 + scale) + shift), size, self.patch)


class FlowDecoder(nn.Module):
    """A map (B, channels, H, W) at times (B,) and tokens (B, K, width) that tell what to draw, to the map's velocity.

    One sequence [patches | tokens], in which all see all. The patches have fixed places; the tokens bring theirs.
    """

    def __init__(self, channels: int, patch: int, width: int, depth: int, heads: int, zero_init: bool = True) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.time = TimeEmbedding(width)
        self.blocks = nn.ModuleList(KindBlock(width, heads, 2, zero_init=zero_init) for _ in range(depth))
        self.head = VelocityHead(width, patch, channels, zero_init)

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        return self.tapped(x, t, tokens)[0]

    def tapped(self, x: Tensor, t: Tensor, tokens: Tensor, tap: int = 1) -> tuple[Tensor, Tensor]:
        """The velocity, and the patches (B, h * w, width) as they leave block number ``tap``, counted from 1."""
        patches = self.embed(x.to(self.embed.weight.dtype))
        size = patches.shape[2], patches.shape[3]
        n = size[0] * size[1]
        patches = patches.flatten(2).transpose(1, 2)
        patches = patches + grid_sinusoids(size, patches.shape[2], x.device).to(patches.dtype)
        together = torch.cat([patches, tokens.to(patches.dtype)], 1)
        kind = (torch.arange(together.shape[1], device=x.device) >= n).long()
        condition = self.time(t)
        met = together
        for number, block in enumerate(self.blocks, 1):
            together = block(together, kind, condition)
            met = together if number == tap else met
        return self.head(together[:, :n], size, condition), met[:, :n]


# What tokenizers that draw by a flow share -----------------------------------------------------------------------


class Alignment(nn.Module):
    """How far patch features (B, h * w, width) are, through an MLP, from a frozen teacher's (REPA, arXiv 2410.06940).

    1 - cosine, mean over patches; the teacher's map is resized to (h, w).
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        hidden = 2 * max(width, out)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out)
        )

    def forward(self, features: Tensor, teacher: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        """``teacher`` (B, M, out), whose ``grid`` is theirs; ``size`` is that of ``features``."""
        return distillation(self.mlp(features), resized(teacher, grid, size))


def resized(tokens: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Tokens (B, M, D) of a ``grid`` as those of a grid of another ``size``, bilinear."""
    if grid == size:
        return tokens
    laid = tokens.float().transpose(1, 2).unflatten(2, grid)
    return interpolate(laid, size, mode="bilinear", antialias=True).flatten(2).transpose(1, 2)


class FlowTokenizer(Tokenizer):
    """A tokenizer whose decoder draws by a flow, on pixels in [-1, 1] or on the grid of a frozen tokenizer, ``vae``.

    Each call draws from the same noise, that of ``seed``, and it is the same for all pictures: so decoding is a
    function of the codes. Set ``seed`` to draw others.
    """

    flow: RectifiedFlow
    seed: int
    spread: Tensor

    def __init__(self, image: int, patch: int, seed: int, vae: Tokenizer | None = None) -> None:
        """``patch``: side of a patch of the flow in pixels, a multiple of the side of the vae's cells."""
        super().__init__()
        if image % patch:
            raise ValueError(f"patch: got {patch}, must divide image, {image}")
        self.image, self.seed = image, seed
        self.size = (image // patch,) * 2
        self.vae = None if vae is None else copy.deepcopy(vae).eval().requires_grad_(False)
        self.channels, self.cell = 3, 1
        if self.vae is not None:
            if self.vae.image != image or self.vae.grid is None:
                raise ValueError(f"vae: must have a grid and take pictures of {image} pixels, takes {self.vae.image}")
            self.cell = image // self.vae.grid[0]
            with torch.no_grad():
                found = self.vae.encode(torch.zeros(1, 3, image, image)).z
            assert found is not None
            self.channels = found.shape[2]
            if patch % self.cell:
                raise ValueError(f"patch: got {patch}, must be a multiple of the vae's {self.cell} pixels a cell")
        self.patch = patch // self.cell
        # What the vae's values are divided by, once, before the flow: see ``measure``.
        self.register_buffer("spread", torch.ones(()))

    def data(self, images: Tensor) -> Tensor:
        """(B, channels, h, w): what the flow draws, of pictures (B, 3, H, W) in [0, 1] of any size."""
        if self.vae is None:
            return 2 * images - 1
        grid = images.shape[2] // self.cell, images.shape[3] // self.cell
        with torch.no_grad():
            z = self.vae.bottleneck(self.vae.latents(images.to(self.vae.dtype)), grid=grid).z
        assert z is not None
        return z.transpose(1, 2).unflatten(2, grid) / self.spread

    def pixels(self, data: Tensor) -> Tensor:
        """The pictures of ``data``, whole ones, not clamped."""
        if self.vae is None:
            return (data + 1) / 2
        return self.vae.render((data * self.spread).flatten(2).transpose(1, 2).to(self.vae.dtype))

    @torch.no_grad()
    def measure(self, images: Tensor) -> None:
        """Set the divisor of the vae's values to their standard deviation over ``images``. Not for pixels."""
        if self.vae is None:
            raise ValueError("vae: got None; pixels need no divisor")
        self.spread.copy_(self.data(images).std() * self.spread)

    def noise(self, b: int, turn: int = 0) -> Tensor:
        """(b, channels, h, w): that of ``seed``, the same for each picture; the next ``turn`` has another."""
        side, rng = self.size[0] * self.patch, torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(turn + 1, self.channels, side, side, generator=rng)[-1:]
        return drawn.to(self.spread.device, self.dtype).expand(b, -1, -1, -1)

    def draw(
        self,
        velocity: Callable[[Tensor, Tensor, bool], Tensor],
        b: int,
        steps: int | Sequence[float],
        guidance: Guidance | None = None,
    ) -> Tensor:
        """The pictures to which ``velocity``, asked with (x, t, conditional), leads from the noise, by Euler's steps.

        With ``guidance`` it is asked without the condition too.
        """

        def ask(x: Tensor, t: Tensor, conditional: bool = True) -> Velocity:
            return self.flow.velocity(velocity(x, t, conditional))

        model = ask if guidance is None else guided(ask, guidance, self.flow)
        return self.pixels(self.flow.sample(model, self.noise(b), steps))

    def train(self, mode: bool = True) -> FlowTokenizer:
        """The vae stays in evaluation mode."""
        super().train(mode)
        if self.vae is not None:
            self.vae.eval()
        return self


def apg_of(scale: float) -> APG | None:
    """Adaptive projected guidance for one drawing; None for a scale of 1, which is none."""
    return None if scale == 1 else APG(scale)


def checked_teacher(teacher: FrozenVision | None, dim: int) -> tuple[FrozenVision, ...]:
    """() or the teacher alone: in a tuple, so that it is no part of the module that holds it and is not saved."""
    if teacher is not None and teacher.dim != dim:
        raise ValueError(f"teacher: has features of {teacher.dim} channels, must have teacher_dim, {dim}")
    return () if teacher is None else (teacher,)


def begin(layer: nn.Linear, zero: bool) -> nn.Linear:
    """``layer``, its weights and biases at zero if asked: adaLN-zero's start."""
    if zero:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return layer
