"""Intervals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vistok.bench.statistics import paired_bootstrap, wilson


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),  # published tables of the Wilson score interval
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_published_values(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=6e-5)


@given(st.integers(0, 500), st.data())
def test_the_interval_holds_the_share_and_is_symmetric(n, data):
    right = data.draw(st.integers(0, n))
    low, high = wilson(right, n)
    assert 0 <= low <= high <= 1
    if n:
        assert low <= right / n + 1e-12
        assert right / n <= high + 1e-12
    assert wilson(n - right, n) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(("right", "n"), [(-1, 3), (4, 3)])
def test_impossible_counts(right, n):
    with pytest.raises(ValueError, match="right: got"):
        wilson(right, n)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40), st.integers(0, 9))
def test_bootstrap_of_pairs_holds_their_difference(pairs, seed):
    values, others = zip(*pairs, strict=True)
    low, high = paired_bootstrap(values, others, seed=seed, resamples=500)
    middle = sum(values) / len(pairs) - sum(others) / len(pairs)
    assert low <= middle + 1e-9 and high >= middle - 1e-9
    assert (low, high) == paired_bootstrap(values, others, seed=seed, resamples=500)
    if all(a == b for a, b in pairs):
        assert low == high == 0


def test_bootstrap_is_as_wide_as_the_normal_interval():
    values = [1.0] * 60 + [0.0] * 40
    low, high = paired_bootstrap(values, [0.0] * 100)
    half = 1.96 * (0.6 * 0.4 / 100) ** 0.5
    assert low == pytest.approx(0.6 - half, abs=0.015) and high == pytest.approx(0.6 + half, abs=0.015)


@pytest.mark.parametrize(("values", "others"), [([], []), ([1.0], [1.0, 0.0])])
def test_bootstrap_wants_pairs(values, others):
    with pytest.raises(ValueError, match="others: got"):
        paired_bootstrap(values, others)


def test_values_that_all_differ_are_paired_too():
    rng = np.random.default_rng(0)
    dense = rng.random(200)
    assert paired_bootstrap(dense.tolist(), (dense - 0.1).tolist()) == pytest.approx((0.1, 0.1))
    low, high = paired_bootstrap(dense.tolist(), (dense - 0.1 + 0.2 * rng.normal(size=200)).tolist())
    assert low < 0.1 < high
    assert high - low == pytest.approx(2 * 1.96 * 0.2 / 200**0.5, rel=0.2)
