"""The parts of an attention map that scores need, from queries and keys, without the map.

A model run with fused attention returns no weights. Scores need single rows (class token, last query, question), means
over rows and columns, or a walk along the map; all are recomputed from q and k: rows directly, the others in blocks of
queries. Grouped-query
keys (fewer key heads than query heads) are not repeated. Softmax is in float32 whatever the input (float64 stays).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.core.tensors import upcast


def attention_rows(
    q: Tensor,
    k: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """(B, H, Q, M): softmax rows of the queries ``q`` (B, H, Q, d) over all keys ``k`` (B, Hk, M, d), Hk dividing H.

    ``scale`` multiplies the products, by default d ** -0.5. ``mask``: additive, broadcastable to (B, H, Q, M) (a bool
    mask is read as True = may attend). ``places`` (B, Q) int64 makes it causal: the position of each query among the
    keys; it sees keys up to its own. Memory O(H Q M): for few queries. A row with nothing to attend to is 0.
    """
    b, h, queries, d = q.shape
    key_heads, m = k.shape[1:3]
    if h % key_heads:
        raise ValueError(f"k: got {key_heads} heads, must divide the {h} heads of q")
    scale = d**-0.5 if scale is None else scale
    grouped = (upcast(q) * scale).reshape(b, key_heads, h // key_heads * queries, d)
    logits = (grouped @ upcast(k).transpose(2, 3)).view(b, h, queries, m)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    if places is not None:
        later = torch.arange(m, device=q.device) > places[:, None, :, None]
        logits = logits.masked_fill_(later, -torch.inf)
    weights = torch.softmax(logits, -1)
    if mask is not None:
        weights = weights.masked_fill(logits.amax(-1, keepdim=True) == -torch.inf, 0)
    return weights


def class_row(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """(B, H, N): the first query of ``q`` (B, H, 1 + N, d) over all keys ``k`` (B, Hk, 1 + N, d), less its own column.

    Softmax over class token and patches, so a row sums to less than 1. Heads taken as one: pass H = 1 and full width.
    """
    return attention_rows(q[:, :, :1], k, scale)[:, :, 0, 1:]


def attention_marginals(
    q: Tensor,
    k: Tensor,
    scale: float | None = None,
    block: int = 64,
    *,
    mask: Tensor | None = None,
    places: Tensor | None = None,
    query_mask: Tensor | None = None,
    prefix: int = 0,
) -> tuple[Tensor, Tensor]:
    """Column and row means of the attention map of ``q`` (B, H, Q, d) and ``k`` (B, Hk, M, d): (B, M) and (B, Q).

    *Received* (B, M): mean over heads and queries of what each key gets. *Given* (B, Q): each query's mean over heads
    and over the keys after the first ``prefix`` (the class token), so sum / (M - prefix). ``scale``, ``mask`` and
    ``places`` as in ``attention_rows``; ``query_mask`` (B, Q) bool leaves queries out of *received* (False).
    ``block`` queries are worked on at a time: memory O(H block M).
    """
    b, _, queries, _ = q.shape
    m = k.shape[2]
    if block < 1:
        raise ValueError(f"block: got {block}, must be 1 or more")
    if not 0 <= prefix < m:
        raise ValueError(f"prefix: got {prefix}, must leave at least one of the {m} keys")
    k = upcast(k)
    received = k.new_zeros(b, m)
    given = k.new_empty(b, queries)
    for start in range(0, queries, block):
        part = slice(start, start + block)
        part_mask = mask if mask is None or mask.shape[-2] == 1 else mask[..., part, :]
        weights = attention_rows(q[:, :, part], k, scale, part_mask, None if places is None else places[:, part])
        weights = weights.mean(1)
        given[:, part] = weights[..., prefix:].mean(2)
        if query_mask is not None:
            weights = weights * query_mask[:, part, None]
        received += weights.sum(1)
    count = queries if query_mask is None else query_mask.sum(1, keepdim=True).clamp_min(1)
    return received / count, given


def attention_pagerank(
    q: Tensor,
    k: Tensor,
    temperature: float,
    iterations: int,
    scale: float | None = None,
    block: int = 64,
    *,
    mask: Tensor | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    """(B, H, M): ``vistok.core.score.pagerank`` by head of the causal attention of M tokens to one another.

    ``q`` (B, H, M, d) and ``k`` (B, Hk, M, d) of the same tokens; attention is softmax(logits / ``temperature``), each
    token seeing those up to itself. Starts uniform, follows the attention ``iterations`` times, and sums to 1
    throughout. Tokens that ``mask`` (B, M) marks False are neither queries nor keys and have rank 0. ``allowed``
    (B, M, M) bool: which keys each query sees, where that is not those up to itself. ``scale`` as in
    ``attention_rows``. The map is made anew for every step, ``block`` queries at a time: memory O(H block M).
    """
    b, h, m, d = q.shape
    if temperature <= 0:
        raise ValueError(f"temperature: got {temperature}, must be greater than 0")
    if iterations < 0:
        raise ValueError(f"iterations: got {iterations}, must be 0 or more")
    if block < 1:
        raise ValueError(f"block: got {block}, must be 1 or more")
    if k.shape[2] != m:
        raise ValueError(f"k: got {k.shape[2]} tokens, must be the {m} of q")
    scale = (d**-0.5 if scale is None else scale) / temperature
    k = upcast(k)
    real = torch.ones(b, m, dtype=torch.bool, device=q.device) if mask is None else mask
    rank = (real.to(k.dtype) / real.sum(1, keepdim=True).clamp_min(1))[:, None].expand(b, h, m)
    places = torch.arange(m, device=q.device).expand(b, m)
    for _ in range(iterations):
        after = torch.zeros_like(rank)
        for start in range(0, m, block):
            end = min(start + block, m)
            seen = end if allowed is None else m  # causal: no query of the block sees a key beyond it
            visible = None if mask is None else mask[:, None, None, :seen]
            until: Tensor | None = places[:, start:end]
            if allowed is not None:
                visible, until = (allowed[:, start:end] & real[:, None])[:, None], None
            weights = attention_rows(q[:, :, start:end], k[:, :, :seen], scale, visible, until)
            after[:, :, :seen] += (rank[:, :, None, start:end] @ weights)[:, :, 0]
        rank = after
    return rank
