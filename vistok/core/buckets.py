"""Figures by group: by relative size, by how much detail there is. What a mean over all hides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d


@dataclass(frozen=True)
class Bins:
    """Means of values in half-open bins, in ascending order."""

    edges: tuple[float, ...]
    means: tuple[float, ...]
    """NaN for a bin without values."""
    counts: tuple[int, ...]
    overall: float
    """Mean over the values in all bins: large bins count more. NaN if there are none."""

    @property
    def headline(self) -> float:
        """Mean of the bins' means, each counting the same; NaN where a bin is empty."""
        return sum(self.means) / len(self.means)


def bin_of(ratios: Tensor, edges: Sequence[float]) -> Tensor:
    """(N,) int64: the bin of each of ``ratios``, an edge belonging to the upper one; -1 outside of all."""
    if len(edges) < 2 or any(a >= b for a, b in pairwise(edges)):
        raise ValueError(f"edges: got {tuple(edges)}, must be two numbers or more, ascending")
    exact = ratios if ratios.is_floating_point() else ratios.double()
    # In the precision of the ratios: else 0.02 in float32 would lie below an edge of 0.02.
    found = torch.bucketize(exact, torch.tensor(edges, dtype=exact.dtype), right=True) - 1
    return found.masked_fill(found == len(edges) - 1, -1)


def bin_by_ratio(values: Tensor, ratios: Tensor, edges: Sequence[float]) -> Bins:
    """Means of ``values`` (N,) by the bin of ``ratios`` (N,); those outside of all bins are left out."""
    group = bin_of(ratios, edges)
    members = [values[group == i].double() for i in range(len(edges) - 1)]
    inside = values[group >= 0].double()
    return Bins(
        tuple(float(e) for e in edges),
        tuple(float(one.mean()) if len(one) else math.nan for one in members),
        tuple(len(one) for one in members),
        float(inside.mean()) if len(inside) else math.nan,
    )


def detail(images: Tensor, cell: int = 16) -> Tensor:
    """(B, h, w): how much goes on in each cell of ``cell`` x ``cell`` px: mean absolute second difference, 0 or more.

    ``images`` (B, C, H, W) in [0, 1]; what is left over at the right and below does not count.
    """
    x = images.double()
    second = torch.zeros_like(x)
    second[..., 1:-1] = (x[..., :-2] - 2 * x[..., 1:-1] + x[..., 2:]).abs()
    second[..., 1:-1, :] += (x[..., :-2, :] - 2 * x[..., 1:-1, :] + x[..., 2:, :]).abs()
    return avg_pool2d(second.mean(1, keepdim=True), cell)[:, 0]


def error_by_detail(made: Tensor, real: Tensor, parts: int = 3, cell: int = 16) -> Bins:
    """PSNR in dB from the flattest cells to the richest, ``parts`` groups of as many cells by ``detail`` of ``real``.

    Of mean squared errors over a group, 100 dB at most. ``edges`` are shares of the cells. ``overall``: of all cells.
    """
    order = detail(real, cell).flatten().argsort(stable=True)
    error = avg_pool2d((made.double() - real.double()).square().mean(1, keepdim=True), cell).flatten()[order]

    def decibel(part: Tensor) -> float:
        return -10 * math.log10(max(float(part.mean()), 1e-10)) if len(part) else math.nan

    groups = error.tensor_split(parts)
    edges = tuple(i / parts for i in range(parts + 1))
    return Bins(edges, tuple(map(decibel, groups)), tuple(len(g) for g in groups), decibel(error))
