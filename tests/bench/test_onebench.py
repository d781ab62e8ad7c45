"""One ranking from sparse measurements: against brute force, against the MM iteration, and on simulated models."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vistok.bench import onebench
from vistok.bench.onebench import ablate, count_judged, fit_pl, kendall, query, to_pairs
from vistok.bench.onebench_averages import borda, elo, mean_normalised, mean_score
from vistok.bench.onebench_simulated import hide, simulate, simulate_biased

NONE = np.nan


@st.composite
def matrices(draw, models=5, samples=6):
    entries = st.sampled_from([NONE, 0.0, 0.25, 1.0, 3.0])
    rows = draw(st.integers(2, models))
    columns = draw(st.integers(1, samples))
    return np.array([[draw(entries) for _ in range(columns)] for _ in range(rows)])


@st.composite
def connected(draw, models=6):
    """Win counts with a circle of wins through all models."""
    count = draw(st.integers(2, models))
    wins = np.array([[draw(st.integers(0, 5)) for _ in range(count)] for _ in range(count)], float)
    for model in range(count):
        wins[model, (model + 1) % count] += 1
    np.fill_diagonal(wins, 0)
    return wins


def bradley_terry(wins, rounds=50_000):
    """The maximum-likelihood strengths by the MM iteration (Hunter, 2004)."""
    met = wins + wins.T
    weight = np.ones(len(wins))
    for _ in range(rounds):
        new = wins.sum(1) / (met / (weight[:, None] + weight)).sum(1)
        new /= np.exp(np.log(new).mean())
        done = np.abs(np.log(new / weight)).max() < 1e-15
        weight = new
        if done:
            break
    return np.log(weight)


# Pairs ---------------------------------------------------------------------------------------------------------


@given(matrices(), st.booleans(), st.booleans())
def test_pairs_are_counted_one_by_one(matrix, ties, equal):
    models, samples = matrix.shape
    wins = np.zeros((models, models))
    for sample in range(samples):
        here = [m for m in range(models) if np.isfinite(matrix[m, sample])]
        pairs = list(combinations(here, 2))
        for a, b in pairs:
            share = 1 / len(pairs) if equal else 1
            x, y = matrix[a, sample], matrix[b, sample]
            wins[a, b] += share * (x > y or (ties and x == y))
            wins[b, a] += share * (y > x or (ties and x == y))
    np.testing.assert_allclose(to_pairs(matrix, ties, equal), wins)


def test_blocks_of_samples_add_up(monkeypatch):
    matrix = hide(simulate(7, 50)[0], 0.4)
    whole = to_pairs(matrix)
    monkeypatch.setattr(onebench, "_BLOCK", 7 * 7 * 3)
    assert np.array_equal(to_pairs(matrix), whole)


@given(matrices(), st.randoms(use_true_random=False))
def test_only_the_order_within_a_sample_counts(matrix, random):
    order = list(range(matrix.shape[1]))
    random.shuffle(order)
    wins = to_pairs(matrix)
    assert np.array_equal(to_pairs(matrix[:, order]), wins)
    curves = [np.exp, np.arctan, lambda x: 7 * x - 100, np.cbrt]
    bent = np.stack([random.choice(curves)(column) for column in matrix.T], 1)
    assert np.array_equal(to_pairs(bent), wins)
    assert np.array_equal(to_pairs(-matrix), wins.T)


def test_judged_pairs_count_as_samples_do():
    wins = count_judged([(0, 1, 1), (0, 1, 0.5), (2, 0, 0)], 3)
    assert wins.tolist() == [[0, 2, 1], [1, 0, 0], [0, 0, 0]]
    matrix = [[1, 1, 1], [0, 1, NONE], [NONE, NONE, 0]]
    assert np.array_equal(to_pairs(matrix), wins)
    for bad in [(0, 0, 1), (0, 3, 1), (-1, 0, 1), (0, 1, 2)]:
        with pytest.raises(ValueError, match="judged: got"):
            count_judged([bad], 3)


def test_a_sample_may_weigh_no_more_than_another():
    """One sample with many models against two with a pair each."""
    matrix = np.full((6, 3), NONE)
    matrix[:, 0] = [0, 1, 2, 3, 4, 5]
    matrix[:2, 1:] = [[1, 1], [0, 0]]
    assert to_pairs(matrix, equal=True).sum() == pytest.approx(3)
    assert to_pairs(matrix).sum() == 15 + 2


@pytest.mark.parametrize("bad", [[1.0, 2.0], [[1.0, 2.0]], [[np.inf], [0.0]]])
def test_no_matrix(bad):
    with pytest.raises(ValueError, match="matrix: got"):
        to_pairs(bad)


# The fit -------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(connected())
def test_the_fit_is_the_maximum_likelihood(wins):
    np.testing.assert_allclose(fit_pl(wins, tol=1e-14), bradley_terry(wins), atol=1e-11)


def test_the_fit_equals_mm_to_the_last_digits():
    wins = to_pairs(simulate(12, 400, "gumbel")[0])
    assert np.abs(fit_pl(wins, tol=1e-15) - bradley_terry(wins)).max() < 2e-14


def test_one_pass_is_close_but_not_equal():
    wins = to_pairs(simulate(20, 200, "gumbel")[0])
    fit, once = fit_pl(wins), fit_pl(wins, one_pass=True)
    assert 0.01 < np.abs(fit - once).max() < 1.5
    assert kendall(fit, once) > 0.95


def test_two_models_by_hand():
    assert fit_pl([[0, 3], [1, 0]]) == pytest.approx([np.log(3) / 2, -np.log(3) / 2], abs=1e-12)
    # with a rate of alpha = 0.1: weights 1.5 and 0.5 are fixed where 1.5 (1/2 + 0.1) = 0.5 (a/2 + 0.1)
    wins = [[0, 3.4], [1, 0]]
    assert fit_pl(wins, 0.1) == pytest.approx([np.log(3) / 2, -np.log(3) / 2], abs=1e-10)


@given(connected())
def test_fits_turn_round_with_the_wins(wins):
    np.testing.assert_allclose(fit_pl(wins.T), -fit_pl(wins), atol=1e-8)


@given(connected(), st.randoms(use_true_random=False))
def test_fits_follow_the_models(wins, random):
    order = list(range(len(wins)))
    random.shuffle(order)
    np.testing.assert_allclose(fit_pl(wins[np.ix_(order, order)]), fit_pl(wins)[order], atol=1e-9)


def test_equal_models_are_equal():
    assert fit_pl(np.ones((5, 5))).tolist() == pytest.approx([0] * 5, abs=1e-15)
    assert fit_pl(to_pairs(np.ones((4, 3)))).tolist() == pytest.approx([0] * 4, abs=1e-15)


@given(connected(), st.integers(1, 20))
def test_ties_and_alpha_shrink(wins, count):
    spread = np.ptp(fit_pl(wins))
    assert np.ptp(fit_pl(wins + count)) <= spread + 1e-9
    assert np.ptp(fit_pl(wins, alpha=count)) <= spread + 1e-9
    if spread > 1e-6:
        assert np.ptp(fit_pl(wins + count)) < spread


def reaches_all(wins):
    for start in range(len(wins)):
        seen, new = {start}, [start]
        while new:
            at = new.pop()
            for other in np.flatnonzero(wins[at]).tolist():
                if other not in seen:
                    seen.add(other)
                    new.append(other)
        if len(seen) < len(wins):
            return False
    return True


@given(st.integers(2, 7), st.integers(0, 2**32 - 1), st.floats(0.1, 0.7))
def test_strengths_are_told_only_where_the_wins_determine_them(count, seed, share):
    wins = (np.random.default_rng(seed).random((count, count)) < share).astype(float)
    np.fill_diagonal(wins, 0)
    if reaches_all(wins):
        assert np.isfinite(fit_pl(wins)).all()
    else:
        with pytest.raises(ValueError, match=r"wins: the models fall into [2-7] groups"):
            fit_pl(wins)
    assert np.isfinite(fit_pl(wins, alpha=0.05)).all()


def test_a_model_that_never_lost_is_first_with_alpha():
    wins = [[0, 5, 5], [0, 0, 3], [0, 2, 0]]
    with pytest.raises(ValueError, match="2 groups"):
        fit_pl(wins)
    assert np.argsort(-fit_pl(wins, alpha=0.01)).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (([[0, 1]],), "wins: got shape"),
        (([[0]],), "wins: got shape"),
        (([[0, -1], [1, 0]],), "wins: got negative"),
        (([[0, NONE], [1, 0]],), "wins: got negative"),
        (([[0, 1], [1, 0]], -0.1), "alpha: got"),
    ],
)
def test_wrong_arguments_of_the_fit(arguments, named):
    with pytest.raises(ValueError, match=named):
        fit_pl(*arguments)


def test_the_fit_says_that_it_did_not_end():
    with pytest.raises(RuntimeError, match="after 2 iterations"):
        fit_pl(to_pairs(simulate(20, 100, "gumbel")[0]), iterations=2)


# Tau -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=12))
def test_tau_is_counted_pair_by_pair(values):
    a, b = zip(*values, strict=True)
    score = in_a = in_b = 0
    for i, j in combinations(range(len(a)), 2):
        x, y = np.sign(a[i] - a[j]), np.sign(b[i] - b[j])
        score, in_a, in_b = score + x * y, in_a + abs(x), in_b + abs(y)
    if not in_a or not in_b:
        assert np.isnan(kendall(a, b))
    else:
        assert kendall(a, b) == pytest.approx(score / np.sqrt(in_a * in_b))


def test_tau_by_hand():
    assert kendall([1, 2, 3], [10, 20, 30]) == 1
    assert kendall([1, 2, 3], [3, 2, 1]) == -1
    assert kendall([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="b: got shape"):
        kendall([1, 2], [1, 2, 3])


# Simulated models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gaussian", "gumbel"])
def test_more_samples_tell_the_order_better(kind):
    def tau(samples):
        worth = [simulate(20, samples, kind, seed) for seed in range(6)]
        return np.mean([kendall(fit_pl(to_pairs(scores), 0.01), truth) for scores, truth in worth])

    taus = [tau(samples) for samples in (10, 60, 600)]
    assert taus == sorted(taus)
    assert taus[0] < 0.9 < 0.95 < taus[-1]


def test_the_generators():
    scores, truth = simulate(30, 400, seed=3)
    assert scores.shape == (30, 400) and truth.shape == (30,)
    assert set(np.unique(scores[:, 1::2])) == {0.0, 1.0}
    assert np.abs(scores[:, ::2].mean(1) - truth).max() < 0.1
    assert (scores[:, ::2].std(1) < 0.3).all()
    scores, truth = simulate(30, 4000, "gumbel")
    assert np.abs(scores.mean(1) - truth - 0.5772).max() < 0.1
    assert np.ptp(np.diff(np.sort(truth))) < 1e-12
    assert np.array_equal(simulate(5, 5, seed=1)[0], simulate(5, 5, seed=1)[0])
    assert not np.array_equal(simulate(5, 5, seed=1)[0], simulate(5, 5, seed=2)[0])
    with pytest.raises(ValueError, match="kind: got"):
        simulate(kind="cauchy")


def test_hiding():
    scores = np.arange(200.0).reshape(10, 20)
    left = hide(scores, 0.9, seed=1)
    assert np.isfinite(left).sum() == 20
    assert np.array_equal(left[np.isfinite(left)], scores[np.isfinite(left)])
    assert np.isfinite(hide(left, 0.5)).sum() == 10
    weights = np.where(scores < 100, 1e-6, 1.0)
    assert np.isfinite(hide(scores, 0.5, weights=weights))[5:].sum() >= 99
    with pytest.raises(ValueError, match="share: got"):
        hide(scores, 1.0)


def test_ninety_five_in_a_hundred_may_be_missing():
    matrix = simulate(40, 2000, seed=1)[0]
    few, many = ablate(matrix, 0.98, range(3)), ablate(matrix, 0.95, range(3))
    assert many.shape == (3,)
    assert many.mean() > 0.85
    assert many.mean() > few.mean()
    assert ablate(matrix, 0.0, [0]).tolist() == [1.0]


def test_averages_are_misled_by_easy_sets_and_the_fit_is_not():
    scores, truth, sets, weights = simulate_biased(40, 10, 100)
    assert mean_score(scores)[np.argmax(truth)] > 0.8  # nothing hidden: averages are right
    assert kendall(mean_score(scores), truth) > 0.9
    for set_ in range(9):
        assert scores[:, sets == set_].mean() > scores[:, sets == set_ + 1].mean()
    sparse = hide(scores, 0.9, weights=weights)
    found = {
        "fit": fit_pl(to_pairs(sparse), 0.01),
        "mean": mean_score(sparse),
        "normalised": mean_normalised(sparse, sets),
    }
    taus = {name: kendall(values, truth) for name, values in found.items()}
    assert taus["fit"] > 0.85
    assert taus["mean"] < 0.6 and taus["normalised"] < 0.6


# What it is compared with --------------------------------------------------------------------------------------


def test_means_by_hand():
    matrix = [[1.0, NONE, 30.0], [0.0, 5.0, 10.0], [0.5, 5.0, NONE]]
    assert mean_score(matrix) == pytest.approx([15.5, 5, 2.75])
    # the third set goes from 10 to 30; the second has one value only
    assert mean_normalised(matrix, ["a", "b", "c"]) == pytest.approx([1, 0.5 / 3, 0.5])
    assert mean_normalised(matrix, ["a", "a", "c"]) == pytest.approx([0.6, 1 / 3, 0.55])
    with pytest.raises(ValueError, match="sets: got"):
        mean_normalised(matrix, ["a"])
    with pytest.raises(ValueError, match=r"models \[1\] have no measurement"):
        mean_score([[1.0], [NONE]])


def test_borda_by_hand():
    matrix = [[3, 1, NONE, 9], [2, 1, NONE, NONE], [1, 0, 4, NONE]]
    assert borda(matrix) == pytest.approx([(1 + 0.75) / 2, (0.5 + 0.75) / 2, 0])


def test_elo():
    # Two models, three games won by the first, by hand.
    rating = 0.0
    for _ in range(3):
        rating += 16 * (1 - 1 / (1 + 10 ** (-2 * rating / 400)))
    assert elo([[1, 1, 1], [0, 0, 0]], shuffles=2) == pytest.approx([rating, -rating])
    scores, truth = simulate(20, 600, "gumbel")
    assert kendall(elo(scores), truth) > 0.85
    assert elo(scores).mean() == pytest.approx(0, abs=1e-9)
    assert np.array_equal(elo(scores, seed=1), elo(scores, seed=1))


# Capabilities --------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.floats(-1, 1))
def test_query_finds_the_nearest(seed, k, threshold):
    rng = np.random.default_rng(seed)
    vectors, wanted = rng.normal(size=(10, 3)), rng.normal(size=3)
    metadata = [{"task": "ab"[number % 2], "year": number // 4} for number in range(10)]
    near = [v @ wanted / np.linalg.norm(v) / np.linalg.norm(wanted) for v in vectors]
    right = [n for n in sorted(range(10), key=lambda n: -near[n]) if near[n] >= threshold and n % 2 == 0 and n < 8]
    found = query(vectors, wanted, k, threshold=threshold, metadata=metadata, filters={"task": "a", "year": [0, 1]})
    assert found.tolist() == right[:k]


def test_query_by_metadata_alone_and_its_errors():
    vectors = np.eye(3)
    assert query(vectors, [0.2, 0.9, 0.1]).tolist() == [1, 0, 2]
    assert query(vectors, [0, 0, 0]).tolist() == [0, 1, 2]
    assert query(vectors, [1, 0, 0], metadata=[{}, {"x": None}, {"x": 1}], filters={"x": None}).tolist() == [1]
    assert query(vectors, [1, 0, 0], metadata=[{}] * 3, filters={"x": 1}).tolist() == []
    with pytest.raises(ValueError, match="wanted: got shape"):
        query(vectors, [1, 0])
    with pytest.raises(ValueError, match="metadata: got 0"):
        query(vectors, [1, 0, 0], filters={"x": 1})
    with pytest.raises(ValueError, match="k: got 0"):
        query(vectors, [1, 0, 0], 0)


def test_a_capability_has_a_ranking_of_its_own():
    """Two models, each better in one half of the samples."""
    matrix = np.array([[1.0] * 5 + [0.0] * 4 + [1.0], [0.0] * 4 + [1.0] + [1.0] * 5])
    vectors = np.array([[1.0, 0.0]] * 5 + [[0.0, 1.0]] * 5)
    for wanted, best in (([1, 0], 0), ([0, 1], 1)):
        found = query(vectors, wanted, 5)
        assert np.argmax(fit_pl(to_pairs(matrix[:, found]))) == best
