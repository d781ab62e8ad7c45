"""Centres of clusters: density peaks with nearest-neighbour densities, k-medoids, and k-means.

``dpc_knn``: Du, Ding, Jia 2016, as used for tokens by TCFormer (arXiv 2204.08680) and Chat-UniVi (arXiv 2311.08046).
``k_medoids``: alternating assignment and medoid update from a farthest-first (KKZ) start, as CenterCLIP
(arXiv 2205.00823). Both need the N x N distances. Who belongs to which centre: ``vistok.core.merge.nearest_slot``.
``k_means``: Lloyd's iterations from a k-means++ start, of one large set of rows.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vistok.core.greedy import farthest_points
from vistok.core.tensors import check_k, gram, ranking, unit, upcast


def _distances(x: Tensor, metric: Literal["euclidean", "cosine"]) -> Tensor:
    """(B, N, N), exactly symmetric with a zero diagonal."""
    if metric == "cosine":
        distance = (1 - gram(unit(x))).clamp_min_(0)
    elif metric == "euclidean":
        products = gram(upcast(x))
        square = products.diagonal(dim1=1, dim2=2)
        distance = (square[:, :, None] + square[:, None] - 2 * products).clamp_min_(0).sqrt_()
    else:
        raise ValueError(f"metric: got {metric!r}, must be 'euclidean' or 'cosine'")
    distance.diagonal(dim1=1, dim2=2).zero_()
    return distance


def dpc_knn(x: Tensor, k: int, neighbours: int = 5, mask: Tensor | None = None) -> Tensor:
    """(B, k): the density peaks of ``x`` (B, N, D), highest first.

    A token's density is exp(-mean squared distance to its ``neighbours`` nearest tokens, itself included), distances
    being Euclidean over sqrt(D); its separation is the distance to the nearest denser token (for the densest of all,
    the largest distance of the picture). Peaks have the largest product of the two. Of equally dense tokens the lower
    index counts as the denser (the published code adds noise instead, which decides alone where ``neighbours`` is 1).
    """
    b, n, d = x.shape
    check_k(k, n, mask)
    if neighbours < 1:
        raise ValueError(f"neighbours: got {neighbours}, must be 1 or more")
    if not k:
        return torch.empty(b, 0, dtype=torch.int64, device=x.device)
    distance = _distances(x, "euclidean") / d**0.5
    if mask is not None:
        distance.masked_fill_(~(mask[:, None] & mask[:, :, None]), torch.inf)
    near = distance.topk(min(neighbours, n), dim=2, largest=False).values.square()
    real = near.isfinite()  # fewer than asked for in a picture with fewer real tokens
    log_density = -torch.where(real, near, 0).sum(2) / real.sum(2).clamp_min(1)
    if mask is not None:
        log_density.masked_fill_(~mask, -torch.inf)
    index = torch.arange(n, device=x.device)
    mine, other = log_density[:, :, None], log_density[:, None]
    denser = (other > mine) | ((other == mine) & (index[None, :] < index[:, None]))
    separation = torch.where(denser, distance, torch.inf).amin(2)
    largest = torch.where(distance.isfinite(), distance, 0).amax((1, 2))
    top = torch.where(denser.any(2), separation, largest[:, None])
    # The product's logarithm: far-apart features would make every density exp(-large) = 0.
    score = log_density + top.log()
    if mask is not None:
        score.masked_fill_(~mask, -torch.inf)
    return ranking(score, mask)[:, :k]


def k_medoids(
    x: Tensor,
    k: int,
    metric: Literal["euclidean", "cosine"] = "euclidean",
    iterations: int = 100,
    mask: Tensor | None = None,
) -> Tensor:
    """(B, k) ascending: tokens of ``x`` (B, N, D) that stand for its clusters.

    Start: the longest row, then farthest-first. Then in turn: every token joins its nearest medoid (a medoid its own
    cluster), and each cluster's new medoid is the member with the least summed distance to the others; until nothing
    changes, at most ``iterations`` times.
    """
    b, n, _ = x.shape
    check_k(k, n, mask)
    if not k:
        return torch.empty(b, 0, dtype=torch.int64, device=x.device)
    medoids = farthest_points(x, k, metric=metric, mask=mask).sort(1).values
    distance = _distances(x, metric)
    index = torch.arange(n, device=x.device).expand(b, n)
    slots = torch.arange(k, device=x.device).expand(b, k)
    for _ in range(iterations):
        own = distance.gather(1, medoids[:, :, None].expand(-1, -1, n)).argmin(1).scatter(1, medoids, slots)
        if mask is not None:
            own = torch.where(mask, own, k)
        cost = torch.where(own[:, :, None] == own[:, None], distance, 0).sum(2)
        least = cost.new_full((b, k + 1), torch.inf).scatter_reduce(1, own, cost, "amin").gather(1, own)
        candidate = torch.where(cost == least, index, n)
        found = index.new_full((b, k + 1), n).scatter_reduce(1, own, candidate, "amin")
        found = found[:, :k].sort(1).values
        if torch.equal(found, medoids):
            break
        medoids = found
    return medoids


def k_means(x: Tensor, k: int, iterations: int = 100, seed: int = 0) -> Tensor:
    """(k, D) float32: centres of the rows of ``x`` (N, D), each the mean of the rows that are nearest to it.

    Start: k rows drawn by k-means++ (each with odds of its squared distance to those drawn before). Then in turn rows
    join their nearest centre (Euclidean; ties to the first) and centres become the means of theirs; one that no row
    joins stays where it is. Until nothing changes, at most ``iterations`` times. Equal seeds give equal centres.
    Memory: N x k.
    """
    x = x.float()
    if x.ndim != 2 or not 1 <= k <= len(x):
        raise ValueError(f"k: got {k} for x of shape {tuple(x.shape)}, must be 1 or more of its (N, D) rows")
    rng = torch.Generator().manual_seed(seed)
    centres = x[torch.randint(len(x), (1,), generator=rng).to(x.device)]
    while len(centres) < k:
        odds = _square_distances(x, centres).amin(1).double().cpu()
        odds = odds if odds.sum() > 0 else torch.ones_like(odds)
        centres = torch.cat([centres, x[torch.multinomial(odds, 1, generator=rng).to(x.device)]])
    for _ in range(iterations):
        own = _square_distances(x, centres).argmin(1)
        count = torch.bincount(own, minlength=k)[:, None]
        means = torch.zeros_like(centres).index_add(0, own, x) / count.clamp_min(1)
        found = torch.where(count > 0, means, centres)
        if torch.equal(found, centres):
            break
        centres = found
    return centres


def _square_distances(x: Tensor, centres: Tensor) -> Tensor:
    """(N, k)"""
    products = x @ centres.T
    return (x.square().sum(1, keepdim=True) + centres.square().sum(1) - 2 * products).clamp_min(0)
