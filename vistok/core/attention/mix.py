"""Attention over tiles: fused attention on each dense problem of a pattern, forward and backward, in memory O(N).

Rows of q, k and v are gathered a few tiles at a time, so that neither the map nor copies of all keys are ever held. The
backward pass makes the weights of those tiles again from the log-sum-exp of each row. Gradients reach q, k, v and the
bias, also through the log-sum-exp, so that what ``merge_lse`` merges trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding

from vistok.core.attention.pattern import Pattern
from vistok.core.attention.tiles import Tiles
from vistok.core.tensors import upcast

CHUNK = {"cpu": 2**20}
"""Elements of q, k and v, or of weights, that are worked on at a time: on a CPU about what its caches hold."""
CHUNK_ELSEWHERE = 2**26


def mix_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    tiles: list[Tiles],
    bias: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(B, H, Nq, dv) and the log-sum-exp of each row (B, H, Nq), float32 at least, of attention over ``tiles``.

    Shapes as in ``attend``, which checks them. A query in no tile gives 0 and -inf. The first derivative is exact.
    """
    out, lse = _Mix.apply(q, k, v, bias, pattern, tiles, q.shape[-1] ** -0.5 if scale is None else scale)
    return out, lse


@dataclass(frozen=True)
class _Chunk:
    """Rows of T problems of one shape, and what is added to their logits."""

    rows: Tensor
    """(T, g, tq) int64 into the rows of q, all pictures and heads; g heads share their keys"""
    keys: Tensor
    """(T, tk) int64 into the rows of k"""
    added: Tensor | None
    """(T or 1, g or 1, tq, tk): bias, and -inf where a key is not seen"""
    at: tuple[Tensor, ...] | None
    """Where in ``bias`` it came from"""


class _Problem:
    """What forward and backward share: the shapes, and the tiles in chunks."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, pattern: Pattern, tiles: list[Tiles]):
        self.shape = q.shape
        self.group = q.shape[1] // k.shape[1]
        self.kv_heads, self.keys = k.shape[1:3]
        self.width = k.shape[3] + v.shape[3]
        self.dtype, self.device = q.dtype, q.device
        self.bias, self.pattern, self.tiles = bias, pattern, tiles
        self.budget = CHUNK.get(q.device.type, CHUNK_ELSEWHERE)

    def chunks(self, weights: bool) -> Iterator[_Chunk]:
        """All tiles, as many at a time as the budget allows. ``weights``: whether these count, or only the rows."""
        batch, heads, queries, _ = self.shape
        for given in self.tiles:
            tiles = given.to(self.device)
            count, tq, tk = len(tiles.queries.start), tiles.queries.length, tiles.keys.length
            kv_copies, group = (self.kv_heads, self.group) if tiles.head is None else (1, 1)
            ids = torch.arange(count * kv_copies * (batch if tiles.picture is None else 1), device=self.device)
            tile, copy = ids % count, ids // count
            picture = copy // kv_copies if tiles.picture is None else tiles.picture[tile]
            first = copy % kv_copies * group if tiles.head is None else tiles.head[tile]
            head = first[:, None] + torch.arange(group, device=self.device)
            kv_head = first // self.group
            rows = tiles.queries.start[tile, None] + ((picture[:, None] * heads + head) * queries)[..., None]
            keys = tiles.keys.start[tile] + ((picture * self.kv_heads + kv_head) * self.keys)[:, None]
            shared = None if tiles.allowed is None else self._as_bias(tiles.allowed[:, None])
            each = (group * tq + tk) * self.width + (group * tq * tk if weights else 0)
            step = max(1, self.budget // each)
            for start in range(0, len(ids), step):
                part = slice(start, start + step)
                added, at = shared, None
                if self.bias is not None or (tiles.masked and shared is None):
                    added, at = self._added(tiles, shared, picture[part], head[part], tile[part])
                yield _Chunk(tiles.queries.at(rows[part]), tiles.keys.at(keys[part]), added, at)

    def _as_bias(self, allowed: Tensor) -> Tensor:
        return torch.zeros(allowed.shape, dtype=self.dtype, device=self.device).masked_fill_(~allowed, -torch.inf)

    def _added(
        self, tiles: Tiles, shared: Tensor | None, picture: Tensor, head: Tensor, tile: Tensor
    ) -> tuple[Tensor | None, tuple[Tensor, ...] | None]:
        """What is added to the logits of a chunk, and where in the bias it comes from."""
        query, key = tiles.queries[tile][:, None, :, None], tiles.keys[tile][:, None, None]
        where = picture[:, None, None, None], head[:, :, None, None], query, key
        added = shared
        if tiles.masked and shared is None:
            b, h = self.pattern.dense_shape[:2]
            own = head if h > 1 else torch.zeros_like(head[:, :1])
            added = self._as_bias(self.pattern.allows(where[0] * (b > 1), own[:, :, None, None], query, key))
        if self.bias is None:
            return added, None
        at = tuple(w if n > 1 else torch.zeros_like(w[:1, :1]) for w, n in zip(where, self.bias.shape, strict=True))
        at = torch.broadcast_tensors(*at)  # type: ignore[no-untyped-call]
        found = self.bias[at].to(self.dtype)
        return found if added is None else found + added, at


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        pattern: Pattern,
        tiles: list[Tiles],
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        problem = _Problem(q, k, v, bias, pattern, tiles)
        out = v.new_zeros(*q.shape[:3], v.shape[3])
        lse = torch.full(q.shape[:3], -torch.inf, dtype=upcast(q[:0]).dtype, device=q.device)
        flat, sums = out.view(-1, v.shape[3]), lse.view(-1)
        flat_q, flat_k, flat_v = (t.reshape(-1, t.shape[3]) for t in (q, k, v))
        with torch.autocast(q.device.type, enabled=False):
            for chunk in problem.chunks(weights=False):
                given = embedding(chunk.rows, flat_q), embedding(chunk.keys, flat_k), embedding(chunk.keys, flat_v)
                mixed, total = _fused(*given, chunk.added, scale)
                flat[chunk.rows] = mixed
                sums[chunk.rows] = total
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.of = pattern, tiles, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, lse = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 7
        dout = torch.zeros_like(out) if dout is None else dout
        with torch.autocast(q.device.type, enabled=False):
            return *_gradients(q, k, v, bias, out, lse, dout, dlse, *ctx.of), None, None, None


def _fused(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of q (T, g, tq, d) over k (T, tk, d), v (T, tk, dv), and its log-sum-exp (T, g, tq)."""
    shape = q.shape[:3]
    if q.device.type == "cpu" and k.shape[2] == v.shape[2]:
        k, v = (t[:, None].expand(-1, shape[1], -1, -1) for t in (k, v))
        added = added if added is None else added.expand(-1, -1, shape[2], -1)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=added, scale=scale)
        return out, lse
    logits = upcast(q.flatten(1, 2) @ k.transpose(1, 2)).view(*shape, -1) * scale
    logits = logits if added is None else logits + added
    lse = logits.logsumexp(3)
    weights = (logits - lse.nan_to_num(neginf=0)[..., None]).exp_()
    return (weights.to(v.dtype).flatten(1, 2) @ v).view(*shape, -1), lse


