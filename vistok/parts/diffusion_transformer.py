"""A small diffusion transformer whose attention can be exchanged: noisy pictures and times to velocities.

Source: Peebles and Xie, arXiv 2212.09748. Blocks are modulated by the time (adaLN-zero), so that a new block is the
identity and a new network gives zeros. What is learned, and in which convention, is the affair of
``vistok.core.flow.RectifiedFlow``: ``flow.velocity(net(x, t))``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import Tensor, nn


def sinusoids(places: Tensor, dim: int, longest: float = 1e4) -> Tensor:
    """(..., dim) float32: sines, then cosines of ``places`` (...,) at dim / 2 wavelengths up to 2 pi ``longest``."""
    rates = longest ** -torch.arange(0, 1, 2 / dim, device=places.device)
    angles = places[..., None].float() * rates
    return torch.cat([angles.sin(), angles.cos()], -1)


def grid_sinusoids(size: tuple[int, ...], dim: int, device: torch.device | None = None) -> Tensor:
    """(prod(size), dim): places on a grid in raster order, an equal share of the channels to each axis, zeros behind.

    Raises ValueError where an axis would get no channel.
    """
    share = dim // (2 * len(size)) * 2
    if not share:
        raise ValueError(f"dim: got {dim}, must be {2 * len(size)} or more for {len(size)} axes")
    places = torch.cartesian_prod(*(torch.arange(n, device=device) for n in size)).view(-1, len(size))
    return nn.functional.pad(sinusoids(places, share).flatten(1), (0, dim - share * len(size)))


class TimeEmbedding(nn.Sequential):
    """Times (B,) in [0, 1] to (B, width)."""

    def __init__(self, width: int) -> None:
        if width % 2:
            raise ValueError(f"width: got {width}, must be even")
        super().__init__(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.width = width

    def forward(self, t: Tensor) -> Tensor:
        return super().forward(sinusoids(1e3 * t, self.width).to(next(self.parameters()).dtype))


class SelfAttention(Attention):
    """Attention of all tokens to all; what ``attention`` of ``DiffusionTransformer`` has to give looks like this."""

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:  # type: ignore[override]
        """(B, h * w, width) to the same; ``size`` (h, w) of the grid."""
        return super().forward(x)


def plain_attention(width: int, heads: int) -> nn.Module:
    """Attention to all tokens, with biases."""
    return SelfAttention(width, heads, qkv_bias=True)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x`` (B, N, width) scaled by 1 + ``scale`` and shifted, both (B, width)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class ModulatedBlock(nn.Module):
    """Attention and MLP, shifted, scaled and gated by the ``condition`` (B, width); the identity before training."""

    def __init__(self, width: int, attention: nn.Module, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attention = attention
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.modulation = _zero(nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, size: tuple[int, int], condition: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(nn.functional.silu(condition)).chunk(6, 1)
        x = x + gate[:, None] * self.attention(modulate(self.norm1(x), shift, scale), size)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiffusionTransformer(nn.Module):
    """Pictures (B, channels, H, W) at times (B,) in [0, 1] to velocities of the pictures' shape.

    ``attention``: (width, heads) to a module, called once a block, in order; it maps tokens (B, h * w, width) and the
    grid (h, w) to tokens. H and W of any number of patches, ValueError if they are not divided by ``patch``.
    """

    def __init__(
        self,
        channels: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        attention: Callable[[int, int], nn.Module] = plain_attention,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.time = TimeEmbedding(width)
        self.blocks = nn.ModuleList(ModulatedBlock(width, attention(width, heads), mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = _zero(nn.Linear(width, 2 * width))
        self.head = _zero(nn.Linear(width, patch * patch * channels))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if x.shape[2] % self.patch or x.shape[3] % self.patch:
            raise ValueError(f"x: got {x.shape[2]} x {x.shape[3]} pixels, must be divided by the patch, {self.patch}")
        tokens = self.embed(x)
        size = tokens.shape[2], tokens.shape[3]
        tokens = tokens.flatten(2).transpose(1, 2)
        tokens = tokens + grid_sinusoids(size, tokens.shape[2], x.device).to(tokens.dtype)
        condition = self.time(t)
        for block in self.blocks:
            tokens = block(tokens, size, condition)
        tokens = modulate(self.norm(tokens), *self.modulation(nn.functional.silu(condition)).chunk(2, 1))
        return unpatch(self.head(tokens), size, self.patch)


def unpatch(tokens: Tensor, size: tuple[int, int], patch: int) -> Tensor:
    """Tokens (B, h * w, patch * patch * C), channels last in each, to (B, C, h * patch, w * patch)."""
    pixels = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, size)
    return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
