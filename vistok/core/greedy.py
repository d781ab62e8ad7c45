"""Greedy set selections: each step adds the token that is best given those already chosen.

* ``farthest_points``: max-min diversity, the farthest-first traversal (Gonzalez 1985), within factor 2 of the best
  k-center radius; started at the most isolated token in DivPrune, weighted by token in ZOO-Prune.
* ``max_sum``: least total similarity to the chosen ones (ToDRE).
* ``facility_location``: coverage (MMTok); greedy is within 1 - 1/e of the optimum (Nemhauser, Wolsey, Fisher 1978),
  run lazily (Minoux 1978).
* ``greedy_dpp``: MAP of a determinantal point process by an incremental Cholesky factor (Chen, Zhang, Zhou,
  arXiv 1709.05135).

Cost: the similarity rows of the picks are all that is needed of the N x N matrix. Where many rows are asked for, the
whole (symmetric) matrix is still cheaper, since a matrix product reads the features once; see ``similarity_rows``.
(Guessing the next picks, to multiply several rows at a time, was tried and is no faster at N = 576, K = 64.)
A choice has no gradient: inputs that require one are taken as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from vistok.core.tensors import PANEL, check_k, gram, length, take, unit, upcast

Metric = Literal["euclidean", "cosine"]

LAZY_START = 16
"""Columns whose gain ``facility_location`` brings up to date in its first round (8 to 32 measure alike at N = 576)."""

WHOLE = 4096
"""Most tokens of which the whole Gram matrix is held (64 MiB a picture)."""


def similarity_rows(x: Tensor, k: int) -> Callable[[Tensor], Tensor]:
    """A function ``pick (B,) -> (B, N)``: products of the row ``pick`` of ``x`` (B, N, D) with all rows.

    For ``k`` calls. From about N / 16 of them on the Gram matrix is computed first (N x N memory, at most ``WHOLE``
    tokens); below, each call reads all features.
    """
    x = x.detach()
    n = x.shape[1]
    if 16 * k >= n and n <= WHOLE:
        return _rows_of(gram(x))
    # Row times matrix: 4 times as fast as matrix times column in the batched product of the CPU.
    return lambda pick: torch.bmm(take(x, pick[:, None]), x.transpose(1, 2))[:, 0]


def _rows_of(products: Tensor) -> Callable[[Tensor], Tensor]:
    every = torch.arange(len(products), device=products.device)
    return lambda pick: products[every, pick]


def _first(x: Tensor, start: Tensor | None, mask: Tensor | None) -> Tensor:
    """(B,) first pick: ``start``, or the longest row."""
    if start is None:
        norm = length(x)
        return (norm if mask is None else norm.masked_fill(~mask, -1)).argmax(1)
    if start.shape != x.shape[:1]:
        raise ValueError(f"start: got shape {tuple(start.shape)}, must be ({len(x)},), one position a picture")
    if bool((start < 0).any()) or bool((start >= x.shape[1]).any()):
        raise ValueError(f"start: got {start.tolist()}, must be positions in 0..{x.shape[1] - 1}")
    if mask is not None and not bool(mask.gather(1, start[:, None]).all()):
        raise ValueError("start: names a masked token, must name real ones")
    return start


def farthest_points(
    x: Tensor,
    k: int,
    start: Tensor | Literal["isolated"] | None = None,
    metric: Metric = "euclidean",
    mask: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """(B, k) in pick order: each next token of ``x`` (B, N, D) is the one farthest from its nearest chosen one.

    ``start`` (B,) int64 is the first pick, by default the row of largest Euclidean length; "isolated" starts at the
    token farthest from its nearest other one. "euclidean" compares squared distances, "cosine" 1 - cosine. ``weight``
    (B, N), 0 or more, multiplies the distance of each token; what rounding leaves of a distance then counts as 0.
    """
    b, n, _ = x.shape
    check_k(k, n, mask)
    if isinstance(start, str) and start != "isolated":
        raise ValueError(f"start: got {start!r}, must be positions, 'isolated' or None")
    if weight is not None and (weight.shape != x.shape[:2] or bool((weight < 0).any())):
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, must be ({b}, {n}) and nowhere negative")
    picks = torch.empty(b, k, dtype=torch.int64, device=x.device)
    if not k:
        return picks
    pick = None if isinstance(start, str) else _first(x, start, mask)
    if metric == "cosine":
        x = unit(x.detach())
    elif metric == "euclidean":
        x = upcast(x.detach())
    else:
        raise ValueError(f"metric: got {metric!r}, must be 'euclidean' or 'cosine'")
    square = x.square().sum(-1) if metric == "euclidean" else x.new_ones(b, n)
    if pick is not None:
        products = similarity_rows(x, k)
    else:  # needs all pairs: one Gram matrix for the start and the steps
        whole = gram(x) if n <= WHOLE else None
        products = similarity_rows(x, k) if whole is None else _rows_of(whole)
        pick = _isolated(x, square, whole, mask)
    # |x - c|^2 = |x|^2 + |c|^2 - 2 x.c; for unit rows it is 2 (1 - cosine), the same ranking.
    nearest = x.new_full((b, n), torch.inf)
    barred = x.new_zeros(b, n) if mask is None else x.new_zeros(b, n).masked_fill_(~mask, -torch.inf)
    for step in range(k):
        if step:
            pick = ((nearest if weight is None else nearest * weight) + barred).argmax(1)
        picks[:, step] = pick
        barred.scatter_(1, pick[:, None], -torch.inf)
        scale = square + square.gather(1, pick[:, None])
        distance = scale - 2 * products(pick)
        if weight is not None:
            distance = torch.where(distance > 16 * torch.finfo(x.dtype).eps * scale, distance, 0)
        nearest = torch.minimum(nearest, distance.clamp_min_(0))
    return picks


def _isolated(x: Tensor, square: Tensor, products: Tensor | None, mask: Tensor | None) -> Tensor:
    """(B,) the row of ``x`` (B, N, D) farthest from its nearest other row; ``square`` (B, N) as in the distance.

    ``products``: the Gram matrix, or None to compute it panel by panel without holding it.
    """
    n = x.shape[1]
    nearest = []
    for i in range(0, n, PANEL):
        j = min(i + PANEL, n)
        panel = torch.bmm(x[:, i:j], x.transpose(1, 2)) if products is None else products[:, i:j]
        distance = torch.sub(square[:, None], panel, alpha=2)
        distance[:, torch.arange(j - i), torch.arange(i, j)] = torch.inf
        if mask is not None:
            distance.masked_fill_(~mask[:, None], torch.inf)
        nearest.append(square[:, i:j] + distance.amin(2))
    gap = torch.cat(nearest, 1)
    return (gap if mask is None else gap.masked_fill(~mask, -torch.inf)).argmax(1)


def max_sum(x: Tensor, k: int, start: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """(B, k) in pick order: each next token of ``x`` (B, N, D) has the least sum of cosines to those chosen.

    ``start`` (B,) int64 is the first pick, by default the row of largest Euclidean length.
    """
    b, n, _ = x.shape
    check_k(k, n, mask)
    picks = torch.empty(b, k, dtype=torch.int64, device=x.device)
    if not k:
        return picks
    pick = _first(x, start, mask)
    x = unit(x.detach())
    products = similarity_rows(x, k)
    total = x.new_zeros(b, n) if mask is None else x.new_zeros(b, n).masked_fill_(~mask, torch.inf)
    for step in range(k):
        if step:
            pick = total.argmin(1)
        picks[:, step] = pick
        total += products(pick)
        total.scatter_(1, pick[:, None], torch.inf)
    return picks


def facility_location(matrices: Tensor | Sequence[Tensor], k: int, exclude: Tensor | None = None) -> Tensor:
    """(B, k) in pick order: greedy maximisation of ``f(S) = sum over rows of max(0, max over s in S of C[row, s])``.

    ``matrices``: one (B, R, N) or several with the same N, whose rows are stacked (scale them beforehand to weigh
    them). ``exclude`` (B, N) bool is True at columns that must never be picked. Once every row is covered all gains
    are 0 and the lowest free index is taken.

    Same picks as re-evaluating every gain at every step: a gain never grows, so an old one is an upper bound, and only
    the columns whose bound reaches the best up-to-date gain are evaluated.
    """
    parts = [m for m in ([matrices] if isinstance(matrices, Tensor) else matrices) if m.shape[1]]
    if not parts:
        raise ValueError("matrices: got no rows to cover, at least one matrix (B, R, N) with R > 0 is needed")
    # Columns become contiguous, since single columns are read.
    columns = torch.cat([upcast(m.detach()).transpose(1, 2) for m in parts], 2)
    b, n, r = columns.shape
    check_k(k, n, None if exclude is None else ~exclude)
    picks = torch.empty(b, k, dtype=torch.int64, device=columns.device)
    every = torch.arange(b, device=columns.device)
    best = columns.new_zeros(b, 1, r)
    bound = columns.clamp_min(0).sum(2)  # of each gain; -inf at columns that are excluded or picked
    if exclude is not None:
        bound.masked_fill_(exclude, -torch.inf)
    scratch = torch.empty_like(columns)
    width = LAZY_START
    for step in range(k):
        if step:
            bound, width = _refresh(columns, best, bound, width, scratch)
        pick = bound.argmax(1)
        picks[:, step] = pick
        bound.scatter_(1, pick[:, None], -torch.inf)
        best = torch.maximum(best, columns[every, pick][:, None])
    return picks


def _refresh(columns: Tensor, best: Tensor, bound: Tensor, width: int, scratch: Tensor) -> tuple[Tensor, int]:
    """Bring bounds up to date, the largest first, until the largest of all are exact; twice as many in each round.

    ``width``: the columns of the last round of the step before. Returns the new bounds (B, N), the lower ones possibly
    still old, and the columns of the last round.
    """
    b, n, r = columns.shape
    # What is exact already: a gain that was 0 cannot fall further.
    exact = torch.where(bound == 0, bound, -torch.inf)
    stale = bound.masked_fill(bound == 0, -torch.inf)
    first = torch.arange(0, b * n, n, device=columns.device)[:, None]
    width, following = 0, max(LAZY_START, width // 2)  # a step needs about as many as the one before: start with half
    while bool((stale.amax(1) >= exact.amax(1)).any()):
        width, following = following, 2 * following
        if 2 * width >= n:  # gathering costs as much as it saves
            gain = torch.sub(columns, best, out=scratch).clamp_min_(0).sum(2)
            return gain.masked_fill_(bound == -torch.inf, -torch.inf), width
        value, at = stale.topk(width, dim=1, sorted=False)
        chosen = scratch.view(b * n, r)[: b * width]
        torch.index_select(columns.view(b * n, r), 0, (first + at).flatten(), out=chosen)
        gain = chosen.view(b, width, r).sub_(best).clamp_min_(0).sum(2)
        # A picture that is done meanwhile has only -inf left to offer: those keep what is known of them.
        exact.scatter_(1, at, torch.where(value == -torch.inf, exact.gather(1, at), gain))
        stale.scatter_(1, at, -torch.inf)
    return torch.maximum(stale, exact), width


def greedy_dpp(kernel: Tensor, k: int, mask: Tensor | None = None) -> Tensor:
    """(B, k) in pick order: each step adds the token that most raises det of the chosen part of ``kernel`` (B, N, N).

    ``kernel`` is symmetric positive semi-definite. Once what is left adds no volume (rank reached), the lowest free
    index is taken.
    """
    if kernel.dim() != 3 or kernel.shape[1] != kernel.shape[2]:
        raise ValueError(f"kernel: got shape {tuple(kernel.shape)}, must be (B, N, N)")
    kernel = upcast(kernel.detach())
    every = torch.arange(len(kernel), device=kernel.device)
    return _dpp(kernel.diagonal(dim1=1, dim2=2), lambda pick: kernel[every, pick], k, mask)


def greedy_dpp_features(features: Tensor, k: int, quality: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """``greedy_dpp`` of the kernel ``q_i q_j cos(x_i, x_j)`` of ``features`` (B, N, D) and ``quality`` (B, N) > 0."""
    x = unit(features.detach())
    # The diagonal of cosines is exactly 1 (0 for zero rows): rounding must not break the tie of the first pick.
    diagonal = (length(features) > 0).to(x.dtype)
    if quality is not None:
        x = x * quality.detach().to(x.dtype).unsqueeze(-1)
        diagonal = diagonal * quality.detach().to(x.dtype).square()
    return _dpp(diagonal, similarity_rows(x, k), k, mask)


def _dpp(diagonal: Tensor, kernel_row: Callable[[Tensor], Tensor], k: int, mask: Tensor | None) -> Tensor:
    b, n = diagonal.shape
    check_k(k, n, mask)
    volume = diagonal if mask is None else diagonal.masked_fill(~mask, 0)
    # ``volume`` is what each token would add, its squared distance to the span of the chosen ones; below ``floor``, in
    # proportion to its own length, it is rounding noise and counts as 0. ``spent`` stands in for it then: 0, or -inf
    # where a token is chosen or padded.
    floor = volume * torch.finfo(volume.dtype).eps * n
    spent = torch.zeros_like(volume) if mask is None else torch.zeros_like(volume).masked_fill_(~mask, -torch.inf)
    factor = volume.new_zeros(b, k, n)
    picks = torch.empty(b, k, dtype=torch.int64, device=volume.device)
    for step in range(k):
        own, pick = torch.where(volume > floor, volume, spent).max(1)
        picks[:, step] = pick
        spent.scatter_(1, pick[:, None], -torch.inf)
        row = kernel_row(pick)
        if step:
            done = factor[:, :step]
            mine = done.gather(2, pick[:, None, None].expand(-1, step, 1))
            row = row - torch.bmm(mine.transpose(1, 2), done)[:, 0]
        row = row * torch.where(own > 0, own.rsqrt(), 0)[:, None]
        factor[:, step] = row
        volume = torch.addcmul(volume, row, row, value=-1)
        volume.scatter_(1, pick[:, None], 0)
    return picks
