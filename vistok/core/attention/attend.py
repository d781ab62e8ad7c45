"""``attend``: one call for every pattern, with the executor that is fastest where it runs, or the one that is named.

Five executors give the same output: ``dense`` masks the whole map and is the oracle, ``gather`` computes only the pairs
of the pattern, ``tiles`` dense problems that hold them, ``flex`` leaves them to FlexAttention, ``triton`` to kernels of
its own. What ``auto`` takes, ``choose`` says and why; it is logged too, at level DEBUG.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vistok.core.attention.mix import mix_tiles
from vistok.core.attention.pattern import BlockMask, CoarseKV, Dense, Pattern, TokenIndex
from vistok.core.tensors import upcast

Executor = Literal["auto", "dense", "gather", "tiles", "flex", "triton"]

logger = logging.getLogger(__name__)

SPEED = {256: 0.5, 128: 0.4, 64: 0.35, 32: 0.2, 16: 0.1, 8: 0.05, 1: 0.01}
"""On a CPU: pairs a second of a tile of at least so many queries, over those of dense attention. Measured on two cores
that had other work too: where nothing else runs, tiles gain more than is promised here."""
START = 100_000
"""On a CPU: what each kind of tile costs to begin with, in pairs of dense attention."""


@dataclass(frozen=True)
class Choice:
    """An executor, and why it was taken."""

    executor: Executor
    why: str


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    executor: Executor = "auto",
) -> Tensor: ...
@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    bias: Tensor | None = None,
    scale: float | None = None,
    *,
    return_lse: Literal[True],
    executor: Executor = "auto",
) -> tuple[Tensor, Tensor]: ...
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    executor: Executor = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """(B, H, Nq, dv): softmax attention over the keys that ``pattern`` lets each query see; 0 where it sees none.

    ``q`` (B, H, Nq, d), ``k`` (B, Hk, Nk, d), ``v`` (B, Hk, Nk, dv), Hk dividing H: query heads side by side share a
    key head. ``bias``, broadcastable to (B, H, Nq, Nk), is added to the logits; a bias by key, (..., 1, Nk), costs no
    memory of N x N, and its exponential is a weight of the key. ``scale`` of the products is d ** -0.5 by default.
    ``return_lse`` gives the log-sum-exp of each row of logits too, (B, H, Nq) in float32 at least, -inf where nothing
    is seen: see ``merge_lse``. Gradients reach q, k, v and bias through both, to the first order.
    Raises ValueError for shapes that do not fit, and for an executor that cannot run the pattern.
    """
    bias = _check(q, k, v, pattern, bias)
    choice = choose(q, pattern, bias, v) if executor == "auto" else Choice(executor, "asked for")
    if isinstance(pattern, CoarseKV) and choice.executor != "dense":
        out, lse = _by_level(q, k, v, pattern, bias, scale, executor)
        return (out, lse) if return_lse else out
    logger.debug("%s: %s (%s)", type(pattern).__name__, choice.executor, choice.why)
    if choice.executor == "dense" and not return_lse:
        return _fused(q, k, v, pattern, bias, scale)
    if choice.executor == "dense":
        found = _plain(q, k, v, pattern, bias, scale)
    elif choice.executor == "flex":
        if bias is not None:
            raise ValueError("bias: got one with executor 'flex', must be None there")
        from vistok.core.attention.flex import flex

        out, lse_ = flex(q, k, v, pattern, scale, return_lse)
        return out if lse_ is None else (out, lse_)
    elif choice.executor == "triton":
        if bias is not None:
            raise ValueError("bias: got one with executor 'triton', must be None there")
        from vistok.core.attention.triton import triton_attention

        found = triton_attention(q, k, v, pattern, scale)
    elif choice.executor in ("tiles", "gather"):
        tiles = pattern.tiles() if choice.executor == "tiles" else pattern.groups()
        found = mix_tiles(q, k, v, pattern, tiles, bias, scale)
    else:
        raise ValueError(f"executor: got {executor!r}, must be auto, dense, gather, tiles, flex or triton")
    return found if return_lse else found[0]


def attend_grid(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    scale: float | None = None,
    extra_kv: tuple[Tensor, Tensor] | None = None,
    return_lse: bool = False,
    executor: Executor = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``attend`` with heads last: (B, *grid, H, dv) of ``q``, ``k``, ``v`` (B, *grid, H or Hk, d), and if asked for the
    log-sum-exp (B, *grid, H).

    ``extra_kv``: keys (B, E, Hk, d) and values (B, E, Hk, dv) of tokens beside the grid, which every query sees too.
    """
    grid = q.shape[1:-2]
    q, k, v = (t.flatten(1, -3).transpose(1, 2) for t in (q, k, v))
    if extra_kv is not None:
        k, v = (torch.cat([t, more.transpose(1, 2)], 2) for t, more in zip((k, v), extra_kv, strict=True))
        pattern = CoarseKV((pattern, Dense(q.shape[2], extra_kv[0].shape[1])), (0.0, 0.0))
    if return_lse:
        out, lse = attend(q, k, v, pattern, scale=scale, return_lse=True, executor=executor)
        return _heads_last(out, grid), _heads_last(lse, grid)
    return _heads_last(attend(q, k, v, pattern, scale=scale, executor=executor), grid)


