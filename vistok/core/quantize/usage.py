"""How a codebook is used: counts of ids, and what they tell."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vistok.core.tensors import upcast


def count_ids(ids: Tensor, size: int) -> Tensor:
    """(size,) int64: how often each id occurs in ``ids`` of any shape; ids below 0 are no tokens."""
    flat = ids.reshape(-1)
    return flat.new_zeros(size).index_add_(0, flat.clamp_min(0), (flat >= 0).long())


def usage(counts: Tensor, least: float = 0.0) -> Tensor:
    """Share of codes (last axis of ``counts``) whose frequency is above ``least`` / K, in [0, 1]; 0 if none occurred.

    ``least`` 0: those that occurred at all; 0.01 is UniTok's.
    """
    share = upcast(counts) / upcast(counts).sum(-1, keepdim=True).clamp_min(1)
    return (share > least / counts.shape[-1]).float().mean(-1)


def entropy_bits(counts: Tensor) -> Tensor:
    """Entropy of ids (last axis of ``counts``) in bits a token, 0 if none occurred."""
    share = upcast(counts) / upcast(counts).sum(-1, keepdim=True).clamp_min(1)
    nats: Tensor = -torch.special.xlogy(share, share).sum(-1)
    return nats / math.log(2)


def perplexity(counts: Tensor) -> Tensor:
    """2 to the entropy: as many codes, evenly used, would be as unpredictable. Between 1 and K."""
    return entropy_bits(counts).exp2()
