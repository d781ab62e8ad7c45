"""The tokens of a vision transformer on their way through it, and which patches each of them stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from vistok.core.merge import merge_pairs, unmerge
from vistok.core.position import order
from vistok.core.tensors import take

Fill = Literal["zeros", "nearest"]
HIDDEN = 1e-6
"""What a slot that is hidden counts in attention, of one that is seen: not 0, for its gradient not to be 0 times
infinity. It is what the slot would add if it were seen."""


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
    dropped: bool = False
    """Whether a patch may be in no slot."""
    visible: Tensor | None = None
    """(B, K) in 0..1: 1 for a slot that is seen, 0 for one that attention is to pass over (as if it were gone, for
    training); None where all are seen. Gradients flow through it."""
    added: int = 0
    """How many slots methods have added so far (``add``), those that are gone again counted too."""
    held: int = 0
    """The last so many slots were added and are withheld from reducers, so that none ranks, merges or drops them."""
    aside: Mapping[str, Tensor] = field(default_factory=dict)
    """What a method has put aside for itself, to be read or put back at a later block."""

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
    def untouched(self) -> bool:
        """Whether each patch is its own slot still, in raster order."""
        return self.num_slots == self.source.shape[1] and not self.merged and not self.added

    @property
    def flat_anchor(self) -> Tensor:
        """(B, K): ``anchor``, the patches of all pictures counted on, one picture after the other."""
        pictures, patches = self.source.shape
        return self.anchor + patches * torch.arange(pictures, device=self.anchor.device)[:, None]

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
        prefix = torch.arange(self.prefix, device=index.device).expand(len(index), -1)
        return replace(
            self,
            x=take(self.x, torch.cat([prefix, index + self.prefix], 1)),
            size=take(self.size, index),
            source=self._source(into),
            anchor=take(self.anchor, index),
            dropped=True,
            visible=None if self.visible is None else take(self.visible, index),
        )

    def regroup(self, values: Tensor, into: Tensor, anchor: Tensor) -> TokenState:
        """New slots of any making, such as a weighted sum or a soft mixture of the old ones.

        ``values`` (B, k, C); ``into`` (B, K) int64 names the new slot that stands for each old one, -1 if none does;
        ``anchor`` (B, k) int64: the old slot at whose place each new one stands, -1 for none. A new slot is as visible
        as that old one. Where that was added and stands for no patch, but patches have joined it, the first of these
        is the new slot's place.
        """
        b, k = anchor.shape
        at = torch.where(into < 0, k, into)  # one more slot takes what is dropped
        size = self.size.new_zeros(b, k + 1).scatter_add(1, at, self.size)[:, :k]
        source = self._source(into)
        places = torch.where(anchor < 0, -1, take(self.anchor, anchor.clamp_min(0)))
        if self.added:
            places = torch.where((places < 0) & (anchor >= 0) & (size > 0), self._first(source, k), places)
        seen = None if self.visible is None else take(self.visible, anchor.clamp_min(0)).masked_fill(anchor < 0, 1)
        return replace(
            self,
            x=self._with_prefix(values),
            size=size,
            source=source,
            anchor=places,
            merged=True,
            dropped=True,
            visible=seen,
        )

    def merge_pairs(self, gone: Tensor, into: Tensor) -> TokenState:
        """The tokens ``gone`` (B, r) int64 merge into the tokens ``into`` (B, r), as means weighted by size; slots stay
        in their order. Both count from the first of the prefix on, none of which is among them."""
        p = self.prefix
        # Of the whole of x, so that the values need not be copied once more behind the prefix.
        merged = merge_pairs(self.x, gone, into, pad(self.size, (p, 0), value=1.0))
        anchor, size = merged.anchor[:, p:] - p, merged.size[:, p:].to(self.size.dtype)
        source, places = self._source(merged.source[:, p:] - p), take(self.anchor, anchor)
        if self.added:
            places = torch.where((places < 0) & (size > 0), self._first(source, anchor.shape[1]), places)
        return replace(
            self,
            x=merged.tokens,
            size=size,
            source=source,
            anchor=places,
            merged=True,
            visible=None if self.visible is None else take(self.visible, anchor),
        )

    def add(self, values: Tensor, held: bool = False) -> TokenState:
        """M more slots with ``values`` (B, M, C) that stand for no patch. They come last, but for those that are held;
        if ``held`` they come after these too, and no reducer gets to see them."""
        b, m = values.shape[:2]
        at = self.num_slots if held else self.num_slots - self.held

        def with_new(rows: Tensor, new: Tensor) -> Tensor:
            return torch.cat([rows[:, :at], new, rows[:, at:]], 1)

        return replace(
            self,
            x=self._with_prefix(with_new(self.slots, values.to(self.x.dtype))),
            size=with_new(self.size, self.size.new_zeros(b, m)),
            anchor=with_new(self.anchor, self.anchor.new_full((b, m), -1)),
            visible=None if self.visible is None else with_new(self.visible, self.visible.new_ones(b, m)),
            added=self.added + m,
            held=self.held + m * held,
        )

    @property
    def withheld(self) -> TokenState:
        """The state as reducers get it: the held slots are at the end of its prefix."""
        if not self.held:
            return self
        free = self.num_slots - self.held
        return replace(
            self,
            x=torch.cat([self.x[:, : self.prefix], self.slots[:, free:], self.slots[:, :free]], 1),
            size=self.size[:, :free],
            anchor=self.anchor[:, :free],
            visible=None if self.visible is None else self.visible[:, :free],
            prefix=self.prefix + self.held,
            held=0,
        )

    def given_back(self, held: int) -> TokenState:
        """Undoes ``withheld`` after a reducer: the last ``held`` of the prefix are the last slots, and held, again."""
        if not held:
            return self
        prefix = self.prefix - held
        bare = replace(self, x=torch.cat([self.x[:, :prefix], self.slots], 1), prefix=prefix)
        return replace(bare.add(self.x[:, prefix : self.prefix], held=True), added=self.added)

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

    def key_bias(self, dtype: torch.dtype, proportional: bool = True) -> Tensor | None:
        """(B, 1, 1, P + K), to be added to the products of queries and keys; None where that would be 0 throughout.

        If ``proportional``, and once something has merged, it holds the log of the size, 0 for the prefix and for slots
        of no patch: a slot then counts as often as the patches it stands for (ToMe's proportional attention, arXiv
        2210.09461). Slots that are not ``visible`` count ``HIDDEN`` times.
        """
        bias = self.size.clamp_min(1).log() if proportional and self.merged else None
        if self.visible is not None:
            seen = (self.visible + HIDDEN * (1 - self.visible)).log()
            bias = seen if bias is None else bias + seen
        return None if bias is None else pad(bias, (self.prefix, 0)).to(dtype)[:, None, None]

    def _with_prefix(self, values: Tensor) -> Tensor:
        return torch.cat([self.x[:, : self.prefix], values], 1)

    def _source(self, into: Tensor) -> Tensor:
        if not self.dropped:
            return take(into, self.source)
        return torch.where(self.source < 0, -1, take(into, self.source.clamp_min(0)))

    def _first(self, source: Tensor, k: int) -> Tensor:
        """(B, k): the first patch of each of ``k`` slots by ``source`` (B, N), N where a slot has none."""
        b, n = source.shape
        patch = torch.arange(n, device=source.device).expand(b, n)
        first = source.new_full((b, k + 1), n)
        return first.scatter_reduce(1, torch.where(source < 0, k, source), patch, "amin")[:, :k]

    def _nearest(self) -> Tensor:
        """(B, N): the slot whose anchor is nearest to each patch."""
        h, w = self.grid
        patch = torch.arange(h * w, device=self.anchor.device)
        down = patch[:, None].div(w, rounding_mode="floor") - self.anchor.div(w, rounding_mode="floor")[:, None]
        across = patch[:, None] % w - (self.anchor % w)[:, None]
        far = (down**2 + across**2).masked_fill((self.anchor < 0)[:, None], h * h + w * w)
        return far.argmin(2)
