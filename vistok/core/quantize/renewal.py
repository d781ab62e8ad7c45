"""How tables change besides by gradient: moving averages of what chose them, and new rows for codes that nobody chose.

Pure functions; the same seed and step give the same rows on every device, and no global random state is touched.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ema_update(
    count: Tensor,
    total: Tensor,
    hits: Tensor,
    sums: Tensor,
    decay: float = 0.99,
    eps: float = 1e-5,
    write_back: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Moving averages of how often codes were chosen and of the vectors that chose them, and the table they give.

    ``count`` (K,) and ``total`` (K, D) are the averages, ``hits`` (K,) and ``sums`` (K, D) those of one batch. The new
    ones, and the table total / count with counts smoothed to n (c + eps) / (n + K eps). ``write_back`` keeps the
    smoothed counts as the averages (AiT); otherwise smoothing is for the division alone (DualToken).
    """
    count = decay * count + (1 - decay) * hits
    total = decay * total + (1 - decay) * sums
    n = count.sum()
    smoothed = n * (count + eps) / (n + len(count) * eps)
    return (
        (smoothed if write_back else count),
        total,
        total / smoothed.clamp_min(torch.finfo(count.dtype).tiny)[:, None],
    )


def replacements(dead: Tensor, candidates: Tensor, seed: int, step: Tensor, mask: Tensor | None = None) -> Tensor:
    """(K,) int64: for each code the row of ``candidates`` (N, D) that takes its place, -1 for codes that stay.

    ``dead`` (K,) bool. Rows are drawn without replacement in an order that ``seed`` and ``step`` (a number) give, of
    those that ``mask`` (N,) marks True; if more codes are dead than rows are there, the last ones stay for now.
    """
    n = len(candidates)
    order = _shuffled(n, seed, step, candidates.device)
    real = torch.full((), n, device=dead.device) if mask is None else mask.sum()
    if mask is not None:  # real rows first, in the same order
        order = order.gather(0, mask[order].int().sort(descending=True, stable=True).indices)
    rank = dead.long().cumsum(0) - 1
    return torch.where(dead & (rank < real), order[rank.clamp(0, n - 1)], -1)


def _shuffled(n: int, seed: int, step: Tensor, device: torch.device) -> Tensor:
    """(n,) int64: 0 .. n-1 in the order of a hash of seed, step and place (Wellons' lowbias32)."""
    low = 0xFFFFFFFF
    x = torch.arange(n, device=device) * 0x9E3779B1 + (seed * 0x85EBCA6B & low) + step.to(device) * 0xC2B2AE35
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = x & low
        x = (x ^ (x >> shift)) * factor
    x = x & low
    return (x ^ (x >> 16)).sort(stable=True).indices
