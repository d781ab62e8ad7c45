"""Intervals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vistok.bench.statistics import wilson


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
