"""What every bottleneck is: vectors in, codes out, and the way back from ids alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vistok.core.codes import BitOrder, CodeFormat, Codes
from vistok.core.quantize import count_ids, perplexity, usage

MOST_COUNTED = 2**20
"""Codes above which a bottleneck keeps no counts of their use."""


class Bottleneck(nn.Module):
    """Vectors (B, N, ``dim``) to ``Codes``; the contract that all members keep:

    - ``ids_to_z(codes.ids)`` equals ``codes.z``, bit for bit, in training too (under ``torch.compile`` up to rounding,
      as its kernels may round otherwise);
    - all is computed in float32, under autocast and in a model of another dtype; weights and tables stay float32
      when the model is cast, and ``codes.z`` is float32;
    - tokens that ``mask`` marks False get the id -1 and the vector 0, and count in no loss, average or meter;
    - what changes a table other than by gradient (moving averages, new rows for dead codes) happens at the beginning
      of a training forward, never between a look-up and the use of its result. So a bottleneck must not be inside
      activation checkpointing.

    A member implements ``quantize`` and ``lookup``, and ``renew`` where it has something to renew.
    """

    dim: int
    """Channels of the vectors that come in (``codes.z`` has as many, but for ``Gaussian``)."""
    sizes: tuple[int, ...] = ()
    """How many values an id may take, by column; () for continuous codes."""
    bit_order: BitOrder | None = None
    counts: Tensor

    def forward(self, z: Tensor, mask: Tensor | None = None, grid: tuple[int, int] | None = None) -> Codes:
        """``z`` (B, N, dim) of any float dtype; ``mask`` (B, N) bool; ``grid``: rows and columns, if N is a map's.

        Raises ValueError for another shape.
        """
        if z.dim() != 3 or z.shape[2] != self.dim:
            raise ValueError(f"z: got shape {tuple(z.shape)}, must be (B, N, {self.dim})")
        if mask is not None and mask.shape != z.shape[:2]:
            raise ValueError(f"mask: got shape {tuple(mask.shape)}, must be {tuple(z.shape[:2])} as z has tokens")
        if grid is not None and grid[0] * grid[1] != z.shape[1]:
            raise ValueError(f"grid: got {grid[0]} x {grid[1]}, which has not the {z.shape[1]} tokens of z")
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            if self.training:
                self.renew(z.detach(), mask)
            out, ids, losses = self.quantize(z, mask, grid)
        if mask is not None:
            out = out.masked_fill(~mask[..., None], 0)
        return Codes(ids, out, self.format(grid), mask, losses)

    def ids_to_z(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """(B, M, D) float32: the vectors of ``ids`` (B, N) or (B, N, C), 0 where an id is below 0.

        Residual codes may have fewer columns, codes of several scales fewer scales (whole ones) than were made. Raises
        ValueError for ids that cannot be, and for continuous codes, which have none.
        """
        if not self.sizes:
            raise ValueError("ids: codes of this bottleneck are continuous, they have no ids")
        columns = ids if ids.dim() == 3 else ids[..., None]
        if ids.dim() not in (2, 3) or columns.shape[2] > len(self.sizes):
            raise ValueError(f"ids: got shape {tuple(ids.shape)}, must be (B, N, {len(self.sizes)}), or (B, N) for one")
        if not torch.compiler.is_compiling() and ids.numel():
            for size, column in zip(self.sizes, columns.unbind(2), strict=False):
                if int(column.max()) >= size:
                    raise ValueError(f"ids: got {int(column.max())}, must be below {size}")
        with torch.autocast(ids.device.type, enabled=False):
            return self.lookup(ids, grid)

    def format(self, grid: tuple[int, int] | None = None) -> CodeFormat:
        """What must be known of the ids to read them."""
        return CodeFormat(self.sizes, self.bit_order, grid)

    def bits(self) -> int:
        """Bits of one token; 32 a channel for continuous codes."""
        return self.format().bits if self.sizes else 32 * self.dim

    def meters(self, reset: bool = False) -> dict[str, float]:
        """``usage`` (share of codes that occurred) and ``perplexity`` of the training forwards since the last reset.

        Means over tables where there are several; {} where nothing is counted.
        """
        tables = [m for m in self.modules() if isinstance(m, Bottleneck) and "counts" in m._buffers]
        found = [(float(usage(m.counts)), float(perplexity(m.counts))) for m in tables]
        if reset:
            for m in tables:
                m.counts.zero_()
        if not found:
            return {}
        return {
            name: sum(values) / len(found)
            for name, values in zip(("usage", "perplexity"), zip(*found, strict=True), strict=True)
        }

    # What a member writes -------------------------------------------------------------------------------------------

    def quantize(
        self, z: Tensor, mask: Tensor | None, grid: tuple[int, int] | None
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Vectors with their gradient, ids (-1 where masked), and weighted losses, of ``z`` (B, N, dim) float32."""
        raise NotImplementedError

    def lookup(self, ids: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """Exactly the vectors that ``quantize`` gave with ``ids``."""
        raise NotImplementedError

    def renew(self, z: Tensor, mask: Tensor | None) -> None:
        """Before a training forward on ``z`` (detached): change what is not changed by gradient."""

    # What members use -----------------------------------------------------------------------------------------------

    def count_up_to(self, size: int) -> None:
        """Keep counts of ids below ``size``, unless they are too many."""
        if size <= MOST_COUNTED:
            self.register_buffer("counts", torch.zeros(size, dtype=torch.int64))

    def count(self, ids: Tensor) -> None:
        """Add ``ids`` to the counts, in training."""
        if self.training and "counts" in self._buffers:
            self.counts.add_(count_ids(ids, len(self.counts)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves between devices as asked, but stays float32."""

        def keep(t: Tensor) -> Tensor:
            made = fn(t)
            return made if made.dtype == t.dtype else t.to(made.device)

        return super()._apply(keep, recurse)


def mean_square(a: Tensor, b: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over real tokens and channels of (a - b)^2, both (B, N, D)."""
    square = (a - b).square()
    if mask is None:
        return square.mean()
    weight = mask[..., None].to(square.dtype)
    return (square * weight).sum() / (weight.sum() * square.shape[2]).clamp_min(1)


def without(ids: Tensor, mask: Tensor | None) -> Tensor:
    """``ids`` (B, N) or (B, N, C), -1 where ``mask`` (B, N) is False."""
    if mask is None:
        return ids
    return ids.masked_fill(~(mask if ids.dim() == 2 else mask[..., None]), -1)


def rows_of(ids: Tensor, table: Tensor) -> Tensor:
    """(..., D): rows ``ids`` (...) of ``table``, 0 where an id is below 0."""
    found = nn.functional.embedding(ids.clamp_min(0), table)
    return found.masked_fill((ids < 0)[..., None], 0)
