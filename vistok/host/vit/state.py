"""The tokens of a vision transformer on their way through it, and which patches each of them stands for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vistok.core.merge import unmerge
from vistok.core.position import order
from vistok.core.tensors import take

Fill = Literal["zeros", "nearest"]


@dataclass(frozen=True, eq=False)
class TokenState:
    """K slots behind P prefix tokens (class, distillation, registers), of B pictures of N patches each.

    Prefix tokens are never among the slots, so no method can drop them. A slot that stands for no patch (a token that
    a method adds) has size 0 and anchor -1. The methods return new states; nothing is changed in place.
    """

    x: Tensor
    """(B, P + K, C) values, prefix first."""
    size: Tensor
    """(B, K) float32: how many patches each slot stands for."""
    source: Tensor
    """(B, N) int64: the slot (0..K-1) that each patch ended in, -1 where it was dropped."""
    anchor: Tensor
    """(B, K) int64: the patch (0..N-1) at whose place a slot stands, -1 for none."""
    grid: tuple[int, int]
    """(h, w) of the N patches, raster order."""
    prefix: int
    """P"""
    merged: bool = False
    """Whether a slot may stand for anything but one patch."""

    @classmethod
    def start(cls, x: Tensor, prefix: int, grid: tuple[int, int]) -> TokenState:
        """All patches of ``x`` (B, P + N, C), each its own slot. ValueError where the grid has not N patches."""
        b, n = len(x), x.shape[1] - prefix
        if grid[0] * grid[1] != n:
            raise ValueError(
                f"grid: got {grid[0]} x {grid[1]}, but the first block was given {n} patch tokens; patch dropout must "
                "be off while a method is in the model"
            )
        places = torch.arange(n, device=x.device).expand(b, n)
        return cls(x, torch.ones(b, n, device=x.device), places, places, grid, prefix)

    @property
    def num_slots(self) -> int:
        return self.anchor.shape[1]

    @property
    def slots(self) -> Tensor:
        """(B, K, C) values without the prefix."""
        return self.x[:, self.prefix :]

    @property
    def bare(self) -> TokenState:
        """The same map without values, x (B, 0, C): for keeping."""
        return replace(self, x=self.x.new_empty(len(self.x), 0, self.x.shape[2]))

    def with_slots(self, values: Tensor) -> TokenState:
        """The same slots with ``values`` (B, K, C)."""
        return replace(self, x=self._with_prefix(values))

    def keep(self, index: Tensor, policy: Literal["raster", "author"] = "raster") -> TokenState:
        """Only the slots ``index`` (B, k) int64, distinct; in their present order, or ("author") as ``index`` lists
        them. A slot's value is kept bit for bit."""
        index = order(index, policy)
        k = index.shape[1]
        into = self.anchor.new_full(self.anchor.shape, -1)
        into = into.scatter(1, index, torch.arange(k, device=index.device).expand_as(index))
        return replace(
            self,
            x=self._with_prefix(take(self.slots, index)),
            size=take(self.size, index),
            source=self._source(into),
            anchor=take(self.anchor, index),
        )

    def regroup(self, values: Tensor, into: Tensor, anchor: Tensor) -> TokenState:
        """New slots of any making, such as a weighted sum or a soft mixture of the old ones.

        ``values`` (B, k, C); ``into`` (B, K) int64 names the new slot that stands for each old one, -1 if none does;
        ``anchor`` (B, k) int64: the old slot at whose place each new one stands, -1 for none.
        """
        b, k = anchor.shape
        at = torch.where(into < 0, k, into)  # one more slot takes what is dropped
        size = self.size.new_zeros(b, k + 1).scatter_add(1, at, self.size)[:, :k]
        return replace(
            self,
            x=self._with_prefix(values),
            size=size,
            source=self._source(into),
            anchor=torch.where(anchor < 0, -1, take(self.anchor, anchor.clamp_min(0))),
            merged=True,
        )

    def unmerge(self, values: Tensor | None = None, fill: Fill = "zeros") -> Tensor:
        """(B, N, D): each patch gets its slot's row of ``values`` (B, K, D), by default the slots' own.

        A dropped patch gets zeros, or ("nearest") the row of the slot whose place on the grid is nearest to it, ties
        to the lower slot.
        """
        values = self.slots if values is None else values
        if fill == "zeros":
            return unmerge(values, self.source)
        if fill != "nearest":
            raise ValueError(f"fill: got {fill!r}, must be 'zeros' or 'nearest'")
        return take(values, torch.where(self.source < 0, self._nearest(), self.source))

    def restored(self, x: Tensor | None = None, fill: Fill = "zeros") -> Tensor:
        """(B, P + N, C): ``x`` (B, P + K, C), by default the state's own, with its slots unmerged."""
        x = self.x if x is None else x
        return torch.cat([x[:, : self.prefix], self.unmerge(x[:, self.prefix :], fill)], 1)

    def key_bias(self, dtype: torch.dtype) -> Tensor | None:
        """(B, 1, 1, P + K): log size, 0 for the prefix and for slots of no patch; None while nothing has merged.

        Added to the products of queries and keys it makes a slot count as often as the patches it stands for (ToMe's
        proportional attention, arXiv 2210.09461).
        """
        if not self.merged:
            return None
        bias = self.size.clamp_min(1).log()
        return torch.nn.functional.pad(bias, (self.prefix, 0)).to(dtype)[:, None, None]

    def _with_prefix(self, values: Tensor) -> Tensor:
        return torch.cat([self.x[:, : self.prefix], values], 1)

    def _source(self, into: Tensor) -> Tensor:
        return torch.where(self.source < 0, -1, take(into, self.source.clamp_min(0)))

    def _nearest(self) -> Tensor:
        """(B, N): the slot whose anchor is nearest to each patch."""
        h, w = self.grid
        patch = torch.arange(h * w, device=self.anchor.device)
        down = patch[:, None].div(w, rounding_mode="floor") - self.anchor.div(w, rounding_mode="floor")[:, None]
        across = patch[:, None] % w - (self.anchor % w)[:, None]
        far = (down**2 + across**2).masked_fill((self.anchor < 0)[:, None], h * h + w * w)
        return far.argmin(2)
