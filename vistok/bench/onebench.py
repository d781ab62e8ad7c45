"""ONEBench: one ranking from sparse, incomplete and unlike measurements of single samples.

Source: "ONEBench to Test Them All: Sample-Level Benchmarking Over Open-Ended Capabilities" (Ghosh et al., 2024); the
authors' repository is bethgelab/onebench. Maystre and Grossglauser, "Fast and Accurate Inference of Plackett-Luce
Models" (2015), give the spectral fit.

Measurements stand in a matrix (M models, S samples), NaN where there is none. A sample only says which of its models
did better than which: ``to_pairs`` counts that, ``fit_pl`` turns the counts into one strength a model. So samples of
any unit can be pooled, and a model is not paid for having been run on easy samples only, as it is by averages.

The authors' top-1 variant is ``fit_pl(to_pairs(matrix, ties=False), alpha=0.1, one_pass=True)`` on right and wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .onebench_averages import Floats, scores_of
from .onebench_simulated import hide

_BLOCK = 4_000_000  # comparisons at once


def to_pairs(matrix: ArrayLike, ties: bool = True, equal: bool = False) -> Floats:
    """(M, M): how often the model of the row did better than that of the column, over samples where both have a score.

    ``matrix`` (M, S): scores, higher is better, NaN for none. ``ties``: equal scores are one win each way; False: they
    count for nothing. ``equal``: all samples weigh the same, however many models they compare; otherwise a sample with
    n models weighs n (n - 1) / 2. Counts of several matrices, and of ``count_judged``, may be added.
    """
    scores = scores_of(matrix)
    models, samples = scores.shape
    wins = np.zeros((models, models))
    step = max(1, _BLOCK // models**2)
    for start in range(0, samples, step):
        block = scores[:, start : start + step]
        better = block[:, None] > block[None]
        if ties:
            better |= block[:, None] == block[None]  # both ways
        if equal:
            count = np.isfinite(block).sum(0)
            wins += better @ (1 / np.maximum(1, count * (count - 1) / 2))
        else:
            wins += better.sum(2)
    np.fill_diagonal(wins, 0)
    return wins


def count_judged(judged: Iterable[tuple[int, int, float]], models: int) -> Floats:
    """(M, M) wins, as ``to_pairs``, of judged pairs (a, b, 1 where a won, 0 where b did, 0.5 for a tie)."""
    wins = np.zeros((models, models))
    for a, b, won in judged:
        if a == b or not (0 <= a < models and 0 <= b < models) or won not in (0, 0.5, 1):
            raise ValueError(f"judged: got {(a, b, won)}, must be two of {models} models and 1, 0.5 or 0")
        wins[a, b] += won > 0
        wins[b, a] += won < 1
    return wins


def fit_pl(
    wins: ArrayLike, alpha: float = 0.0, tol: float = 1e-12, *, one_pass: bool = False, iterations: int = 10_000
) -> Floats:
    """(M,) strengths, mean 0, of the Plackett-Luce (for pairs: Bradley-Terry) model: iterative Luce spectral ranking.

    ``wins`` (M, M) as from ``to_pairs``. ``alpha``: a rate added to every pair, which draws strengths together and is
    needed where some models never lost to, or never met, the others; 0 gives the maximum-likelihood solution.
    ``tol``: the largest change of a strength at which it stops. ``one_pass``: the first step alone, close to it.

    Raises ValueError for wins that do not determine the strengths while alpha is 0, RuntimeError where ``iterations``
    do not suffice.
    """
    won = np.array(wins, dtype=float)
    if won.ndim != 2 or won.shape[0] != won.shape[1] or len(won) < 2:
        raise ValueError(f"wins: got shape {won.shape}, must be (M, M) of at least two models")
    if not np.isfinite(won).all() or (won < 0).any():
        raise ValueError("wins: got negative or missing counts, must be at least 0")
    if not 0 <= alpha < np.inf:
        raise ValueError(f"alpha: got {alpha}, must be at least 0")
    np.fill_diagonal(won, 0)
    if alpha == 0:
        _check_connected(won)
    theta = np.zeros(len(won))
    for _ in range(iterations):
        weight = np.exp(theta - theta.max())
        weight /= weight.mean()
        rates = won.T / (weight[:, None] + weight[None]) + alpha  # [loser, winner]
        new = np.log(_stationary(rates))
        new -= new.mean()
        change, theta = float(np.abs(new - theta).max()), new
        if one_pass or change < tol:
            return theta
    raise RuntimeError(f"fit_pl: strengths still change by {change:.1e} after {iterations} iterations, tol is {tol}")


def kendall(a: ArrayLike, b: ArrayLike) -> float:
    """Kendall's tau-b of two lists of scores (M,): 1 the same order, -1 the opposite; NaN where one is all equal."""
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 2:
        raise ValueError(f"b: got shape {y.shape} for {x.shape}, must be two lists of one length, at least 2")
    left, right = np.sign(x[:, None] - x), np.sign(y[:, None] - y)
    pairs = np.sqrt(float((left**2).sum()) * float((right**2).sum()))
    return float((left * right).sum() / pairs) if pairs else float("nan")


