"""How surely vectors choose their codes and how evenly codes are chosen: the terms of an entropy regulariser."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vistok.core.quantize.nearest import Metric

_BLOCK = 2**22
"""Scores of a block, N' x K."""


def entropies(
    z: Tensor,
    table: Tensor,
    temperature: float = 0.01,
    metric: Metric = "euclidean",
    mask: Tensor | None = None,
    floor: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Entropy of each vector's choice, in the mean, and entropy of the mean choice: two numbers in nats.

    The choice of ``z`` (..., D) among ``table`` (K, D) is softmax(-distance^2 / temperature), or of the products for
    "dot". ``mask`` (...) bool leaves vectors out (False). ``floor`` is added inside the second logarithm (1e-5 in
    MAGVIT-2's lineage, 1e-7 in UniTok's). The regulariser is the first less the second, -log K at best. Blocks are
    made again in the backward pass: memory O(N + K) besides one block. Differentiable in both arguments.
    """
    if temperature <= 0:
        raise ValueError(f"temperature: got {temperature}, must be greater than 0")
    rows = z.reshape(-1, z.shape[-1])
    weight = rows.new_ones(len(rows)) if mask is None else mask.reshape(-1).to(rows.dtype)
    sample, mean = rows.new_zeros(()), rows.new_zeros(len(table))
    block = max(1, _BLOCK // len(table))
    for part, share in zip(torch.split(rows, block), torch.split(weight, block), strict=True):
        one, two = checkpoint(
            _block, part, share, table, temperature, metric == "dot", use_reentrant=False, preserve_rng_state=False
        )
        sample, mean = sample + one, mean + two
    total = weight.sum().clamp_min(1)
    mean = mean / total
    return sample / total, -(mean * (mean + floor).log()).sum()


def _block(z: Tensor, weight: Tensor, table: Tensor, temperature: float, dot: bool) -> tuple[Tensor, Tensor]:
    products = z @ table.t()
    # |z|^2 is the same for all codes of a row, so the softmax does not see it.
    logits = (products if dot else 2 * products - table.square().sum(1)) / temperature
    log = logits.log_softmax(1)
    p = log.exp()
    return -((p * log).sum(1) * weight).sum(), (p * weight[:, None]).sum(0)
