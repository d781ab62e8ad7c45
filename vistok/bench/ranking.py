"""One ranking of methods from whatever was measured: cells of several people, tasks, models and budgets pooled.

A sample is one question to one model at one count of tokens; it says which of the methods that were asked it did better
than which (right before wrong; in long answers by chrF). So a method is compared only with those that were left with as
many tokens, on the same questions, and one that was run on easy questions only is not paid for it. The counts become
strengths by ONEBench's fit (``vistok.bench.onebench``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .measure import DENSE
from .onebench import fit_pl, to_pairs
from .onebench_averages import Floats
from .summary import PLACE, SETTING, by_setting, summarise, tables

if TYPE_CHECKING:
    import polars

ALPHA = 0.01
"""Draws the strengths of methods that hardly met towards each other."""


def rank(frame: polars.DataFrame, seed: int = 0, resamples: int = 100) -> list[dict[str, Any]]:
    """One row a method (with its hyper-parameters), the strongest first: {"method", "hyper", "strength" (mean 0; a
    method a stronger by 1 wins e times as often as it loses), "low", "high" (95%, samples drawn with replacement),
    "samples", "mean": the plain mean of what was measured of it}. Left out are the dense model and methods that met
    no other.

    Raises ValueError where fewer than two methods share a question.
    """
    names, scores = _scores(frame)
    shared = scores[:, np.isfinite(scores).sum(0) > 1]
    met = np.isfinite(shared).any(1)
    if not met.any():
        raise ValueError("frame: must hold at least two methods that were asked the same question with as many tokens")
    names = [names[number] for number in np.flatnonzero(met)]
    scores, shared = scores[met], shared[met]
    theta = fit_pl(to_pairs(shared), ALPHA, 1e-9)
    rng = np.random.default_rng(seed)
    drawn = [
        fit_pl(to_pairs(shared[:, rng.integers(0, shared.shape[1], shared.shape[1])]), ALPHA, 1e-9)
        for _ in range(resamples)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    found = [
        {
            "method": method,
            "hyper": hyper,
            "strength": float(theta[number]),
            "low": float(low[number]),
            "high": float(high[number]),
            "samples": int(np.isfinite(shared[number]).sum()),
            "mean": float(np.nanmean(scores[number])),
        }
        for number, (method, hyper) in enumerate(names)
    ]
    return sorted(found, key=lambda row: -row["strength"])


def _scores(frame: polars.DataFrame) -> tuple[list[tuple[str, str]], Floats]:
    """The methods, and what each (M) made of each sample (S): (M, S), NaN for none."""
    measured = by_setting(frame)
    cells: dict[tuple[tuple[str, str], Any], float] = {}
    for level, table in enumerate(tables(summarise(frame))):
        for row in table:
            if row["method"] == DENSE:
                continue
            place = tuple(row[name] for name in PLACE)
            for key, asked in measured[(*place, *(row[name] for name in SETTING))].items():
                cells[(row["method"], row["hyper"]), (level, key)] = _score(asked)
    names = sorted({name for name, _ in cells})
    samples = {sample: number for number, sample in enumerate(sorted({sample for _, sample in cells}))}
    scores = np.full((len(names), len(samples)), np.nan)
    for (name, sample), value in cells.items():
        scores[names.index(name), samples[sample]] = value
    return names, scores


def _score(row: Mapping[str, Any]) -> float:
    return float(row["chrf"] / 100 if row["chrf"] is not None else bool(row["correct"]))
