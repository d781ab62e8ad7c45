"""Positions and order of the tokens that stay.

Two policies for position ids after a drop: *keep* them (the tokens stay where they were in the picture; the default of
the host), or *recompact* them (as if the dropped tokens had never been). Position ids may be 1-D RoPE (B, T), Qwen's
three-axis mRoPE (3, B, T), or coordinates on a 2-D grid.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def order(keep: Tensor, policy: Literal["raster", "author"] = "raster") -> Tensor:
    """(B, K): positions in the picture's raster order, or as the author's selection emitted them."""
    if policy == "raster":
        return keep.sort(1).values
    if policy == "author":
        return keep
    raise ValueError(f"policy: got {policy!r}, must be 'raster' or 'author'")


def rest(keep: Tensor, n: int) -> Tensor:
    """(B, n - K) ascending: the positions 0..n-1 that are not among the distinct ``keep`` (B, K)."""
    b, k = keep.shape
    kept = torch.zeros(b, n, dtype=torch.int8, device=keep.device).scatter(1, keep, 1)
    return kept.sort(dim=1, stable=True).indices[:, : n - k]


def keep_positions(positions: Tensor, keep: Tensor) -> Tensor:
    """Position ids of the kept places: (B, T) or (3, B, T) gathered at ``keep`` (B, K) to (B, K) or (3, B, K)."""
    if positions.shape[-2] != keep.shape[0]:
        raise ValueError(f"positions: got shape {tuple(positions.shape)}, must be (..., {keep.shape[0]}, T) as keep")
    return positions.gather(-1, keep.expand(*positions.shape[:-2], *keep.shape))


def recompact_positions(positions: Tensor, keep: Tensor, mask: Tensor | None = None) -> Tensor:
    """Position ids of the kept places with the gaps closed: shapes as ``keep_positions``.

    Each id becomes the row's smallest id plus the number of distinct smaller ids still in use in that row. For 1-D ids
    that is a run without holes. The three axes of mRoPE are counted together, so that text keeps one id on all axes
    and stays behind the picture. ``mask`` (B, K) is False at padding, whose ids do not count and become the smallest.
    """
    kept = keep_positions(positions, keep)
    if not keep.shape[1]:
        return kept
    axes = kept.shape[:-2]
    flat = kept.reshape(-1, *keep.shape).transpose(0, 1)  # (B, axes, K)
    b, a, k = flat.shape
    values = flat.flatten(1)
    if mask is not None:
        real = mask[:, None].expand(b, a, k).flatten(1)
        low = torch.where(real, values, torch.iinfo(values.dtype).max).amin(1, keepdim=True)
        low = torch.where(real.any(1, keepdim=True), low, 0)
        values = torch.where(real, values, low)
    return _close_gaps(values).view(b, a, k).transpose(0, 1).reshape(*axes, b, k)


def _close_gaps(values: Tensor) -> Tensor:
    """Each value of a row (R, n), n > 0, becomes the row's smallest plus the number of distinct smaller ones."""
    ordered, index = values.sort(1)
    step = torch.zeros_like(ordered)
    step[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.empty_like(values).scatter_(1, index, ordered[:, :1] + step.cumsum(1))


def keep_grid(keep: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, K, 2): row and column on ``grid`` (h, w) of the raster positions ``keep`` (B, K)."""
    return torch.stack([keep // grid[1], keep % grid[1]], -1)


def recompact_grid(keep: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, K, 2): row and column of ``keep`` (B, K) on the grid that is left when rows and columns that lost all their
    tokens are closed up."""
    places = keep_grid(keep, grid)
    if not keep.shape[1]:
        return places
    by_axis = places.movedim(2, 1).flatten(0, 1)  # (2B, K): rows and columns close up separately
    closed = _close_gaps(by_axis) - by_axis.amin(1, keepdim=True)
    return closed.view(-1, 2, keep.shape[1]).movedim(1, 2)


def grid_neighbours(index: Tensor, grid: tuple[int, int], wrap: bool = False) -> Tensor:
    """(B, h * w) bool: the left, right, upper and lower neighbours of the raster positions ``index`` (B, A).

    Cells beyond the border do not exist. ``wrap=True`` is the arithmetic of released codes (HiPrune): index - 1 and
    index + 1 run over into the next row, and what falls off the picture is clamped to its first or last token. A
    position of ``index`` is True only if it is the neighbour of another one (or, with ``wrap``, was clamped to itself).
    """
    h, w = grid
    n = h * w
    if wrap:
        near = torch.cat([index - 1, index + 1, index - w, index + w], 1).clamp(0, n - 1)
        exists = torch.ones_like(near, dtype=torch.bool)
    else:
        column = index % w
        near = torch.cat([index - 1, index + 1, index - w, index + w], 1)
        exists = torch.cat([column > 0, column < w - 1, index >= w, index < n - w], 1)
    near = torch.where(exists, near, n)
    return torch.zeros(len(index), n + 1, dtype=torch.bool, device=index.device).scatter(1, near, True)[:, :n]
