"""Simulated measurements of models whose true order is known, and measurements that are hidden."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .onebench_averages import Floats, scores_of


def hide(matrix: ArrayLike, share: float, seed: int = 0, weights: ArrayLike | None = None) -> Floats:
    """(M, S): the matrix without a ``share`` of its measurements, drawn at random.

    ``weights`` (M, S), above 0: how likely a measurement is to stay, relative to the others.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share: got {share}, must be in [0, 1)")
    scores = scores_of(matrix).copy()
    known = np.flatnonzero(np.isfinite(scores))
    gone = round(share * len(known))
    # The largest keys log(weight) + Gumbel noise are a draw without replacement.
    keys = np.random.default_rng(seed).gumbel(size=len(known))
    if weights is not None:
        keys += np.log(np.asarray(weights, dtype=float).reshape(scores.shape).flat[known])
    scores.flat[known[np.argsort(keys)[:gone]]] = np.nan
    return scores


def simulate(
    models: int = 100, samples: int = 1000, kind: Literal["gaussian", "gumbel"] = "gaussian", seed: int = 0
) -> tuple[Floats, Floats]:
    """Scores (M, S) of models with a known order, and what they are truly worth (M,).

    "gaussian": a model's scores are normal, means uniform in 0 .. 1, deviations in 0 .. 0.25; every other sample is
    right or wrong by a threshold of its own. "gumbel": evenly spaced worth, from 0 to 5, with standard Gumbel noise:
    the Plackett-Luce model itself.
    """
    rng = np.random.default_rng(seed)
    if kind == "gumbel":
        truth = rng.permutation(np.linspace(0, 5, models))
        return truth[:, None] + rng.gumbel(size=(models, samples)), truth
    if kind != "gaussian":
        raise ValueError(f"kind: got {kind!r}, must be 'gaussian' or 'gumbel'")
    truth = rng.uniform(0, 1, models)
    scores = rng.normal(truth[:, None], rng.uniform(0, 0.25, models)[:, None], (models, samples))
    scores[:, 1::2] = scores[:, 1::2] > rng.uniform(0, 1, scores[:, 1::2].shape[1])
    return scores, truth


def simulate_biased(
    models: int = 100, sets: int = 10, samples: int = 100, width: float = 0.15, seed: int = 0
) -> tuple[Floats, Floats, NDArray[np.int64], Floats]:
    """Easy sets that weak models ran: all scores (M, S), worth (M,), the set of each sample (S,), weights (M, S).

    ``sets`` of ``samples`` samples each, from easy to hard. A score is the logistic of worth - difficulty + noise; in
    every other set only right or wrong. Give the weights to ``hide``: a model is measured most on the sets that are as
    hard as it is strong, less by a normal curve of ``width`` (in shares of the range).
    """
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.linspace(-3, 3, models))
    which = np.repeat(np.arange(sets), samples)
    hard = np.linspace(-3, 3, sets)[which]
    scores = 1 / (1 + np.exp(-(truth[:, None] - hard + rng.logistic(size=(models, len(which))))))
    binary = which % 2 == 1
    scores[:, binary] = scores[:, binary] > 0.5
    weights = np.exp(-((((truth[:, None] - hard) / 6) / width) ** 2) / 2)
    return scores, truth, which, weights
