"""How many tokens ``keep`` means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Literal

import torch

from vistok.core.allocate import split_budget

Keep = int | float
Budget = Literal["per_image", "shared"]
"""Whether ``keep`` is of each picture, or of all pictures of a prompt together."""


def check_keep(keep: Keep) -> Keep:
    """``keep`` if it is a count >= 1 or a share in (0, 1]; ValueError naming it otherwise."""
    right = "must be a count of tokens a picture >= 1 (int) or a share of them in (0, 1] (float)"
    if isinstance(keep, bool) or not isinstance(keep, Real):
        raise ValueError(f"keep: got {keep!r}, {right}")
    keep = int(keep) if isinstance(keep, Integral) else float(keep)  # NumPy's numbers too
    if isinstance(keep, int):
        if keep < 1:
            raise ValueError(f"keep: got {keep}, {right}")
    elif not 0 < keep <= 1:  # also false for NaN
        raise ValueError(f"keep: got {keep}, {right}")
    return keep


def count(keep: Keep, num_tokens: int) -> int:
    """Tokens that ``keep`` leaves of ``num_tokens``: a share is rounded half up, at least 1."""
    if isinstance(keep, int):
        if keep > num_tokens:
            raise ValueError(f"keep: got {keep}, but the picture has only {num_tokens} visual tokens")
        return keep
    return max(1, math.floor(keep * num_tokens + 0.5))


def share_out(keep: Keep, sizes: Sequence[int]) -> list[int]:
    """Tokens left of each picture of ``sizes`` tokens, of ``keep`` for all of them: in proportion, at least 1 each."""
    total = sum(sizes)
    if isinstance(keep, int) and not len(sizes) <= keep <= total:
        raise ValueError(
            f"keep: got {keep} for all pictures of a prompt, must be between 1 for each of its {len(sizes)} pictures "
            f"and their {total} visual tokens"
        )
    room = torch.tensor([sizes]) - 1
    spare = max(0, count(keep, total) - len(sizes))
    return (1 + split_budget(room.double(), spare, capacity=room)[0]).tolist()


def counts(keep: Keep | Sequence[Keep], num_tokens: int, methods: int) -> list[int]:
    """Tokens left after each of several composed methods.

    One ``keep`` is what the last leaves; the methods before it each keep the same share of what they are given
    (0.25 with two methods: 50%, then 25%). A sequence gives each its own, all counted on the whole picture.
    """
    if isinstance(keep, Sequence):
        return [count(k, num_tokens) for k in keep]
    last = count(keep, num_tokens)
    steps = [num_tokens * (last / num_tokens) ** ((i + 1) / methods) for i in range(methods - 1)]
    return [max(last, math.floor(s + 0.5)) for s in steps] + [last]
