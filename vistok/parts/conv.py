"""VQGAN's convolutional networks: pictures to a coarse map of vectors, and back.

Source: Esser et al., arXiv 2012.09841, in the shape that LlamaGen and its kin have them: attention at the coarsest
level only. The decoder may read its codes a second time, in its norms (``ConvDecoder``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, pixel_shuffle, scaled_dot_product_attention, silu

MULTS = (1, 1, 2, 2, 4)


class Norm(nn.GroupNorm):
    """Group norm of a map (B, C, H, W) in 32 groups, or as many as divide C.

    ``told``: channels of a ``condition`` (B, told, h, w) that gives gain and bias, each a linear map. ``spatial``: of
    the vector at the place (MoVQ, arXiv 2209.09002); else of its deviation and its mean over places (MAGVIT-v2).
    """

    def __init__(self, channels: int, told: int = 0, spatial: bool = True) -> None:
        super().__init__(math.gcd(32, channels), channels, eps=1e-6, affine=not told)
        self.told, self.spatial = told, spatial
        if told:
            self.gain, self.shift = nn.Conv2d(told, channels, 1), nn.Conv2d(told, channels, 1)
            if spatial:
                nn.init.constant_(self.gain.bias, 1.0)  # type: ignore[arg-type]

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        x = super().forward(x)
        if not self.told or condition is None:
            return x
        if self.spatial:
            high = low = interpolate(condition, x.shape[2:], mode="nearest")
        else:
            high = (condition.var((2, 3), correction=0, keepdim=True) + 1e-6).sqrt()
            low = condition.mean((2, 3), keepdim=True)
        return self.gain(high) * x + self.shift(low)


class ResidualBlock(nn.Module):
    """Two convolutions of 3 x 3 with their norms; ``out`` channels. ``told``: channels of the norms' condition."""

    def __init__(self, channels: int, out: int, told: int = 0) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(channels, told), Norm(out, told)
        self.conv1, self.conv2 = nn.Conv2d(channels, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        h = self.conv1(silu(self.norm1(x, condition)))
        return self.skip(x) + self.conv2(silu(self.norm2(h, condition)))


class AttentionBlock(nn.Module):
    """Attention of one head among all places of a map."""

    def __init__(self, channels: int, told: int = 0) -> None:
        super().__init__()
        self.norm = Norm(channels, told)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm(x, condition)).flatten(2).transpose(1, 2)[:, None].chunk(3, -1)
        seen = scaled_dot_product_attention(q, k, v)
        return x + self.out(seen[:, 0].transpose(1, 2).view_as(x))


class Stack(nn.ModuleList):
    """``blocks`` residual blocks; behind each of the first ``attention`` of them, attention."""

    def __init__(self, channels: int, out: int, blocks: int, attention: int = 0, told: int = 0) -> None:
        super().__init__()
        for i in range(blocks):
            self.append(ResidualBlock(channels if i == 0 else out, out, told))
            self.extend([AttentionBlock(out, told)] if i < attention else [])

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        for block in self:
            x = block(x, condition)
        return x


class ConvEncoder(nn.Module):
    """Maps (B, ``channels``, H, W) to (B, ``out``, H / f, W / f), f = 2^``halvings``; H and W are multiples of f.

    ``width`` times one of ``mults`` channels a level, ``blocks`` residual blocks each. ``attention``: in the middle and
    after each block of the coarsest level, "middle" in the middle only. ``halvings``: behind so many of the first
    levels; None: behind all but the last. ``first``: channels of the first convolution, None: those of the first level.
    """

    def __init__(
        self,
        out: int = 256,
        width: int = 128,
        mults: Sequence[int] = MULTS,
        blocks: int = 2,
        attention: bool | Literal["middle"] = True,
        channels: int = 3,
        halvings: int | None = None,
        first: int | None = None,
    ) -> None:
        super().__init__()
        widths = [width * m for m in mults]
        coarse = [0] * (len(widths) - 1) + [blocks * (attention is True)]
        start = widths[0] if first is None else first
        ends = pairwise([start, *widths])
        halved = _halved(halvings, len(widths))
        self.factor = 2**halved
        self.first = nn.Conv2d(channels, start, 3, padding=1)
        self.levels = nn.ModuleList(Stack(a, b, blocks, n) for (a, b), n in zip(ends, coarse, strict=True))
        self.downs = nn.ModuleList(nn.Conv2d(w, w, 3, 2) for w in widths[:halved])
        self.middle = Stack(widths[-1], widths[-1], 2, int(bool(attention)))
        self.norm, self.last = Norm(widths[-1]), nn.Conv2d(widths[-1], out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(f"x: got {x.shape[2]} x {x.shape[3]}, must be multiples of {self.factor}")
        x = self.first(x)
        for i, level in enumerate(self.levels):
            x = level(x)
            if i < len(self.downs):
                x = self.downs[i](pad(x, (0, 1, 0, 1)))
        return self.last(silu(self.norm(self.middle(x))))


class ConvDecoder(nn.Module):
    """Codes (B, ``inside``, h, w) to maps (B, ``channels``, f h, f w): the encoder's mirror, one block more a level.

    ``norm``: "plain", "spatial" (every norm but the last is MoVQ's) or "adaptive" (MAGVIT-v2's before each level); they
    read the codes, or a ``condition`` (B, ``inside``, h, w) given beside them. To a finer level by nearest neighbours
    and a convolution, or with ``shuffle`` by depth to space behind it.
    """

    def __init__(
        self,
        inside: int = 256,
        width: int = 128,
        mults: Sequence[int] = MULTS,
        blocks: int = 2,
        attention: bool | Literal["middle"] = True,
        norm: Literal["plain", "spatial", "adaptive"] = "plain",
        shuffle: bool = False,
        channels: int = 3,
        halvings: int | None = None,
    ) -> None:
        super().__init__()
        if norm not in ("plain", "spatial", "adaptive"):
            raise ValueError(f"norm: got {norm!r}, must be 'plain', 'spatial' or 'adaptive'")
        self.shuffle, told = shuffle, inside if norm == "spatial" else 0
        widths = [width * m for m in reversed(mults)]
        ends = list(pairwise([widths[0], *widths]))
        coarse = [(blocks + 1) * (attention is True)] + [0] * (len(widths) - 1)
        self.first = nn.Conv2d(inside, widths[0], 3, padding=1)
        self.middle = Stack(widths[0], widths[0], 2, int(bool(attention)), told)
        self.styles = nn.ModuleList(Norm(a, inside, False) for a, _ in ends if norm == "adaptive")
        self.levels = nn.ModuleList(Stack(a, b, blocks + 1, n, told) for (a, b), n in zip(ends, coarse, strict=True))
        doubled = widths[: _halved(halvings, len(widths))]
        self.ups = nn.ModuleList(nn.Conv2d(w, w * (4 if shuffle else 1), 3, padding=1) for w in doubled)
        self.norm, self.last = Norm(widths[-1]), nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        condition = z if condition is None else condition
        x = self.middle(self.first(z), condition)
        for i, level in enumerate(self.levels):
            x = level(self.styles[i](x, condition) if len(self.styles) else x, condition)
            if i < len(self.ups):
                x = pixel_shuffle(self.ups[i](x), 2) if self.shuffle else self.ups[i](interpolate(x, scale_factor=2))
        return self.last(silu(self.norm(x)))


def _halved(halvings: int | None, levels: int) -> int:
    if halvings is not None and not 0 <= halvings <= levels:
        raise ValueError(f"halvings: got {halvings}, must be between 0 and the {levels} levels")
    return levels - 1 if halvings is None else halvings
