"""Intervals of what was measured."""

from __future__ import annotations

import math

NORMAL_95 = 1.959963984540054


def wilson(right: int, n: int) -> tuple[float, float]:
    """95% Wilson score interval of a proportion: (low, high) in [0, 1]; (0, 1) where nothing was counted."""
    if not 0 <= right <= n:
        raise ValueError(f"right: got {right}, must be between 0 and n = {n}")
    if n == 0:
        return 0.0, 1.0
    z2 = NORMAL_95**2
    share = right / n
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
