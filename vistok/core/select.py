"""Which tokens stay: every function returns positions (B, K) int64 into the N tokens of a picture.

Here: rankings, groups, rows, suppression, duplicates, chance. ``vistok.core.greedy`` has the greedy set selections
(max-min, max-sum, facility location, DPP), ``vistok.core.cluster`` density peaks and k-medoids; both are exported here
too. ``mask`` (B, N) bool is False at padded tokens, which are never selected. Ties break by the lower index.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vistok.core.cluster import dpc_knn, k_medoids
from vistok.core.greedy import WHOLE, facility_location, farthest_points, greedy_dpp, greedy_dpp_features, max_sum
from vistok.core.greedy import similarity_rows as _similarity_rows
from vistok.core.tensors import check_k, gram, ranking, take, unit

__all__ = [
    "dpc_knn",
    "drop_duplicates_even_odd",
    "facility_location",
    "farthest_points",
    "greedy_dpp",
    "greedy_dpp_features",
    "k_medoids",
    "max_sum",
    "nms",
    "random",
    "rows",
    "topk",
    "topk_per_group",
]


def topk(scores: Tensor, k: int, mask: Tensor | None = None) -> Tensor:
    """(B, k): the ``k`` best of ``scores`` (B, N), best first."""
    check_k(k, scores.shape[1], mask)
    return ranking(scores, mask)[:, :k]


def topk_per_group(
    scores: Tensor, groups: Tensor | Sequence[int], budgets: Tensor, mask: Tensor | None = None
) -> Tensor:
    """(B, K): from each group its ``budgets`` (B, G) int best tokens by ``scores`` (B, N), K = the sum of the budgets.

    ``groups``: a group number 0..G-1 for each token, (B, N) or (N,) int64; or the sizes of G contiguous groups. Group
    after group, best first within a group. ValueError if a budget is above its group's real tokens, or if the budgets
    of two pictures do not have the same sum.
    """
    b, n = scores.shape
    g = budgets.shape[1]
    budgets = budgets.to(scores.device, torch.int64).expand(b, g)
    if not isinstance(groups, Tensor):
        if len(groups) != g or sum(groups) != n:
            raise ValueError(f"groups: got sizes {list(groups)}, must be {g} sizes that add up to {n} tokens")
        sizes = torch.tensor(list(groups), device=scores.device)
        groups = torch.arange(g, device=scores.device).repeat_interleave(sizes)
    groups = groups.expand(b, n)
    if n and (int(groups.min()) < 0 or int(groups.max()) >= g):
        raise ValueError(f"groups: got {int(groups.min())}..{int(groups.max())}, must be in 0..{g - 1}")
    if mask is not None:
        groups = torch.where(mask, groups, g)
    count = scores.new_zeros(b, g + 1, dtype=torch.int64).scatter_add_(1, groups, torch.ones_like(groups))
    if bool((budgets < 0).any()) or bool((budgets > count[:, :g]).any()):
        raise ValueError("budgets: must be between 0 and the number of real tokens in each group")
    totals = budgets.sum(1)
    if b and bool((totals != totals[0]).any()):
        raise ValueError(f"budgets: got sums {totals.tolist()}, must be the same for every picture of the batch")
    k = int(totals[0]) if b else 0

    order = ranking(scores)
    by_group, where = groups.gather(1, order).sort(dim=1, stable=True)
    rank = torch.arange(n, device=scores.device) - (count.cumsum(1) - count).gather(1, by_group)
    limit = torch.cat([budgets, budgets.new_zeros(b, 1)], 1).gather(1, by_group)
    chosen = (rank < limit).int().sort(dim=1, descending=True, stable=True).indices[:, :k]
    return order.gather(1, where.gather(1, chosen))


def rows(scores: Tensor, grid: tuple[int, int], k: int, mask: Tensor | None = None) -> Tensor:
    """(B, k * w): all tokens of the ``k`` grid rows with the largest sum of ``scores`` (B, h * w), best row first.

    A row with a padded token is never taken, since it would not be complete.
    """
    h, w = grid
    if h * w != scores.shape[1]:
        raise ValueError(f"grid: got {h} x {w}, which has not the {scores.shape[1]} tokens of scores")
    row_mask = None if mask is None else mask.view(-1, h, w).all(2)
    best = topk(scores.reshape(-1, h, w).sum(2), k, row_mask)
    return (best[:, :, None] * w + torch.arange(w, device=scores.device)).flatten(1)


def nms(scores: Tensor, features: Tensor, k: int, threshold: float | Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, k): walk down ``scores`` (B, N); each token accepted removes the candidates that resemble it.

    Resemble: cosine distance of ``features`` (B, N, D), in [0, 2], below ``threshold``; one number, or (k,) or (B, k)
    to adapt it to the order of acceptance (AgilePruner). Order of acceptance; if candidates run out, the best-scored of
    the removed ones follow. With threshold 0 this is ``topk``.
    """
    b, n = scores.shape
    check_k(k, n, mask)
    limits = torch.as_tensor(threshold, dtype=torch.float64, device=scores.device).expand(b, k)
    similarity = _similarity_rows(unit(features), k)
    place = torch.arange(n, device=scores.device).expand(b, n)
    rank = torch.empty_like(place).scatter_(1, ranking(scores, mask), place)
    # One integer to minimise: candidates by rank, then removed ones by rank (+ n), then taken and padded ones (+ 2n).
    key = rank if mask is None else rank + 2 * n * ~mask
    picks = scores.new_empty(b, k, dtype=torch.int64)
    for step in range(k):
        pick = key.argmin(1, keepdim=True)
        picks[:, step] = pick[:, 0]
        near = (1 - similarity(pick[:, 0])).clamp_min(0) < limits[:, step, None]
        key = torch.where(near & (key < n) & (key.gather(1, pick) < n), key + n, key)
        key = key.scatter(1, pick, 3 * n)
    return picks


