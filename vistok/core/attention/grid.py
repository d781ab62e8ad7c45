"""Patterns on 1-D, 2-D and 3-D grids of tokens: neighbourhood attention with its stride, halos, shifted windows.

All are products of axes: a query sees a key if it does so along each axis, and along an axis a query sees a run of
positions, or with a dilation every d-th of them. So masks, tiles and counts are made an axis at a time. Tokens are in
raster order, the last axis fastest.

Sources: Hassani et al., arXiv 2403.04690 (neighbourhood attention) and 2504.16922 (its generalisation by a stride);
Vaswani et al., arXiv 2103.12731 (halos); Liu et al., arXiv 2103.14030 (shifted windows).
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from vistok.core.attention.axes import Axis, alike, per_axis
from vistok.core.attention.pattern import Pattern
from vistok.core.attention.tiles import Runs, Tiles

LARGEST = 256
"""Queries of the largest tile that is considered."""
OVERHEAD = 48
"""What a pair of a tile of t queries costs is as 1 + OVERHEAD / t: keys are gathered once a tile."""


class Grid(Pattern):
    """A product of axes. Subclasses are frozen dataclasses of plain values, so that equal ones share their tiles."""

    @abstractmethod
    def make_axes(self) -> tuple[Axis, ...]:
        """One for each axis of the grid."""

    @property
    @abstractmethod
    def steps(self) -> tuple[int, ...]:
        """Along each axis, how many queries beside one another see the same keys."""

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        return self.make_axes()

    @property
    def dense_shape(self) -> tuple[int, int, int, int]:
        return 1, 1, math.prod(len(a.first) for a in self.axes), math.prod(a.num_keys for a in self.axes)

    @property
    def pairs(self) -> float:
        return math.prod(axis.pairs for axis in self.axes)

    def allows(self, picture: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = None
        for axis in reversed(self.axes):
            along = axis.allows(query % len(axis.first), key % axis.num_keys)
            seen = along if seen is None else seen & along
            query, key = query // len(axis.first), key // axis.num_keys
        assert seen is not None
        return seen

    def tiles(self, size: int | Sequence[int] | None = None) -> list[Tiles]:
        """Boxes of queries, with the box of all keys that they see. ``size``: queries along each axis."""
        return _grid_tiles(self, None if size is None else per_axis("size", size, len(self.axes), 1))

    def groups(self) -> list[Tiles]:
        return self.tiles(self.steps)

    def best_size(self) -> tuple[int, ...]:
        """The tile that ``tiles`` takes by default: little is computed beside the pattern, and few keys are copied."""
        return _best_size(self)


@lru_cache(maxsize=64)
def _grid_tiles(pattern: Grid, size: tuple[int, ...] | None) -> list[Tiles]:
    axes = pattern.axes
    size = _best_size(pattern) if size is None else size
    found = []
    for parts in itertools.product(*(alike(axis, s) for axis, s in zip(axes, size, strict=True))):
        rows = []
        for side, lengths in (("query", [len(a.first) for a in axes]), ("key", [a.num_keys for a in axes])):
            start, offset = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
            for axis, part, length in zip(axes, parts, lengths, strict=True):
                within = torch.arange(part.queries if side == "query" else part.keys) * axis.dilation
                start = (start[:, None] * length + getattr(part, side)).flatten()
                offset = (offset[:, None] * length + within).flatten()
            rows.append(Runs.of(start[:, None], offset))
        masked = any(part.allowed is not None for part in parts)
        allowed = None
        if masked:
            allowed = torch.ones(1, 1, dtype=torch.bool)
            for part in parts:
                product = allowed[:, None, :, None] & part.mask[:, None]
                allowed = product.flatten(2).flatten(0, 1)
            allowed = allowed[None]
        found.append(Tiles(rows[0], rows[1], masked, allowed))
    return found


@lru_cache(maxsize=64)
def _best_size(pattern: Grid) -> tuple[int, ...]:
    """Of all products of sizes along the axes the one that is cheapest by count of pairs and OVERHEAD."""
    options = []
    for number, axis in enumerate(pattern.axes):
        longest = math.ceil(len(axis.first) / axis.dilation)
        pairs = {}
        for t in sorted({min(t, longest) for t in _sizes(pattern.steps[number])}):
            _, counts, boxes = axis.boxes(t)
            pairs[t] = int((counts * (boxes[:, 1] - boxes[:, 0] + 1)).sum())
        options.append(pairs)

    def cost(size: tuple[int, ...]) -> float:
        computed = math.prod(pairs[t] for pairs, t in zip(options, size, strict=True))
        return computed * (1 + OVERHEAD / math.prod(size))

    fits = (size for size in itertools.product(*options) if math.prod(size) <= LARGEST)
    return min(fits, key=cost)


def _sizes(step: int) -> set[int]:
    """What a tile may measure along an axis."""
    return {2**e for e in range(LARGEST.bit_length())} | set(range(step, LARGEST + 1, step)) | {min(step, LARGEST)}


@dataclass(frozen=True)
class GridWindow(Grid):
    """Generalised neighbourhood attention, NATTEN's: each query sees the ``kernel`` nearest keys along each axis.

    At borders the window shifts, it does not shrink: every query sees prod(kernel) keys. An even window has one key
    fewer on the right. ``stride`` queries side by side share the window of the one in their middle (the right-hand one
    of two). ``dilation`` d: a query sees only keys of equal position modulo d. Along a ``causal`` axis it sees keys up
    to its own, fewer than ``kernel`` at the start; with a stride the window is counted back from the last query of the
    group. All but ``shape`` are numbers an axis, or one for all. Needs stride <= kernel, kernel * dilation <= length.
    """

    shape: tuple[int, ...]
    kernel: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False

    def __post_init__(self) -> None:
        n = _check_shape(self.shape)
        for name in ("kernel", "stride", "dilation"):
            object.__setattr__(self, name, per_axis(name, getattr(self, name), n, 1))
        causal = (self.causal,) * n if isinstance(self.causal, bool) else tuple(map(bool, self.causal))
        object.__setattr__(self, "causal", causal)
        if len(causal) != n:
            raise ValueError(f"causal: got {causal}, must be one for all, or {n}, one for each axis")
        for length, k, s, d, _ in self._by_axis:
            if k * d > length:
                raise ValueError(f"kernel: got {k} with dilation {d}, must fit into the {length} tokens of the axis")
            if s > k:
                raise ValueError(f"stride: got {s}, must be at most the kernel, {k}")

    @property
    def _by_axis(self) -> Iterable[tuple[int, int, int, int, bool]]:
        values: Any = (self.shape, self.kernel, self.stride, self.dilation, self.causal)
        return zip(*values, strict=True)

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(s for _, _, s, _, _ in self._by_axis)

    def make_axes(self) -> tuple[Axis, ...]:
        return tuple(neighbourhood(*values) for values in self._by_axis)


def neighbourhood(length: int, kernel: int, stride: int, dilation: int, causal: bool) -> Axis:
    """One axis of a ``GridWindow``."""
    place = torch.arange(length)
    own = place // dilation
    group = length // dilation + (place % dilation < length % dilation).long()  # how many are in each one's group
    base = own // stride * stride
    if causal:
        leader = torch.minimum(base + stride - 1, group - 1)
        return Axis(length, dilation, (leader - kernel + 1).clamp_min(0), own)
    left = kernel // 2
    leader = torch.minimum(base + stride // 2, group - 1)
    first = torch.minimum((leader - left).clamp_min(0), group - kernel)
    return Axis(length, dilation, first, first + kernel - 1)


@dataclass(frozen=True)
class Halo(Grid):
    """Blocks of queries see their block and ``halo`` tokens around it, fewer at the borders of the grid.

    ``padded``: the keys are those of a larger grid, ``key_shape``, with ``halo`` more tokens on each side and whole
    blocks inside: HaloNet's zero keys, which take part in the softmax. ``block`` 1 is a window that borders cut.
    ``stride``, a divisor of ``block``: along each axis only every so many of the tokens of ``shape`` is a query.
    """

    shape: tuple[int, ...]
    block: int | tuple[int, ...]
    halo: int | tuple[int, ...]
    padded: bool = False
    stride: int = 1

    def __post_init__(self) -> None:
        n = _check_shape(self.shape)
        for name, least in (("block", 1), ("halo", 0)):
            object.__setattr__(self, name, per_axis(name, getattr(self, name), n, least))
        if self.stride < 1 or any(block % self.stride for block in self._blocks):
            raise ValueError(f"stride: got {self.stride}, must be a divisor of the block, {self.block}")

    @property
    def _blocks(self) -> tuple[int, ...]:
        return per_axis("block", self.block, len(self.shape), 1)

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(block // self.stride for block in self._blocks)

    @property
    def key_shape(self) -> tuple[int, ...]:
        """The grid of the keys."""
        return tuple(axis.num_keys for axis in self.axes)

    def make_axes(self) -> tuple[Axis, ...]:
        halos = per_axis("halo", self.halo, len(self.shape), 0)
        return tuple(self._axis(*values) for values in zip(self.shape, self._blocks, halos, strict=True))

    def _axis(self, length: int, block: int, halo: int) -> Axis:
        first = torch.arange(0, length, self.stride) // block * block
        if self.padded:
            return Axis(math.ceil(length / block) * block + 2 * halo, 1, first, first + block + 2 * halo - 1)
        return Axis(length, 1, (first - halo).clamp_min(0), (first + block + halo - 1).clamp_max(length - 1))


@dataclass(frozen=True)
class Window(Grid):
    """Windows that do not overlap, moved by ``shift`` (Swin): the cuts are at shift, shift + window, ... along an axis.

    Nothing is seen across the border of the grid: what a cyclic shift would put into one window stays apart.
    """

    shape: tuple[int, ...]
    window: int | tuple[int, ...]
    shift: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        n = _check_shape(self.shape)
        for name, least in (("window", 1), ("shift", 0)):
            object.__setattr__(self, name, per_axis(name, getattr(self, name), n, least))
        for window, shift in zip(self.steps, per_axis("shift", self.shift, n, 0), strict=True):
            if shift >= window:
                raise ValueError(f"shift: got {shift}, must be less than the window, {window}")

    @property
    def steps(self) -> tuple[int, ...]:
        return per_axis("window", self.window, len(self.shape), 1)

    def make_axes(self) -> tuple[Axis, ...]:
        shifts = per_axis("shift", self.shift, len(self.shape), 0)
        return tuple(_cut(*values) for values in zip(self.shape, self.steps, shifts, strict=True))


def _cut(length: int, window: int, shift: int) -> Axis:
    before = (window - shift) % window  # what the first window lacks
    first = (torch.arange(length) + before) // window * window - before
    return Axis(length, 1, first.clamp_min(0), (first + window - 1).clamp_max(length - 1))


def _check_shape(shape: Sequence[int]) -> int:
    if not 1 <= len(shape) <= 3 or min(shape) < 1:
        raise ValueError(f"shape: got {tuple(shape)}, must be one to three lengths, 1 or more")
    return len(shape)
