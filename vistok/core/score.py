"""How much each token matters: one number a token, from attention, keys, text or reconstruction.

``cls_*``, ``received``, ``last_query``: the rows and columns of softmax attention that most pruning papers rank by
(FasterVLM arXiv 2412.01818, VTC-CLS arXiv 2412.05819, HiPrune arXiv 2508.00553, FastV arXiv 2403.06764).
``pagerank``: Brin and Page, 1998; on attention maps: Zero-TPrune arXiv 2305.17328, AIM arXiv 2412.03248.
``reconstruction_error``: ridge regression on a few basis tokens (ApET).
All scores are in the precision of their input, at least float32 where products are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vistok.core.tensors import gram, length, unit, upcast


def cls_mean(cls_attention: Tensor) -> Tensor:
    """(B, N): class-token attention (B, H, N) averaged over heads."""
    return cls_attention.mean(1)


def cls_sum(layers: Sequence[Tensor]) -> Tensor:
    """(B, N): head means of the class-token attention of several layers, each (B, H, N), added up in order."""
    if not layers:
        raise ValueError("layers: got none, at least one layer's class-token attention is needed")
    total = cls_mean(layers[0])
    for layer in layers[1:]:
        total = total + cls_mean(layer)
    return total


def received(attention: Tensor, query_mask: Tensor | None = None) -> Tensor:
    """(B, N): attention (B, H, Q, N) that each key receives, mean over heads and queries.

    ``query_mask`` (B, Q) bool leaves queries out (False); a picture with none left scores 0.
    """
    if query_mask is None:
        return attention.mean((1, 2))
    weights = query_mask.to(attention.dtype)
    total = torch.einsum("bhqn,bq->bn", attention, weights)
    return total / (attention.shape[1] * weights.sum(1, keepdim=True)).clamp_min(1)


def last_query(attention: Tensor, query_mask: Tensor | None = None) -> Tensor:
    """(B, N): the row of the last query (the last real one under ``query_mask`` (B, Q)) of attention (B, H, Q, N),
    mean over heads. A picture without a real query takes query 0."""
    rows = attention.mean(1)
    if query_mask is None:
        return rows[:, -1]
    steps = torch.arange(rows.shape[1], device=rows.device)
    last = torch.where(query_mask, steps, 0).amax(1)
    return rows.gather(1, last[:, None, None].expand(-1, 1, rows.shape[2]))[:, 0]


def entropy(attention: Tensor) -> Tensor:
    """(...): Shannon entropy in nats of the last axis of non-negative ``attention`` (..., N), scaled to sum 1 first.

    Between 0 (all mass on one token) and log N; an all-zero row has entropy 0.
    """
    attention = upcast(attention)
    share = attention / attention.sum(-1, keepdim=True).clamp_min(torch.finfo(attention.dtype).tiny)
    nats: Tensor = torch.special.entr(share)
    return nats.sum(-1)


def key_norm(keys: Tensor) -> Tensor:
    """(B, N): Euclidean length of each key (B, N, Dk)."""
    return length(keys)


def cosine(x: Tensor, y: Tensor | None = None) -> Tensor:
    """(B, N, M): cosine similarity of rows of ``x`` (B, N, D) and ``y`` (B, M, D); without ``y``, of ``x`` with itself
    (exactly symmetric, its diagonal exactly 1). Zero rows have similarity 0 to all."""
    a = unit(x)
    if y is not None:
        return torch.bmm(a, unit(y).transpose(1, 2))
    own = (length(x) > 0).to(a.dtype)
    return torch.diagonal_scatter(gram(a), own, dim1=1, dim2=2)


def text_similarity(
    features: Tensor, text: Tensor, text_mask: Tensor | None = None, reduce: Literal["mean", "max"] = "mean"
) -> Tensor:
    """(B, N): cosine of each token of ``features`` (B, N, D) to the text tokens (B, T, D), their mean or maximum.

    ``text_mask`` (B, T) bool is False at padding. A picture without text scores 0.
    """
    similarity = cosine(features, text)
    if text_mask is None:
        text_mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    count = text_mask.sum(1)[:, None]
    if reduce == "mean":
        return (similarity * text_mask[:, None]).sum(-1) / count.clamp_min(1)
    if reduce != "max":
        raise ValueError(f"reduce: got {reduce!r}, must be 'mean' or 'max'")
    if not text.shape[1]:
        return similarity.new_zeros(similarity.shape[:2])
    best = similarity.masked_fill(~text_mask[:, None], -torch.inf).amax(-1)
    return torch.where(count > 0, best, 0)


def pagerank(
    attention: Tensor,
    iterations: int,
    damping: float = 1.0,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """(..., N): where the mass is after ``iterations`` steps of a walk that follows ``attention`` (..., N, N).

    ``p <- damping * p A + (1 - damping) * w``, started at ``w``. Rows of A sum to 1, so p keeps sum 1: a token matters
    if tokens that matter attend to it. ``damping`` is the share that follows the attention (1 = all of it, the plain
    power iteration; 0.85 in the web ranking). ``weights`` (..., N), non-negative, makes it the weighted PageRank:
    w = weights / sum; uniform otherwise. One undamped step from uniform weights is the mean received attention.
    ``mask`` (..., N) bool, which may have size 1 where the map has heads, leaves tokens out that it marks False, as if
    their rows and columns were not there and the other rows scaled to sum 1 again (no second map is made): they have
    rank 0.
    """
    if not 0 <= damping <= 1:
        raise ValueError(f"damping: got {damping}, must be between 0 and 1")
    if iterations < 0:
        raise ValueError(f"iterations: got {iterations}, must be 0 or more")
    attention = upcast(attention)
    if weights is None:
        n = attention.shape[-1]
        start = attention.new_full(attention.shape[:-1], 1 / n)
    else:
        start = weights.to(attention.dtype)
        start = (start / start.sum(-1, keepdim=True)).expand(attention.shape[:-1])
    if mask is None:
        rank = start.unsqueeze(-2)
        for _ in range(iterations):
            rank = damping * (rank @ attention) + (1 - damping) * start.unsqueeze(-2)
        return rank.squeeze(-2)
    seen = mask.to(attention.dtype).expand(start.shape)
    start = start * seen / (start * seen).sum(-1, keepdim=True)
    given = (attention @ seen.unsqueeze(-1)).squeeze(-1).clamp_min(torch.finfo(attention.dtype).tiny)
    rank = start
    for _ in range(iterations):
        walked = ((rank / given).unsqueeze(-2) @ attention).squeeze(-2)
        rank = damping * walked * seen + (1 - damping) * start
    return rank


def reconstruction_error(x: Tensor, basis: Tensor, ridge: float = 1e-5) -> Tensor:
    """(B, N): Euclidean distance of each token of ``x`` (B, N, D) to its ridge regression on ``basis`` (B, k, D).

    ``W = x S^T (S S^T + ridge I)^-1``, error ``|x - W S|``; as ``ridge`` (> 0, in squared feature units) goes to 0,
    the distance to the span of the basis. The k x k system is solved in float64: it is ill-conditioned where basis
    tokens are nearly equal.
    """
    if ridge <= 0:
        raise ValueError(f"ridge: got {ridge}, must be greater than 0")
    x, basis = upcast(x), upcast(basis)
    wide = basis.double()
    system = wide @ wide.transpose(1, 2)
    system.diagonal(dim1=1, dim2=2).add_(ridge)
    products = torch.bmm(basis, x.transpose(1, 2)).double()
    weights = torch.cholesky_solve(products, torch.linalg.cholesky(system)).to(x.dtype)
    return length(x - torch.bmm(weights.transpose(1, 2), basis))
