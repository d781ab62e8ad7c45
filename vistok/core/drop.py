"""Nested dropout: how many of an ordered sequence's first tokens stay, and making the rest go (Rippel et al., 2014).

    lengths = draw_lengths(B, N, generator)      how many stay, for each picture
    cut(x, k)                                    one number for all: the tail is physically gone
    keep_mask(lengths, N)                        a number each: True where a token stays, for attention's keys
    mask_tail(x, lengths, token)                 or the tail becomes one learned vector (FlexTok)

Cutting and masking the keys are the same to a decoder whose other tokens attend to these; filling the tail with zeros
or with a vector is not.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

Lengths: TypeAlias = Literal["uniform", "powers-of-two", "uniform-to-power"]


def draw_lengths(
    b: int,
    n: int,
    distribution: Lengths = "uniform",
    per: Literal["sample", "batch"] = "sample",
    generator: torch.Generator | None = None,
) -> Tensor:
    """(b,) int64 between 1 and ``n``: how many tokens of each picture stay.

    "uniform" on 1 .. n; "powers-of-two" uniform on 1, 2, 4, ... up to n; "uniform-to-power": uniform, then up to the
    next power of two, n at most. ``per`` "batch": one number for all (One-D-Piece).
    """
    if n < 1:
        raise ValueError(f"n: got {n}, must be 1 or more")
    if per not in ("sample", "batch"):
        raise ValueError(f"per: got {per!r}, must be 'sample' or 'batch'")
    count = b if per == "sample" else 1
    if distribution == "uniform":
        drawn = torch.randint(1, n + 1, (count,), generator=generator)
    elif distribution == "powers-of-two":
        drawn = 2 ** torch.randint(0, n.bit_length(), (count,), generator=generator)
    elif distribution == "uniform-to-power":
        ks = torch.randint(1, n + 1, (count,), generator=generator)
        drawn = torch.tensor([1 << (k - 1).bit_length() for k in ks.tolist()]).clamp_max(n)
    else:
        raise ValueError(
            f"distribution: got {distribution!r}, must be 'uniform', 'powers-of-two' or 'uniform-to-power'"
        )
    return drawn.expand(b)


def cut(x: Tensor, k: int) -> Tensor:
    """The first ``k`` tokens of ``x`` (B, N, ...). ValueError unless 1 <= k <= N."""
    if not 1 <= k <= x.shape[1]:
        raise ValueError(f"k: got {k}, must be between 1 and the {x.shape[1]} tokens")
    return x[:, :k]


def keep_mask(lengths: Tensor, n: int) -> Tensor:
    """(B, n) bool, True at the first ``lengths`` (B,) tokens."""
    return torch.arange(n, device=lengths.device) < lengths[:, None]


def mask_tail(x: Tensor, lengths: Tensor, token: Tensor) -> Tensor:
    """``x`` (B, N, D) with ``token`` (D,) from place ``lengths`` (B,) on; a new tensor."""
    return torch.where(keep_mask(lengths.to(x.device), x.shape[1])[..., None], x, token.to(x.dtype))
