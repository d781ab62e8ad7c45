"""Patterns on Triton's kernels: grids tile by tile, blocks of tokens, and lists of keys.

Tiles of queries visit the tiles of keys that hold some pair of the pattern, and a mask is worked out inside from a few
numbers a token; no mask of N x N is made. Grids are laid out so that a tile is a spatial one, as for FlexAttention.
Tested in Triton's interpreter on a CPU alone, and compiled for compute capability 9.0: not run on a GPU here, and no
speed is claimed. Tiles of 64 with heads of 128 in float32 ask for some 200 KB of shared memory, which few GPUs have.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vistok.core.attention.axes import Axis
from vistok.core.attention.grid import Grid
from vistok.core.attention.layout import TileOrder
from vistok.core.attention.pattern import BlockMask, Dense, Pattern, TokenIndex
from vistok.core.attention.simulate import tile_map
from vistok.core.tensors import upcast

TILES = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}
"""By number of axes, the spatial tile of 64 tokens."""
TILE = 64
"""Tokens of a tile where the pattern has no blocks of its own."""
LISTED = 32
"""Keys of a list that are worked on at a time."""
WIDEST = 256
"""Head dimension."""


@dataclass(frozen=True, eq=False)
class TileLists:
    """A pattern as the kernels take it. P queries and R keys, in ``queries`` and ``keys`` order where these are set."""

    tiles: Tensor
    """(B or 1, H or 1, tiles of queries, tiles of keys) bool: which pairs of tiles hold something."""
    low: Tensor
    high: Tensor
    """(axes, P) int32"""
    place: Tensor
    """(axes, R) int32: query i sees key j if low[i] <= place[j] <= high[i] on each axis."""
    block: tuple[int, int]
    """Queries and keys of a tile."""
    queries: TileOrder | None = None
    keys: TileOrder | None = None

    @cached_property
    def forward(self) -> tuple[Tensor, Tensor]:
        """How many tiles of keys each tile of queries visits, and which, int32."""
        return _numbers(self.tiles)

    @cached_property
    def backward(self) -> tuple[Tensor, Tensor]:
        """How many tiles of queries visit each tile of keys, and which."""
        return _numbers(self.tiles.transpose(2, 3))


def _numbers(tiles: Tensor) -> tuple[Tensor, Tensor]:
    count = tiles.sum(3, dtype=torch.int32)
    longest = max(1, int(count.max()))
    order = tiles.byte().sort(dim=3, descending=True, stable=True).indices
    return count.contiguous(), order[..., :longest].int().contiguous()


def fits(pattern: Pattern, q: Tensor, v: Tensor, trains: bool) -> str:
    """Why the kernels cannot run ``pattern`` on queries (B, H, Nq, d) and values (B, Hk, Nk, dv); "" if they can.
    ``trains``: whether gradients are asked for."""
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"{q.dtype}, must be float16, bfloat16 or float32"
    if max(q.shape[3], v.shape[3]) > WIDEST:
        return f"heads of {max(q.shape[3], v.shape[3])}, must be {WIDEST} at most"
    if isinstance(pattern, BlockMask) and not all(16 <= n <= 128 and n & (n - 1) == 0 for n in pattern.block):
        return f"blocks of {pattern.block}, must be 16, 32, 64 or 128"
    if isinstance(pattern, TokenIndex) and trains:
        return "a gradient through lists of keys, must be forward alone"
    if not isinstance(pattern, Grid | BlockMask | Dense | TokenIndex):
        return f"{type(pattern).__name__}, which takes grids, blocks, dense ones and lists of keys"
    return ""


def triton_attention(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float | None) -> tuple[Tensor, Tensor]:
    """(B, H, Nq, dv) and the log-sum-exp (B, H, Nq) float32, as ``mix_tiles``; gradients reach q, k and v.

    Shapes as in ``attend``, which checks them. Raises ValueError for what ``fits`` tells, and for tensors that are not
    on a GPU.
    """
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if reason := fits(pattern, q, v, trains):
        raise ValueError(f"executor: got 'triton' for {reason}")
    if q.device.type != "cuda" and not os.environ.get("TRITON_INTERPRET"):
        raise ValueError(f"executor: got 'triton' for tensors on {q.device}, must be another one there")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(pattern, TokenIndex):
        return _decode(q, k, v, pattern, scale)
    lists = _grid_lists(pattern, q.device) if isinstance(pattern, Grid) else _line_lists(pattern, q.device)
    if lists.queries is None or lists.keys is None:
        out, lse = _Blocks.apply(q, k, v, lists, scale)
        return out, lse
    out, lse = _Blocks.apply(lists.queries.permute(q), lists.keys.permute(k), lists.keys.permute(v), lists, scale)
    return lists.queries.unpermute(out), lists.queries.unpermute(lse)


@lru_cache(maxsize=32)
def _grid_lists(pattern: Grid, device: torch.device) -> TileLists:
    axes = pattern.axes
    tile, dilation = TILES[len(axes)], tuple(axis.dilation for axis in axes)
    lengths = [len(a.first) for a in axes], [a.num_keys for a in axes]
    queries, keys = (TileOrder.of(tuple(n), tile, dilation) for n in lengths)
    tiles = torch.ones(1, 1, dtype=torch.uint8)
    for axis, t in zip(axes, tile, strict=True):
        tiles = torch.kron(tiles, tile_map(axis, t, t)[0].byte())
    low, high, place = [], [], []
    at_query, at_key = (_places(order, n) for order, n in zip((queries, keys), lengths, strict=True))
    for axis, query, key in zip(axes, at_query, at_key, strict=True):
        low.append(torch.where(queries.order < 0, 0, axis.first[query]))
        high.append(torch.where(queries.order < 0, -1, axis.last[query]))
        place.append(torch.where(keys.order < 0, -1, key // axis.dilation))
    lows, highs, at = (torch.stack(rows).int().to(device) for rows in (low, high, place))
    size = math.prod(tile)
    return TileLists(tiles.bool()[None, None].to(device), lows, highs, at, (size, size), queries, keys)


def _places(order: TileOrder, lengths: list[int]) -> list[Tensor]:
    """Along each axis, where the token at each place of the order is; padding is at 0."""
    found, rest = [], order.order.clamp_min(0)
    for n in reversed(lengths):
        found.append(rest % n)
        rest = rest // n
    return found[::-1]


def _line_lists(pattern: Pattern, device: torch.device) -> TileLists:
    """Of blocks, and of dense patterns."""
    _, _, nq, nk = pattern.dense_shape
    place = torch.arange(nk)
    if isinstance(pattern, BlockMask):
        block, tiles = pattern.block, pattern.mask
        axis = Axis(nk, 1, torch.zeros(nq, dtype=torch.int64), torch.full((nq,), nk - 1))
    else:
        causal = isinstance(pattern, Dense) and pattern.causal
        last = torch.arange(nq) + nk - nq if causal else torch.full((nq,), nk - 1)
        axis, block = Axis(nk, 1, torch.zeros_like(last), last), (TILE, TILE)
        tiles = tile_map(axis, *block)[0][None, None]
    low, high, place = (t[None].int().to(device) for t in (axis.first, axis.last, place))
    return TileLists(tiles.to(device), low, high, place, block)


def _power(width: int) -> int:
    """What a tile's rows of ``width`` are padded to; products need 16 at least."""
    return max(16, 1 << (width - 1).bit_length())


