"""Intervals of what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

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


def paired_bootstrap(
    values: Sequence[float], others: Sequence[float], *, seed: int = 0, resamples: int = 10_000
) -> tuple[float, float]:
    """95% percentile interval of mean(values) - mean(others), measured on the same n questions: (low, high).

    Questions are drawn with replacement, each with both of its values, so that what is hard for both does not widen the
    interval. ValueError if the two are not equally many, or none.
    """
    if len(values) != len(others) or not len(values):
        raise ValueError(f"others: got {len(others)} values for {len(values)}, must be as many, and at least one")
    differences = np.asarray(values, dtype=float) - np.asarray(others, dtype=float)
    # How often each difference is drawn; right or wrong makes but three of them.
    found, counts = np.unique(differences, return_counts=True)
    rng, n = np.random.default_rng(seed), len(differences)
    step = max(1, 1_000_000 // len(found))
    sizes = [min(step, resamples - start) for start in range(0, resamples, step)]
    means = np.concatenate([rng.multinomial(n, counts / n, size) @ found / n for size in sizes])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
