"""Averages and ratings of measurements (M models, S samples), NaN for none: what ONEBench is held against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def scores_of(matrix: ArrayLike) -> Floats:
    """The matrix (M, S) as floats. ValueError where it is no such matrix."""
    scores = np.asarray(matrix, dtype=float)
    if scores.ndim != 2 or len(scores) < 2:
        raise ValueError(f"matrix: got shape {scores.shape}, must be (models, samples) of at least two models")
    if np.isinf(scores).any():
        raise ValueError("matrix: got an infinite score, must be finite, or NaN for none")
    return scores


def mean_score(matrix: ArrayLike) -> Floats:
    """(M,): plain means of what was measured. ValueError for a model without any measurement, as for all below."""
    return _mean(scores_of(matrix))


def mean_normalised(matrix: ArrayLike, sets: Sequence[Any]) -> Floats:
    """(M,): means after the scores of each data set were stretched to 0 .. 1; ``sets``: the set of each sample."""
    scores = scores_of(matrix).copy()
    names = np.asarray(sets)
    if names.shape != (scores.shape[1],):
        raise ValueError(f"sets: got shape {names.shape}, must be one name for each of {scores.shape[1]} samples")
    for name in np.unique(names):
        part = scores[:, names == name]
        known = part[np.isfinite(part)]
        if known.size:
            span = known.max() - known.min()
            scores[:, names == name] = (part - known.min()) / span if span else 0 * part + 0.5
    return _mean(scores)


def borda(matrix: ArrayLike) -> Floats:
    """(M,): the mean share of a sample's other models that a model beats, ties by half; lone models count nothing."""
    scores = scores_of(matrix)
    points = np.full(scores.shape, np.nan)
    for sample in range(scores.shape[1]):
        here = np.flatnonzero(np.isfinite(scores[:, sample]))
        if len(here) > 1:
            each = scores[here, sample]
            beaten = (each[:, None] > each).sum(1) + ((each[:, None] == each).sum(1) - 1) / 2
            points[here, sample] = beaten / (len(here) - 1)
    return _mean(points)


def elo(matrix: ArrayLike, k: float = 16.0, shuffles: int = 5, seed: int = 0) -> Floats:
    """(M,) Elo ratings, mean 0: sample after sample its models are matched at random and each plays one game.

    Ratings depend on the order of the games, so they are means over ``shuffles`` orders of the samples.
    """
    scores = scores_of(matrix)
    rng = np.random.default_rng(seed)
    total = np.zeros(len(scores))
    for _ in range(shuffles):
        rating = np.zeros(len(scores))
        for sample in rng.permutation(scores.shape[1]):
            here = rng.permutation(np.flatnonzero(np.isfinite(scores[:, sample])))
            a, b = here[: len(here) // 2], here[len(here) // 2 : 2 * (len(here) // 2)]
            won = (np.sign(scores[a, sample] - scores[b, sample]) + 1) / 2
            gain = k * (won - 1 / (1 + 10 ** ((rating[b] - rating[a]) / 400)))
            rating[a] += gain
            rating[b] -= gain
        total += rating
    return total / shuffles


def _mean(scores: Floats) -> Floats:
    count = np.isfinite(scores).sum(1)
    if not count.all():
        raise ValueError(f"matrix: models {np.flatnonzero(count == 0).tolist()} have no measurement that counts")
    return np.nansum(scores, 1) / count
