"""Counts of staged reducers against exhaustive search, and slots in raster order."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vistok.core.stages import _quotas, geometric_stages, raster_slots, stage_counts, stage_starts


def test_examples_of_the_papers():
    """ApET: 96, then 32 after 16 of 32 layers. VisionDrop: 48, 35, 26, 19 in quarters of 32 layers."""
    assert stage_counts((16, 16), (3, 1), 64, 576) == (96, 32)
    fall = 19 / 48
    assert stage_counts((8, 8, 8, 8), tuple(fall ** (i / 3) for i in range(4)), 32, 576) == (48, 35, 26, 19)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.floats(0.1, 1)), min_size=1, max_size=4),
    st.integers(1, 40),
    st.integers(0, 30),
)
def test_mean_is_exact_and_counts_do_not_rise(stages, mean, room):
    lengths = tuple(length for length, _ in stages)
    shape = tuple(sorted((share for _, share in stages), reverse=True))
    limit = mean + room
    counts = stage_counts(lengths, shape, mean, limit)
    assert sum(length * count for length, count in zip(lengths, counts, strict=True)) == mean * sum(lengths)
    assert list(counts) == sorted(counts, reverse=True)
    assert 1 <= counts[-1] and counts[0] <= limit


@pytest.mark.parametrize("lengths", [(2, 1), (3, 3), (2, 1, 2), (3, 2, 1)])
@pytest.mark.parametrize("mean", [1, 2, 5, 7])
def test_nearest_of_all_exact_answers(lengths, mean):
    """Exhaustively: no exact, falling answer has a smaller largest distance (in whole tokens)."""
    shape, limit = (3.0, 1.5, 1.0)[: len(lengths)], 9
    quotas = _quotas(lengths, shape, mean * sum(lengths), limit)

    def far(counts):
        return max(abs(c - q) for c, q in zip(counts, quotas, strict=True))

    exact = [
        c
        for c in product(range(1, limit + 1), repeat=len(lengths))
        if sum(n * x for n, x in zip(lengths, c, strict=True)) == mean * sum(lengths)
        and list(c) == sorted(c, reverse=True)
    ]
    counts = stage_counts(lengths, shape, mean, limit)
    assert counts in exact
    assert far(counts) <= -(-min(map(far, exact)) // 1)


def test_limit_is_shared_again():
    counts = stage_counts((1, 1), (3, 1), 8, 10)
    assert counts == (10, 6)
    assert stage_counts((4, 4), (3, 1), 10, 10) == (10, 10)


@pytest.mark.parametrize(
    ("lengths", "shape", "mean", "limit", "named"),
    [
        ((1,), (1.0, 0.5), 1, 2, "lengths"),
        ((0, 1), (1.0, 0.5), 1, 2, "lengths"),
        ((1, 1), (0.5, 1.0), 1, 2, "shape"),
        ((1, 1), (1.0, 0.0), 1, 2, "shape"),
        ((1, 1), (1.0, 0.5), 3, 2, "mean"),
        ((1, 1), (1.0, 0.5), 0, 2, "mean"),
    ],
)
def test_wrong_arguments_are_named(lengths, shape, mean, limit, named):
    with pytest.raises(ValueError, match=named):
        stage_counts(lengths, shape, mean, limit)


def test_starts():
    assert stage_starts((0, 0.25, 0.5, 0.75), 32) == (0, 8, 16, 24)
    assert stage_starts((0, 0.25, 0.5, 0.75), 6) == (0, 2, 3, 5)
    assert stage_starts((0, 0.25, 0.5, 0.75), 2) == (0, 1)
    assert stage_starts((0, 0.5), 1) == (0,)
    with pytest.raises(ValueError, match="shares"):
        stage_starts((0.5, 0.25), 4)
    with pytest.raises(ValueError, match="num_layers"):
        stage_starts((0.5,), 0)


def test_stages_by_depth():
    assert geometric_stages((0.25, 0.5, 0.75), 19 / 48, 32, 576, 32) == (48, {8: 35, 16: 26, 24: 19})
    assert geometric_stages((0.5,), 1 / 3, 64, 576, 32) == (96, {16: 32})
    assert geometric_stages((0.5,), 1 / 3, 64, 576, 1) == (64, {})
    assert geometric_stages((), 1 / 3, 64, 576, 32) == (64, {})
    assert geometric_stages((0.25, 0.5, 0.75), 0.5, 576, 576, 12) == (576, {3: 576, 6: 576, 9: 576})


def test_slots_follow_their_anchors():
    anchor = torch.tensor([[5, 0, 3], [1, 4, 2]])
    tokens = torch.arange(6.0).view(2, 3, 1)
    source = torch.tensor([[1, -1, 2, 2, 0, 0], [0, 0, 2, -1, 1, 1]])
    place, values, where = raster_slots(anchor, tokens, source)
    assert place.tolist() == [[0, 3, 5], [1, 2, 4]]
    assert values[..., 0].tolist() == [[1, 2, 0], [3, 5, 4]]
    assert where.tolist() == [[0, -1, 1, 1, 2, 2], [0, 0, 1, -1, 2, 2]]
    for b, i in product(range(2), range(6)):
        if source[b, i] >= 0:
            assert anchor[b, source[b, i]] == place[b, where[b, i]]


def test_no_slots():
    place, values, where = raster_slots(
        torch.empty(2, 0, dtype=torch.int64), torch.empty(2, 0, 3), torch.full((2, 4), -1)
    )
    assert place.shape == (2, 0) and values.shape == (2, 0, 3)
    assert (where == -1).all()
