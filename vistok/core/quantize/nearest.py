"""The nearest code of each vector, without a table of all distances."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

Metric: TypeAlias = Literal["euclidean", "dot"]

_GROUP = 128
"""Codes of which only the best is looked at until the best group is known: a plain maximum runs on vector units, one
that tells its place does not (measured best of 64 and 128)."""
_SCORES = {"cpu": 2**23, "cuda": 2**27}
"""Scores of a block, N' x K (measured best of 2^21 to 2^24 on a CPU with K = 16,384)."""
_CANDIDATES = 4
"""Codes that are compared exactly where rounding could decide between them."""


def nearest_code(z: Tensor, table: Tensor, metric: Metric = "euclidean") -> Tensor:
    """(...) int64: for each vector of ``z`` (..., D) the row of ``table`` (K, D) nearest to it, ties to the lower row.

    ``metric``: "euclidean" for the least distance, "dot" for the largest product (IBQ). Computed in float32 in full
    precision, whatever the dtypes, autocast or the process' setting for matrix products; ranked by z c - |c|^2 / 2.
    Where the best two are so close that rounding could decide, the best few are compared in float64, so that ids depend
    neither on the device nor on the size of a batch. Memory O(N + K), by blocks of rows; no gradient.
    """
    if z.shape[-1] != table.shape[-1] or table.dim() != 2:
        raise ValueError(f"table: got shape {tuple(table.shape)}, must be (K, {z.shape[-1]}) as z has its channels")
    if not len(table):
        raise ValueError("table: got no rows, must have at least one code")
    rows = z.detach().reshape(-1, z.shape[-1]).float()
    found: Tensor = _nearest(rows, table.detach().float(), metric == "dot")
    return found.view(z.shape[:-1])


@torch.library.custom_op("vistok::nearest_code", mutates_args=())
def _nearest(z: Tensor, table: Tensor, dot: bool) -> Tensor:
    """An operator of its own, so that ``torch.compile`` takes the loop as one step."""
    n, k = len(z), len(table)
    bias = z.new_zeros(k) if dot else table.square().sum(1) / -2
    block = max(16, _SCORES.get(z.device.type, 2**23) // k)
    width = -(-k // _GROUP) * _GROUP
    scores = z.new_full((min(block, n), width), -torch.inf)
    ids = torch.empty(n, dtype=torch.int64, device=z.device)
    other = table.t()
    # A bound of what rounding does to the difference of two scores of a vector of length 1.
    longest = table.norm(dim=1).max()
    unsure = 4 * (table.shape[1] + 2) * torch.finfo(torch.float32).eps * longest
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(z.device.type, enabled=False):
            for start in range(0, n, block):
                rows = z[start : start + block]
                now = scores[: len(rows)]
                torch.addmm(bias, rows, other, out=now[:, :k])
                groups = now.view(len(rows), -1, _GROUP)
                best = groups.amax(2)
                group = best.argmax(1, keepdim=True)
                members = groups.gather(1, group[..., None].expand(-1, 1, _GROUP))[:, 0]
                inside = members.argmax(1, keepdim=True)
                found = (group * _GROUP + inside)[:, 0]
                top = members.gather(1, inside)
                second = torch.maximum(
                    members.scatter_(1, inside, -torch.inf).amax(1), best.scatter_(1, group, -torch.inf).amax(1)
                )
                size = rows.norm(dim=1) + (0 if dot else longest)
                close = (top[:, 0] - second <= unsure * size).nonzero()[:, 0]
                if len(close):
                    few = now[close, :k].topk(min(_CANDIDATES, k)).indices
                    few = torch.cat([found[close, None], few], 1)
                    found[close] = _exactly(rows[close], table, few, dot)
                ids[start : start + block] = found
    finally:
        torch.set_float32_matmul_precision(precision)
    return ids.clamp_(max=k - 1)  # only rows of NaN can point beyond


def _exactly(z: Tensor, table: Tensor, few: Tensor, dot: bool) -> Tensor:
    """(n,): the best of the rows ``few`` (n, m) for each of ``z`` (n, D) in float64, the lower of equal ones."""
    codes, vectors = table[few].double(), z[:, None].double()
    badness = -(codes * vectors).sum(2) if dot else (codes - vectors).square().sum(2)
    return few.masked_fill(badness > badness.amin(1, keepdim=True), len(table)).amin(1)


@_nearest.register_fake
def _(z: Tensor, table: Tensor, dot: bool) -> Tensor:
    return z.new_empty(len(z), dtype=torch.int64)
