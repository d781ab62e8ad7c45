"""How much faster a neighbourhood pattern can be on tiles: counted, not timed.

A kernel on tiles does the whole of every tile of keys that any query of a tile of queries sees. What it can gain over
dense attention is the share of tiles that it visits, whatever the hardware; a stride lets windows end where tiles end.
Source: Hassani et al., arXiv 2504.16922, whose simulator is not released; tokens are laid out tile by tile, and the
tokens of a dilation group together, as there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vistok.core.attention.axes import Axis, per_axis
from vistok.core.attention.grid import GridWindow, neighbourhood
from vistok.core.attention.layout import tiles_of_group


@dataclass(frozen=True)
class Simulated:
    """Counts of tiles, for one head."""

    query_tiles: int
    key_tiles: int
    visited: int
    """Pairs of a tile of queries and one of keys in which some query sees some key."""
    partial: int
    """Those of them in which some query does not see some key (or a key is padding): they need a mask."""
    density: float
    """Share of the pairs of tokens that is allowed."""

    @property
    def bound(self) -> float:
        """The most that a kernel on these tiles can gain over dense attention on them."""
        return self.query_tiles * self.key_tiles / self.visited

    @property
    def flop_bound(self) -> float:
        """The gain if only allowed pairs were computed; without causal axes N / prod(kernel)."""
        return 1 / self.density

    @property
    def perfect(self) -> bool:
        """Whether no tile needs a mask: all that is computed is used."""
        return not self.partial


def simulate(pattern: GridWindow, query_tile: int | Sequence[int], key_tile: int | Sequence[int]) -> Simulated:
    """Count the tiles of ``pattern``, with tiles of queries and keys of these lengths along each axis (or all axes).

    A tile that ends beyond its axis is padded; padded queries see nothing and are cropped.
    """
    n = len(pattern.shape)
    query_tile, key_tile = (
        per_axis(name, tile, n, 1) for name, tile in (("query_tile", query_tile), ("key_tile", key_tile))
    )
    counts = [_count(axis, tq, tk) for axis, tq, tk in zip(pattern.axes, query_tile, key_tile, strict=True)]
    visited, full, queries, keys = (math.prod(values) for values in zip(*counts, strict=True))
    return Simulated(queries, keys, visited, visited - full, pattern.density)


def best_stride(
    shape: Sequence[int],
    kernel: int | Sequence[int],
    query_tile: int | Sequence[int],
    key_tile: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
) -> tuple[int, ...]:
    """The stride, by axis, that visits fewest tiles; of equals that with fewest partial tiles, then the smallest."""
    n = len(shape)
    numbers = (("kernel", kernel), ("query_tile", query_tile), ("key_tile", key_tile), ("dilation", dilation))
    kernels, query, key, dilations = (per_axis(name, value, n, 1) for name, value in numbers)
    causals = (causal,) * n if isinstance(causal, bool) else tuple(causal)
    axes = zip(shape, kernels, dilations, causals, query, key, strict=True)
    return tuple(_best_stride(*values, tuple(range(1, values[1] + 1))) for values in axes)


def best_window(
    shape: Sequence[int], density: float, query_tile: int | Sequence[int], key_tile: int | Sequence[int]
) -> GridWindow:
    """The window of at most ``density`` whose bound comes nearest to 1 / density; of equals the densest, then the most
    even one.

    Kernels tried are multiples of the tile of keys and whole axes, strides 1 and multiples of the tile of queries.
    Raises ValueError if the least of them is denser.
    """
    n = len(shape)
    tiles = per_axis("query_tile", query_tile, n, 1), per_axis("key_tile", key_tile, n, 1)
    options = [_windows(*values) for values in zip(shape, *tiles, strict=True)]
    found = []
    for chosen in itertools.product(*options):
        share = math.prod(k / length for (k, *_), length in zip(chosen, shape, strict=True))
        if share <= density:
            computed = math.prod(cost for *_, cost in chosen)
            even = min(k / length for (k, *_), length in zip(chosen, shape, strict=True))
            found.append((round(share / computed, 6), share, even, chosen))
    if not found:
        least = math.prod(window[0][0] / length for window, length in zip(options, shape, strict=True))
        raise ValueError(f"density: got {density}, must be at least {least:.4g} with these tiles")
    chosen = max(found)[3]
    return GridWindow(tuple(shape), tuple(k for k, *_ in chosen), tuple(s for _, s, _ in chosen))


def tile_map(axis: Axis, query_tile: int, key_tile: int) -> tuple[Tensor, Tensor]:
    """(tiles of queries, tiles of keys) bool twice: some query of one sees some key of the other, or all see all.

    Tiles as ``TileOrder`` lays them out: a dilation group after the other, each padded to the tiles of the longest.
    """
    counts = [
        tiles_of_group(n, tile, axis.dilation) for n, tile in ((len(axis.first), query_tile), (axis.num_keys, key_tile))
    ]
    some, whole = [], []
    for group in range(axis.dilation):
        first, last = axis.first[group :: axis.dilation], axis.last[group :: axis.dilation]
        start = torch.arange(0, len(first), query_tile)
        end = (start + query_tile).clamp_max(len(first)) - 1
        key = torch.arange(counts[1]) * key_tile
        blocks = torch.zeros(2, *counts, dtype=torch.bool)
        blocks[0, : len(start)] = (key + key_tile > first[start, None]) & (key <= last[end, None])
        blocks[1, : len(start)] = (key >= first[end, None]) & (key + key_tile - 1 <= last[start, None])
        some.append(blocks[0])
        whole.append(blocks[1])
    joined = [torch.block_diag(*blocks).bool() for blocks in (some, whole)]  # type: ignore[no-untyped-call]
    return joined[0], joined[1]


def _windows(length: int, query_tile: int, key_tile: int) -> list[tuple[int, int, float]]:
    """Kernels of an axis with their best strides, and the share of all pairs that their tiles hold."""
    found = []
    for kernel in sorted({*range(key_tile, length, key_tile), length}):
        strides = tuple(sorted({1, *range(query_tile, kernel + 1, query_tile)}))
        stride = _best_stride(length, kernel, 1, False, query_tile, key_tile, strides)
        some, *_ = _count(neighbourhood(length, kernel, stride, 1, False), query_tile, key_tile)
        found.append((kernel, stride, some * query_tile * key_tile / length**2))
    return found


@lru_cache(maxsize=1024)
def _best_stride(
    length: int, kernel: int, dilation: int, causal: bool, query_tile: int, key_tile: int, strides: tuple[int, ...]
) -> int:
    def rank(stride: int) -> tuple[int, int, int]:
        some, whole, *_ = _count(neighbourhood(length, kernel, stride, dilation, causal), query_tile, key_tile)
        return some, -whole, stride

    return min(strides, key=rank)


def _count(axis: Axis, query_tile: int, key_tile: int) -> tuple[int, int, int, int]:
    """Along ``axis``: pairs of tiles that meet, pairs that see one another wholly, tiles of queries, tiles of keys."""
    some = whole = queries = keys = 0
    for group in range(axis.dilation):
        first, last = axis.first[group :: axis.dilation], axis.last[group :: axis.dilation]
        starts = torch.arange(0, len(first), query_tile)
        ends = (starts + query_tile).clamp_max(len(first)) - 1
        # Windows move on with their query: the first one begins and the last one ends what a tile sees.
        some += int((last[ends] // key_tile - first[starts] // key_tile + 1).sum())
        whole += int(((last[starts] + 1) // key_tile + (-first[ends] // key_tile)).clamp_min(0).sum())
        queries += len(starts)
        keys += math.ceil(len(range(group, axis.num_keys, axis.dilation)) / key_tile)
    return some, whole, queries, keys
