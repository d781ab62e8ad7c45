"""A pattern as dense problems: which rows of q and which of k belong to each, in few numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Runs:
    """T lists of positions of equal length: each is ``start[t, c] + offset[w]`` for all c and w, cut to ``length``.

    Blocks and boxes are written in a few numbers, whatever they hold.
    """

    start: Tensor
    """(T, c) int64"""
    offset: Tensor
    """(w,) int64"""
    length: int
    """At most c * w."""

    @classmethod
    def of(cls, start: Tensor, offset: Tensor, length: int | None = None) -> Runs:
        """All of ``start`` (T, c) and ``offset`` (w,), or the first ``length`` of each list."""
        return cls(start, offset, start.shape[1] * len(offset) if length is None else length)

    def __getitem__(self, which: Tensor) -> Tensor:
        """(len(which), length) int64 positions of the lists ``which`` (K,) int64."""
        return self.at(self.start[which])

    def at(self, start: Tensor) -> Tensor:
        """(..., length) int64 positions of lists like these that start elsewhere: ``start`` (..., c) int64."""
        return (start[..., None] + self.offset).flatten(-2)[..., : self.length]

    def to(self, device: torch.device) -> Runs:
        return Runs(self.start.to(device), self.offset.to(device), self.length)


@dataclass(frozen=True, eq=False)
class Tiles:
    """T dense problems of one shape: the queries of a tile see its keys, or those of them that the mask leaves.

    Over all tiles of a pattern each query stands at most once; one that stands nowhere sees nothing.
    """

    queries: Runs
    keys: Runs
    masked: bool = False
    """Whether some query of a tile does not see some key of it."""
    allowed: Tensor | None = None
    """(1, queries, keys) bool: the mask, where all tiles share one; else the pattern's ``allows`` says it."""
    picture: Tensor | None = None
    """(T,) int64: the picture of each tile; None: every tile is one of every picture."""
    head: Tensor | None = None
    """(T,) int64: the head of each tile; None: every tile is one of every head."""

    @property
    def pairs(self) -> int:
        """Queries times keys, over all tiles: what is computed, a head and picture that they belong to."""
        return len(self.queries.start) * self.queries.length * self.keys.length

    def to(self, device: torch.device) -> Tiles:
        allowed, picture, head = (None if t is None else t.to(device) for t in (self.allowed, self.picture, self.head))
        return Tiles(self.queries.to(device), self.keys.to(device), self.masked, allowed, picture, head)
