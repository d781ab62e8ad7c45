"""Codes without a table: every channel is rounded by itself (FSQ) or to its sign (LFQ), and an id packs the channels.

All in float32: in bfloat16 a third of the ids of levels 7, 6, 5 come out wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vistok.core.codes import BitOrder

_MARGIN = 1e-3
"""The bound reaches a little beyond the outermost level, so that it is met by finite inputs."""


def fsq_bound(z: Tensor, levels: Sequence[int]) -> Tensor:
    """Each channel of ``z`` (..., len(levels)) into its levels' range: rounding gives one of so many whole numbers.

    Mentzer et al., arXiv 2309.15505: tanh, shifted by half a step for an even number of levels. float32.
    """
    half, offset, shift = _bounds(levels, z)
    return (z.float() + shift).tanh() * half - offset


def fsq_unbound(bounded: Tensor, levels: Sequence[int]) -> Tensor:
    """The inverse of ``fsq_bound`` for values inside the range."""
    half, offset, shift = _bounds(levels, bounded)
    return ((bounded.float() + offset) / half).atanh() - shift


def fsq_digits(z: Tensor, levels: Sequence[int]) -> Tensor:
    """(..., len(levels)) int64 from 0: the level of each channel."""
    return fsq_bound(z, levels).round().long() + _middle(levels, z.device).long()


def fsq_values(digits: Tensor, levels: Sequence[int]) -> Tensor:
    """(..., len(levels)) float32 in [-1, 1]: what levels stand for, -1 for the lowest; for an even number never 1."""
    middle = _middle(levels, digits.device)
    return (digits - middle) / middle


def signs(z: Tensor) -> Tensor:
    """float32 +1 where ``z`` is above 0, -1 elsewhere (at 0 too)."""
    return torch.where(z > 0, 1.0, -1.0)


def pack(digits: Tensor, levels: Sequence[int], order: BitOrder = "first-lowest") -> Tensor:
    """(...) int64: the ids of ``digits`` (..., len(levels)), a number whose digits have these many values."""
    return (digits * _places(levels, order, digits.device)).sum(-1)


def unpack(ids: Tensor, levels: Sequence[int], order: BitOrder = "first-lowest") -> Tensor:
    """(..., len(levels)) int64: the inverse of ``pack``."""
    sizes = torch.tensor(list(levels), device=ids.device)
    return ids[..., None] // _places(levels, order, ids.device) % sizes


def _places(levels: Sequence[int], order: BitOrder, device: torch.device) -> Tensor:
    if order not in ("first-lowest", "first-highest"):
        raise ValueError(f"bit_order: got {order!r}, must be 'first-lowest' or 'first-highest'")
    if math.prod(levels) > 2**62:
        raise ValueError(f"levels: got {math.prod(levels)} codes, must be 2^62 at most for an int64 id")
    places = [math.prod(levels[:i] if order == "first-lowest" else levels[i + 1 :]) for i in range(len(levels))]
    return torch.tensor(places, device=device)


def _middle(levels: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([level // 2 for level in levels], dtype=torch.float32, device=device)


def _bounds(levels: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if min(levels) < 2:
        raise ValueError(f"levels: got {tuple(levels)}, must be 2 or more each")
    counts = torch.tensor(list(levels), dtype=torch.float32, device=like.device)
    half = (counts - 1) * (1 + _MARGIN) / 2
    offset = torch.where(counts % 2 == 0, 0.5, 0.0)
    return half, offset, (offset / half).atanh()