def _strides(lists: tuple[Tensor, Tensor]) -> tuple[int, int, int]:
    """From picture to picture and head to head in the counts, and the length of a list."""
    count, numbers = lists
    b, h, tiles = count.shape
    return tiles * h if b > 1 else 0, tiles if h > 1 else 0, numbers.shape[3]


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lists: TileLists, scale: float) -> tuple[Tensor, Tensor]:
        from vistok.core.attention import triton_kernels as kernels

        q, k, v = (t.contiguous() for t in (q, k, v))
        b, h, nq, _ = q.shape
        out = q.new_empty(b, h, nq, v.shape[3])
        lse = torch.empty(b, h, nq, dtype=torch.float32, device=q.device)
        grid = (math.ceil(nq / lists.block[0]), b * h)
        given = (*_tables(lists), *lists.forward, *_strides(lists.forward), *_sizes(q, k, v), scale)
        kernels.forward[grid](q, k, v, out, lse, *given, **_constants(lists, q, v))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.of = lists, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        from vistok.core.attention import triton_kernels as kernels

        q, k, v, out, lse = ctx.saved_tensors
        lists, scale = ctx.of
        if dout is None and dlse is None:
            return (None,) * 5
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        delta = (upcast(dout) * upcast(out)).sum(3)
        delta = delta if dlse is None else delta - dlse
        sums = lse.nan_to_num(neginf=0)
        dq, dk, dv = (torch.empty_like(t, dtype=torch.float32) for t in (q, k, v))
        (m, n), (b, h, nq, _) = lists.block, q.shape
        given, sizes = (q, k, v, dout, sums, delta.contiguous()), (*_sizes(q, k, v), scale)
        constants = _constants(lists, q, v)
        grid = (math.ceil(nq / m), b * h)
        numbers = (*_tables(lists), *lists.forward, *_strides(lists.forward))
        kernels.backward_queries[grid](*given, dq, *numbers, *sizes, **constants)
        grid = (math.ceil(k.shape[2] / n), b * k.shape[1])
        numbers = (*_tables(lists), *lists.backward, *_strides(lists.backward))
        kernels.backward_keys[grid](*given, dk, dv, *numbers, *sizes, **constants)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _tables(lists: TileLists) -> tuple[Tensor, Tensor, Tensor]:
    return lists.low, lists.high, lists.place


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    return q.shape[1], q.shape[1] // k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3]


