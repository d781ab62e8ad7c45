"""FlexAttention on patterns: block lists from the pattern's numbers, never from a dense mask.

On a CPU it takes some twenty seconds to compile and has no backward pass; it is for GPUs. Grids are laid out tile by
tile, so that a block of 128 tokens is a spatial tile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention
from torch.nn.attention.flex_attention import BlockMask as FlexMask

from vistok.core.attention.grid import Grid
from vistok.core.attention.layout import TileOrder
from vistok.core.attention.pattern import BlockMask, Pattern
from vistok.core.attention.simulate import tile_map
from vistok.core.tensors import upcast

TILES = {1: (128,), 2: (8, 16), 3: (4, 4, 8)}
"""By number of axes, the spatial tile of a block of 128 tokens."""


def flex(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Output, and if ``return_lse`` the log-sum-exp, as ``mix_tiles``.

    Raises ValueError for patterns other than grids and blocks, and on a CPU where gradients are asked for, or the
    log-sum-exp: FlexAttention has neither there.
    """
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if q.device.type == "cpu" and (trains or return_lse):
        what = "a gradient" if trains else "return_lse"
        raise ValueError(f"executor: got 'flex' for {what} on a CPU, must be 'tiles' there")
    grouped = q.shape[1] != k.shape[1]
    if isinstance(pattern, Grid):
        mask, queries, keys = _grid_mask(pattern, q.device)
        q, k, v = queries.permute(q), keys.permute(k), keys.permute(v)
    elif isinstance(pattern, BlockMask):
        mask = _block_mask(pattern, q.device)
    else:
        raise ValueError(f"executor: got 'flex' for {type(pattern).__name__}, which takes grids and BlockMask")
    wanted = AuxRequest(lse=True) if return_lse else None
    found = _compiled()(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped, return_aux=wanted)
    out, lse = (found[0], found[1].lse.to(upcast(q[:0]).dtype)) if return_lse else (found, None)
    if not isinstance(pattern, Grid):
        return out, lse
    return queries.unpermute(out), None if lse is None else queries.unpermute(lse)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)  # with sizes left open the CPU code does not compile


@lru_cache(maxsize=32)
def _grid_mask(pattern: Grid, device: torch.device) -> tuple[FlexMask, TileOrder, TileOrder]:
    """Block lists, and the orders of queries and keys that they are for."""
    tile = TILES[len(pattern.axes)]
    dilation = tuple(axis.dilation for axis in pattern.axes)
    queries, keys = (
        TileOrder.of(tuple(lengths), tile, dilation)
        for lengths in ((len(a.first) for a in pattern.axes), (a.num_keys for a in pattern.axes))
    )
    some = whole = torch.ones(1, 1, dtype=torch.bool)
    for axis, t in zip(pattern.axes, tile, strict=True):
        along = tile_map(axis, t, t)
        some, whole = (
            (a[:, None, :, None] & b[:, None]).flatten(2).flatten(0, 1)
            for a, b in zip((some, whole), along, strict=True)
        )
    order_q, order_k = (order.order.to(device) for order in (queries, keys))

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        at, to = order_q[query], order_k[key]
        return (to >= 0) & pattern.allows(b * 0, h * 0, at.clamp_min(0), to.clamp_min(0))

    partial = (some & ~whole)[None, None].to(device)
    return _lists(partial, whole[None, None].to(device), (128, 128), seen, len(order_q), len(order_k)), queries, keys


def _block_mask(pattern: BlockMask, device: torch.device) -> FlexMask:
    mask = pattern.mask.to(device)
    ragged = torch.zeros_like(mask)
    if pattern.num_keys % pattern.block[1]:
        ragged[..., -1] = True
    last_query, last_key = pattern.num_queries - 1, pattern.num_keys - 1

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= last_key) & pattern.allows(b, h, query.clamp_max(last_query), key.clamp_max(last_key))

    return _lists(mask & ragged, mask & ~ragged, pattern.block, seen, pattern.num_queries, pattern.num_keys)


def _lists(partial: Tensor, whole: Tensor, block: tuple[int, int], seen: Any, queries: int, keys: int) -> FlexMask:
    """``partial`` and ``whole`` (B or 1, H or 1, blocks of queries, blocks of keys) bool as lists of block numbers."""
    numbers = [blocks.byte().argsort(stable=True, dim=3, descending=True).int() for blocks in (partial, whole)]
    counts = [blocks.sum(3, dtype=torch.int32) for blocks in (partial, whole)]
    return FlexMask.from_kv_blocks(
        counts[0],
        numbers[0],
        counts[1],
        numbers[1],
        BLOCK_SIZE=block,
        mask_mod=seen,
        seq_lengths=(queries, keys),
    )