def _heads_last(x: Tensor, grid: torch.Size) -> Tensor:
    """``x`` (B, H, N, ...) as (B, *grid, H, ...)."""
    return x.transpose(1, 2).reshape(len(x), *grid, x.shape[1], *x.shape[3:])


def choose(q: Tensor, pattern: Pattern, bias: Tensor | None = None, v: Tensor | None = None) -> Choice:
    """What ``attend`` takes for ``q`` (B, H, Nq, d) and ``v`` (B, Hk, Nk, dv) where it is left to it.

    On a CPU the cheaper of ``dense`` and ``tiles`` by SPEED and START, which were measured. Elsewhere, where nothing
    was measured yet: FlexAttention for grids; on CUDA Triton's kernels for blocks and lists of keys, where Triton is
    there, there is no bias and they fit; tiles for the rest.
    """
    if isinstance(pattern, CoarseKV):
        return Choice("tiles", "each level by its own choice, merged")
    if isinstance(pattern, Dense) and (not pattern.causal or pattern.num_queries == pattern.num_keys):
        return Choice("dense", "the pattern is dense: fused attention")
    if q.device.type == "cuda" and isinstance(pattern, BlockMask | TokenIndex) and bias is None and _has_triton():
        from vistok.core.attention.triton import fits

        # Gradients may be asked of k and v alone; lists then go the safe way.
        if not fits(pattern, q, q if v is None else v, torch.is_grad_enabled()):
            return Choice("triton", f"blocks or lists of keys, not measured on {q.device.type}")
    if isinstance(pattern, TokenIndex) and pattern.index.dim() == 4:
        return Choice("gather", "each query has keys of its own")
    if q.device.type != "cpu":
        from vistok.core.attention.grid import Grid

        flexible = isinstance(pattern, Grid) and bias is None
        return Choice("flex" if flexible else "tiles", f"not measured on {q.device.type}")
    nq, nk = pattern.dense_shape[2:]
    heads = q.shape[0] * q.shape[1]
    cost, computed = 0.0, 0.0
    for tile in pattern.tiles():
        own = (1 if tile.picture is None else pattern.dense_shape[0]) * (
            1 if tile.head is None else pattern.dense_shape[1]
        )
        pairs = tile.pairs / own
        computed += pairs
        speed = next(s for least, s in SPEED.items() if tile.queries.length >= least)
        cost += pairs / speed + START / heads
    share = f"tiles compute {computed / (nq * nk):.1%} of all pairs at a cost of {cost / (nq * nk):.1%}"
    return Choice("tiles" if cost < nq * nk else "dense", share)


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def merge_lse(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of sets of keys, from the output (B, H, N, d) and log-sum-exp (B, H, N) of each.

    The result has the dtype of the outputs, and the log-sum-exp of the union. In any order; a set with -inf changes
    nothing; where all are -inf the output is 0. A constant added to one's log-sum-exp weighs all its keys.
    """
    if not outputs or len(outputs) != len(lses):
        raise ValueError(f"lses: got {len(lses)} for {len(outputs)} outputs, must be one each, and one at least")
    stacked = torch.stack(tuple(lses))
    top = stacked.detach().amax(0).nan_to_num(neginf=0)
    shares = (stacked - top).exp()
    total = shares.sum(0)
    nothing = total == 0
    total = total.masked_fill(nothing, 1)
    merged = sum(upcast(out) * (share / total)[..., None] for out, share in zip(outputs, shares, strict=True))
    assert isinstance(merged, Tensor)
    return merged.to(outputs[0].dtype), (top + total.log()).masked_fill(nothing, -torch.inf)


def _by_level(
    q: Tensor, k: Tensor, v: Tensor, pattern: CoarseKV, bias: Tensor | None, scale: float | None, executor: Executor
) -> tuple[Tensor, Tensor]:
    sizes = pattern.splits
    biases = [None] * len(sizes) if bias is None else _split_bias(bias, sizes)
    outs, lses = [], []
    for level, weight, k_, v_, b in zip(
        pattern.levels, pattern.log_weights, torch.split(k, sizes, 2), torch.split(v, sizes, 2), biases, strict=True
    ):
        out, lse = attend(q, k_, v_, level, b, scale, return_lse=True, executor=executor)
        outs.append(out)
        lses.append(lse + weight)
    return merge_lse(outs, lses)


def _split_bias(bias: Tensor, sizes: list[int]) -> list[Tensor | None]:
    return [*torch.split(bias, sizes, 3)] if bias.shape[3] > 1 else [bias] * len(sizes)


def _added(q: Tensor, pattern: Pattern, bias: Tensor | None) -> Tensor | None:
    """Bias and mask as one: bool, or float with -inf where nothing is seen; None where all is seen."""
    if isinstance(pattern, CoarseKV):
        weights = pattern.log_bias(q.device).to(q.dtype)
        bias = weights.view(1, 1, 1, -1) if bias is None else bias + weights
    if isinstance(pattern, Dense) and not pattern.causal:
        return bias
    seen = pattern.to_dense(q.device)
    return seen if bias is None else torch.where(seen, bias, -torch.inf)


def _fused(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, bias: Tensor | None, scale: float | None) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    if isinstance(pattern, Dense) and pattern.causal and bias is None and pattern.num_queries == pattern.num_keys:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    mask = _added(q, pattern, bias)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    if mask is None or (bias is not None and isinstance(pattern, Dense)):
        return out
    seen = pattern.to_dense(q.device).any(3, keepdim=True)
    return out if bool(seen.all()) else out.masked_fill(~seen, 0)


def _plain(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, bias: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    b, h, nq, d = q.shape
    heads = k.shape[1]
    scale = d**-0.5 if scale is None else scale
    logits = (upcast(q).view(b, heads, -1, d) @ upcast(k).transpose(2, 3)).view(b, h, nq, -1) * scale
    added = _added(q, pattern, bias)
    if added is not None:
        logits = logits.masked_fill(~added, -torch.inf) if added.dtype == torch.bool else logits + added
    nothing = (logits == -torch.inf).all(3)
    lse = logits.masked_fill(nothing[..., None], 0).logsumexp(3).masked_fill(nothing, -torch.inf)
    weights = (logits - lse.masked_fill(nothing, 0)[..., None]).exp()
    out = (weights.view(b, heads, -1, logits.shape[3]) @ upcast(v)).view(b, h, nq, -1)
    return out.to(v.dtype), lse


def _check(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, bias: Tensor | None) -> Tensor | None:
    """ValueError for the first argument that does not fit; the bias with four dimensions."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q: got {q.dim()}, {k.dim()} and {v.dim()} dimensions of q, k, v, must be 4: (B, H, N, d)")
    b, h, nq, d = q.shape
    heads, nk = k.shape[1:3]
    if k.shape[0] != b or k.shape[3] != d or h % heads:
        raise ValueError(f"k: got {tuple(k.shape)}, must be ({b}, a divisor of {h}, Nk, {d})")
    if v.shape[:3] != k.shape[:3] or v.dtype != k.dtype or q.dtype != k.dtype:
        raise ValueError(f"v: got {tuple(v.shape)} {v.dtype}, must be ({b}, {heads}, {nk}, dv) {q.dtype} as k and q")
    pb, ph, pq, pk = pattern.dense_shape
    if (pq, pk) != (nq, nk) or pb not in (1, b) or ph not in (1, h):
        raise ValueError(f"pattern: got one of shape {pattern.dense_shape}, must fit ({b}, {h}, {nq}, {nk})")
    if bias is None:
        return None
    bias = bias.view((1,) * (4 - bias.dim()) + bias.shape)
    if any(n not in (1, full) for n, full in zip(bias.shape, (b, h, nq, nk), strict=True)):
        raise ValueError(f"bias: got {tuple(bias.shape)}, must be broadcastable to ({b}, {h}, {nq}, {nk})")
    return bias
