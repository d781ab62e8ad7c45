"""A grid cut into any number of nearly square cells: the layout of uniform choices and of average pooling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vistok.core.allocate import split_budget


def grid_cells(grid: tuple[int, int], count: int) -> tuple[Tensor, Tensor]:
    """Cut ``grid`` (h, w) into ``count`` cells: ``source`` (h * w,) and ``anchor`` (count,), int64 on the CPU.

    Bands of rows, each cut into columns: as many bands as make the cells nearly square, and to each band cells in
    proportion to its rows. ``source`` is each token's cell, ``anchor`` the middle token of each cell, ascending.
    """
    h, w = grid
    bands = min(max(round(math.sqrt(count * h / w)), -(-count // w)), h, count)
    counts = split_budget(_cuts(h, bands).diff()[None], count, capacity=torch.full((1, bands), w))[0]
    band = torch.arange(h) * bands // h
    first = counts.cumsum(0) - counts
    source = first[band][:, None] + torch.arange(w) * counts[band][:, None] // w
    columns = torch.cat([_middle(w, count) for count in counts.tolist()])
    return source.flatten(), _middle(h, bands).repeat_interleave(counts) * w + columns


def _cuts(side: int, parts: int) -> Tensor:
    """(parts + 1,) where the runs begin into which ``place * parts // side`` cuts the places 0..side-1, and the end."""
    return -(-torch.arange(parts + 1) * side // parts)  # ceil


def _middle(side: int, parts: int) -> Tensor:
    """(parts,) the middle place of each run (of an even one, the place before the middle)."""
    cuts = _cuts(side, parts)
    return (cuts[:-1] + cuts[1:] - 1) // 2
