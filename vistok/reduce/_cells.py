"""A grid cut into any number of nearly square cells: the layout that ``uniform`` and ``pool`` share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vistok.core.allocate import split_budget
from vistok.host.reducer import Evidence


def cells(evidence: Evidence, keep: int) -> tuple[Tensor, Tensor]:
    """Cut the picture's grid (h, w) into ``keep`` cells: ``source`` (B, h * w) and ``anchor`` (B, keep), int64.

    Bands of rows, each cut into columns: as many bands as make the cells nearly square, and to each band cells in
    proportion to its rows. ``source`` is each token's cell, ``anchor`` the middle token of each cell, ascending.
    Tokens that form no grid are one row.
    """
    n, batch, device = evidence.num_tokens, len(evidence.features), evidence.features.device
    h, w = evidence.grid or (1, n)
    bands = min(max(round(math.sqrt(keep * h / w)), -(-keep // w)), h, keep)
    counts = split_budget(_cuts(h, bands).diff()[None], keep, capacity=torch.full((1, bands), w))[0]
    band = torch.arange(h) * bands // h
    first = counts.cumsum(0) - counts
    source = first[band][:, None] + torch.arange(w) * counts[band][:, None] // w
    columns = torch.cat([_middle(w, count) for count in counts.tolist()])
    anchor = _middle(h, bands).repeat_interleave(counts) * w + columns
    return source.flatten().to(device).expand(batch, n), anchor.to(device).expand(batch, keep)


def _cuts(side: int, parts: int) -> Tensor:
    """(parts + 1,) where the runs begin into which ``place * parts // side`` cuts the places 0..side-1, and the end."""
    return -(-torch.arange(parts + 1) * side // parts)  # ceil


def _middle(side: int, parts: int) -> Tensor:
    """(parts,) the middle place of each run (of an even one, the place before the middle)."""
    cuts = _cuts(side, parts)
    return (cuts[:-1] + cuts[1:] - 1) // 2