def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    pattern: Pattern,
    tiles: list[Tiles],
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Of q, k, v and bias."""
    problem = _Problem(q, k, v, bias, pattern, tiles)
    delta = (upcast(dout) * upcast(out)).sum(3)
    delta = (delta if dlse is None else delta - dlse).view(-1)
    sums = lse.nan_to_num(neginf=0).view(-1)
    flat_q, flat_k, flat_v, flat_out = (upcast(t).reshape(-1, t.shape[3]) for t in (q, k, v, dout))
    dq, dk, dv = (torch.zeros_like(t) for t in (flat_q, flat_k, flat_v))
    dbias = None if bias is None else torch.zeros_like(bias, dtype=upcast(bias[:0]).dtype)
    for chunk in problem.chunks(weights=True):
        t, g, tq = chunk.rows.shape
        rows, keys = chunk.rows.view(t, -1), chunk.keys
        queries, above = embedding(rows, flat_q) * scale, embedding(rows, flat_out)
        k_, v_ = embedding(keys, flat_k), embedding(keys, flat_v)
        weights = queries @ k_.transpose(1, 2)
        if chunk.added is not None:
            weights.view(t, g, tq, -1).add_(chunk.added)
        weights.sub_(sums[rows][..., None]).exp_()
        slope = above @ v_.transpose(1, 2)
        slope.sub_(delta[rows][..., None]).mul_(weights)
        dq[rows] = slope @ k_ * scale
        dk.index_add_(0, keys.flatten(), (slope.transpose(1, 2) @ queries).flatten(0, 1))
        dv.index_add_(0, keys.flatten(), (weights.transpose(1, 2) @ above).flatten(0, 1))
        if dbias is not None and chunk.at is not None:
            dbias.index_put_(chunk.at, slope.view(t, g, tq, -1).sum_to_size(chunk.at[0].shape).to(dbias.dtype), True)
    grads = [d.view(t.shape).to(t.dtype) for d, t in zip((dq, dk, dv), (q, k, v), strict=True)]
    return *grads, None if dbias is None or bias is None else dbias.to(bias.dtype)