def query(
    embeddings: ArrayLike,
    wanted: ArrayLike,
    k: int | None = None,
    *,
    threshold: float | None = None,
    metadata: Sequence[Mapping[str, Any]] = (),
    filters: Mapping[str, Any] | None = None,
) -> NDArray[np.int64]:
    """Samples that ask for a capability, nearest first: rank with ``fit_pl(to_pairs(matrix[:, found]))``.

    ``embeddings`` (S, D) of the samples, ``wanted`` (D,): compared by cosine. ``k``: the most to return; ``threshold``:
    the least cosine. ``filters``: {key: value, or a list, tuple or set of values}; a sample passes where its
    ``metadata`` (S mappings) has one of them for every key.
    """
    vectors, goal = np.asarray(embeddings, dtype=float), np.asarray(wanted, dtype=float)
    if vectors.ndim != 2 or goal.shape != vectors.shape[1:]:
        raise ValueError(f"wanted: got shape {goal.shape}, must be (D,) for embeddings (S, D), got {vectors.shape}")
    if filters and len(metadata) != len(vectors):
        raise ValueError(f"metadata: got {len(metadata)} entries, must be one for each of {len(vectors)} samples")
    if k is not None and k < 1:
        raise ValueError(f"k: got {k}, must be at least 1")
    allowed = {
        key: value if isinstance(value, list | tuple | set) else (value,) for key, value in (filters or {}).items()
    }
    passed = [
        sample
        for sample in range(len(vectors))
        if all(key in metadata[sample] and metadata[sample][key] in values for key, values in allowed.items())
    ]
    found = np.array(passed, dtype=np.int64)
    length = np.linalg.norm(vectors[found], axis=1) * np.linalg.norm(goal)
    cosine = vectors[found] @ goal / np.where(length > 0, length, 1)
    order = np.argsort(-cosine, kind="stable")
    if threshold is not None:
        order = order[cosine[order] >= threshold]
    return found[order[:k]]


def ablate(matrix: ArrayLike, drop: float, seeds: Sequence[int], *, alpha: float = 0.01, ties: bool = True) -> Floats:
    """(len(seeds),): Kendall's tau between the fit to all and that without a share ``drop`` of the measurements."""
    whole = fit_pl(to_pairs(matrix, ties), alpha)
    return np.array([kendall(whole, fit_pl(to_pairs(hide(matrix, drop, seed), ties), alpha)) for seed in seeds])


def _check_connected(won: Floats) -> None:
    """ValueError unless from every model a way of lost comparisons leads to every other one."""
    reach = (won > 0) | np.eye(len(won), dtype=bool)
    for _ in range(int(np.ceil(np.log2(len(won)))) + 1):
        reach = reach.astype(np.float32) @ reach.astype(np.float32) > 0
    if not reach.all():
        groups = len(np.unique(reach & reach.T, axis=0))
        raise ValueError(
            f"wins: the models fall into {groups} groups without wins both ways between them, so that their strengths "
            "are not determined; measure more, or give alpha > 0"
        )


def _stationary(rates: Floats) -> Floats:
    """(M,) the stationary distribution of a Markov chain with these rates [from, to]; its diagonal is not read.

    The method of Grassmann, Taksar and Heyman (1985): nothing is subtracted, so small shares are exact too.
    """
    rest = rates.copy()
    for last in range(len(rest) - 1, 0, -1):
        rest[:last, last] /= rest[last, :last].sum()
        rest[:last, :last] += np.outer(rest[:last, last], rest[last, :last])
    share = np.ones(len(rest))
    for state in range(1, len(rest)):
        share[state] = share[:state] @ rest[:state, state]
    result: Floats = share / share.sum()
    return result