def _constants(lists: TileLists, q: Tensor, v: Tensor) -> dict[str, Any]:
    m, n = lists.block
    widen = q.dtype == torch.bfloat16 and bool(os.environ.get("TRITON_INTERPRET"))
    widths = {"D": _power(q.shape[3]), "DV": _power(v.shape[3])}
    # Tiles of float32 fill the shared memory without any that wait for their turn.
    ahead = {"num_stages": 1} if q.dtype == torch.float32 else {}
    return {"AXES": len(lists.low), "M": m, "N": n, "WIDEN": widen, **widths, **ahead}


@torch.no_grad()
def _decode(q: Tensor, k: Tensor, v: Tensor, pattern: TokenIndex, scale: float) -> tuple[Tensor, Tensor]:
    from vistok.core.attention import triton_kernels as kernels

    q, k, v = (t.contiguous() for t in (q, k, v))
    b, h, nq, _ = q.shape
    index = pattern.index.to(q.device).contiguous()
    own = index.shape[2] if index.dim() == 4 else 1
    listed = index.shape[-1]
    per_head, per_query = own * listed if index.shape[1] > 1 else 0, listed if index.dim() == 4 else 0
    per_picture = index.shape[1] * own * listed if index.shape[0] > 1 else 0
    last = k.shape[2] - nq if pattern.causal else k.shape[2]
    out = q.new_empty(b, h, nq, v.shape[3])
    lse = torch.empty(b, h, nq, dtype=torch.float32, device=q.device)
    strides = per_picture, per_head, per_query, listed, last
    widths = {"N": LISTED, "D": _power(q.shape[3]), "DV": _power(v.shape[3])}
    kernels.decode[(nq, b * h)](q, k, v, out, lse, index, *strides, *_sizes(q, k, v), scale, **widths)
    return out, lse