def drop_duplicates_even_odd(
    x: Tensor,
    k: int,
    step: int = 8,
    mask: Tensor | None = None,
    order: Literal["raster", "author"] = "raster",
) -> Tensor:
    """(B, k): drop tokens of ``x`` (B, N, D) that others resemble, a few a round, until ``k`` are left.

    A round holds the tokens at even places of the list against those at odd places (cosine) and drops the ``step`` (or
    as many as are left to drop) even ones whose best match is closest. The list starts as given; "raster" keeps it in
    that order, "author" (VisPruner, FlashVLM) makes it, after each round, the surviving even ones by falling
    similarity, then the odd ones - which changes who meets whom. Result in list order.
    """
    b, n, _ = x.shape
    check_k(k, n, mask)
    if step < 1:
        raise ValueError(f"step: got {step}, must be 1 or more")
    if order not in ("raster", "author"):
        raise ValueError(f"order: got {order!r}, must be 'raster' or 'author'")
    features = unit(x.detach())
    # All products at once where several rounds read them: at N = 576 three times as fast as new products each round.
    table = gram(features).flatten(1) if n - k > 3 * step and n <= WHOLE else None
    left = x.new_full((b,), n, dtype=torch.int64) if mask is None else mask.sum(1)
    places = torch.arange(n, device=x.device).expand(b, n)
    items = places if mask is None else places.gather(1, (~mask).int().sort(dim=1, stable=True).indices)
    while True:
        width = int(left.max()) if b else k  # pictures with fewer real tokens have padding at the end of the list
        items = items[:, :width]
        drop = torch.minimum((left - k).clamp_max(step), left // 2 + left % 2)
        if width <= max(k, 1):  # a single token has none to be held against
            return items[:, :k]
        place = torch.arange(width, device=x.device)
        pad = place >= left[:, None]
        even, odd = items[:, ::2], items[:, 1::2]
        if table is None:
            best = torch.bmm(take(features, even), take(features, odd).transpose(1, 2))
        else:
            best = table.gather(1, (even[:, :, None] * n + odd[:, None]).flatten(1)).view(b, even.shape[1], -1)
        best = best.masked_fill(pad[:, None, 1::2], -torch.inf).amax(2).masked_fill(pad[:, ::2], -torch.inf)
        by_best = best.sort(dim=1, descending=True, stable=True).indices
        rank = torch.empty_like(by_best).scatter_(1, by_best, place[: by_best.shape[1]].expand_as(by_best))
        key = place.expand(b, width).clone()
        if order == "author":
            # A picture that is done keeps its list; the others put even ones (by similarity) before odd ones.
            resorted = key.clone()
            resorted[:, ::2] = rank
            resorted[:, 1::2] += width
            key = torch.where(drop[:, None] > 0, resorted, key)
        key[:, ::2] = torch.where(rank < drop[:, None], 3 * width, key[:, ::2])
        key = torch.where(pad, 4 * width, key)
        items = items.gather(1, key.sort(dim=1, stable=True).indices)
        left = left - drop


def random(
    batch: int, n: int, k: int, seed: int, mask: Tensor | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """(batch, k): ``k`` of ``n`` tokens, uniformly, without replacement, drawn on the CPU so that devices agree."""
    scores = torch.rand(batch, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)
    return topk(scores, k, mask)
