"""Orders of a grid's tokens in which a spatial tile is a run of tokens: what makes kernels on 1-D blocks fit grids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.core.attention.axes import per_axis


@dataclass(frozen=True, eq=False)
class TileOrder:
    """N tokens in raster order, laid out tile by tile in P places; tokens of a dilation group lie together.

    Each axis is padded, so that all tiles are whole: P >= N.
    """

    order: Tensor
    """(P,) int64: the token at each place, -1 for padding."""
    inverse: Tensor
    """(N,) int64: the place of each token."""

    @classmethod
    def of(cls, shape: Sequence[int], tile: int | Sequence[int], dilation: int | Sequence[int] = 1) -> TileOrder:
        """For a grid of ``shape`` and tiles of ``tile`` tokens of a dilation group along each axis (or all axes)."""
        tiles, dilations = (per_axis(n, x, len(shape), 1) for n, x in (("tile", tile), ("dilation", dilation)))
        places = torch.zeros(1, 1, dtype=torch.int64)  # (tiles, tokens of a tile)
        for length, t, d in zip(shape, tiles, dilations, strict=True):
            count = tiles_of_group(length, t, d)
            along = torch.arange(count * t).view(count, t) * d + torch.arange(d)[:, None, None]
            along = along.flatten(0, 1)
            joined = places[:, None, :, None] * length + along[None, :, None]
            inside = (places >= 0)[:, None, :, None] & (along < length)[None, :, None]
            places = torch.where(inside, joined, -1).flatten(2).flatten(0, 1)
        order = places.flatten()
        inverse = torch.empty(math.prod(shape), dtype=torch.int64)
        real = order >= 0
        inverse[order[real]] = real.nonzero()[:, 0]
        return cls(order, inverse)

    def permute(self, x: Tensor) -> Tensor:
        """(B, H, P, d) of ``x`` (B, H, N, d); padding is the first token."""
        return x.index_select(2, self.order.clamp_min(0).to(x.device))

    def unpermute(self, x: Tensor) -> Tensor:
        """``x`` (B, H, P, ...) back as (B, H, N, ...)."""
        return x.index_select(2, self.inverse.to(x.device))


def tiles_of_group(length: int, tile: int, dilation: int) -> int:
    """Tiles along an axis that the longest of its dilation groups takes."""
    return math.ceil(math.ceil(length / dilation) / tile)
