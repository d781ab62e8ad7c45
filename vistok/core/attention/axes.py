"""One axis of a grid of tokens: the run of keys that each query sees along it, and its tiles."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis: query i sees the keys j = i modulo ``dilation`` whose place in that group, j // dilation, lies in
    ``first[i]``..``last[i]``, both (queries,) int64 and never falling within a group."""

    num_keys: int
    dilation: int
    first: Tensor
    last: Tensor

    def allows(self, query: Tensor, key: Tensor) -> Tensor:
        """bool, of positions along the axis that broadcast."""
        first, last = (t.to(query.device)[query] for t in (self.first, self.last))
        place = key // self.dilation
        seen = (place >= first) & (place <= last)
        return seen if self.dilation == 1 else seen & ((query - key) % self.dilation == 0)

    @property
    def pairs(self) -> int:
        return int((self.last - self.first + 1).sum())

    def boxes(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tiles of ``size`` queries of one dilation group: first query, queries, and first and last place of the keys
        that any of them sees, as (T, 2). Queries as (T,) each."""
        starts, counts, boxes = [], [], []
        for group in range(self.dilation):
            first, last = self.first[group :: self.dilation], self.last[group :: self.dilation]
            place = torch.arange(0, len(first), size)
            ends = (place + size).clamp_max(len(first)) - 1
            starts.append(group + place * self.dilation)
            counts.append(ends + 1 - place)
            boxes.append(torch.stack([first[place], last[ends]], 1))
        return torch.cat(starts), torch.cat(counts), torch.cat(boxes)


@dataclass(frozen=True, eq=False)
class Alike:
    """Tiles of an axis that differ only in where they are."""

    query: Tensor
    key: Tensor
    """(T,) first positions"""
    queries: int
    keys: int
    allowed: Tensor | None
    """(queries, keys) bool; None: all."""

    @property
    def mask(self) -> Tensor:
        return torch.ones(self.queries, self.keys, dtype=torch.bool) if self.allowed is None else self.allowed


def alike(axis: Axis, size: int) -> list[Alike]:
    """The tiles of ``axis`` in groups of equal shape and mask."""
    starts, counts, boxes = axis.boxes(size)
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    windows: dict[int, tuple[Tensor, Tensor]] = {}
    for t, (start, count, (low, high)) in enumerate(zip(starts.tolist(), counts.tolist(), boxes.tolist(), strict=True)):
        inside = slice(start, start + (count - 1) * axis.dilation + 1, axis.dilation)
        windows[t] = axis.first[inside] - low, axis.last[inside] - low
        groups[count, high - low + 1, *(tuple(edge.tolist()) for edge in windows[t])].append(t)
    found = []
    for (queries, keys, *_), members in groups.items():
        first, last = windows[members[0]]
        place = torch.arange(keys)
        allowed = (place >= first[:, None]) & (place <= last[:, None])
        where = starts[members]
        key = where % axis.dilation + boxes[members, 0] * axis.dilation
        found.append(Alike(where, key, queries, keys, None if bool(allowed.all()) else allowed))
    return found


def per_axis(name: str, value: int | Sequence[int], axes: int, least: int) -> tuple[int, ...]:
    """``value`` for each of ``axes`` axes. Raises ValueError, which calls it ``name``, if one is below ``least``."""
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(values) != axes or min(values) < least:
        raise ValueError(f"{name}: got {value}, must be one for all, or {axes}, one for each axis, {least} or more")
    return values
