"""Blocks of tokens that lie side by side: their means, and simple choices of which of them see one another."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from vistok.core.tensors import ranking, upcast


def block_mean(x: Tensor, block: int) -> Tensor:
    """(B, H, ceil(N / block), d): means of ``x`` (B, H, N, d), of what there is in the last one; summed in float32."""
    b, h, n, d = x.shape
    padded = pad(upcast(x), (0, 0, 0, -n % block)).view(b, h, -1, block, d)
    means: Tensor = padded.sum(3) / block_sizes(n, block, x.device)[:, None]
    return means.to(x.dtype)


def block_sizes(n: int, block: int, device: torch.device | None = None) -> Tensor:
    """(ceil(n / block),) int64: tokens in each block."""
    return (n - torch.arange(0, n, block, device=device)).clamp_max(block)


def top_blocks(scores: Tensor, keep: int) -> Tensor:
    """(B, H, Q, K) bool: the ``keep`` best of each row of ``scores`` (B, H, Q, K), ties to the lower. No gradient."""
    if not 1 <= keep <= scores.shape[3]:
        raise ValueError(f"keep: got {keep}, must be 1 to the {scores.shape[3]} blocks of keys")
    best = ranking(scores.detach().flatten(0, 2))[:, :keep].view(*scores.shape[:3], keep)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(3, best, True)


def similar_blocks(q: Tensor, k: Tensor, block: int, keep: int) -> Tensor:
    """(B, H, Q, K) bool: for each block of ``q`` (B, H, Nq, d) the ``keep`` of ``k`` whose mean fits its own best."""
    return top_blocks(block_mean(q, block) @ block_mean(k, block).transpose(2, 3), keep)


def random_blocks(q: Tensor, k: Tensor, block: int, keep: int, generator: torch.Generator | None = None) -> Tensor:
    """As ``similar_blocks``, but drawn."""
    shape = *q.shape[:2], -(-q.shape[2] // block), -(-k.shape[2] // block)
    return top_blocks(torch.rand(shape, generator=generator), keep).to(q.device)
