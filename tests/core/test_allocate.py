"""Budgets against exact fractions; schedules against what they promise."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.core import oracle
from vistok.core.allocate import layer_schedule, softmax_shares, split_budget


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=7),
    st.integers(0, 40),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_split_budget(weights, total, limited, by_weight, seed):
    """Whole weights: quotas, ties and redistribution are exactly those of the fractions."""
    generator = torch.Generator().manual_seed(seed)
    b = 3
    rows = torch.stack([torch.tensor(weights)[torch.randperm(len(weights), generator=generator)] for _ in range(b)])
    totals = torch.tensor([total, total // 2, 0])
    capacity = torch.randint(0, 12, rows.shape, generator=generator) if limited else None
    given_ = split_budget(rows.double(), totals, capacity, "weight" if by_weight else "remainder")
    assert given_.dtype == torch.int64
    for p in range(b):
        room = capacity[p].tolist() if limited else [int(totals[p])] * len(weights)
        assert given_[p].tolist() == oracle.hamilton(rows[p].tolist(), int(totals[p]), room, by_weight)
        assert int(given_[p].sum()) == min(int(totals[p]), sum(room))


@given(
    st.lists(st.floats(0, 1e300, allow_nan=False), min_size=1, max_size=40),
    st.integers(0, 3000),
    st.integers(0, 100),
)
def test_split_budget_always_adds_up(weights, total, room):
    row = torch.tensor([weights], dtype=torch.float64)
    assert int(split_budget(row, total).sum()) == total
    capacity = torch.full(row.shape, room)
    given_ = split_budget(row, total, capacity)
    assert int(given_.sum()) == min(total, room * len(weights)) and int(given_.max()) <= room and int(given_.min()) >= 0


@pytest.mark.parametrize(
    ("weights", "total", "capacity", "expected"),
    [
        ([1, 1, 1], 8, None, [3, 3, 2]),  # equal remainders: the lower index first
        ([0.1, 0.1, 0.1], 3, None, [1, 1, 1]),
        ([1, 2, 12], 27, None, [2, 4, 21]),  # remainders of 4/5, 3/5, 3/5: equal, although rounded differently
        ([4, 9, 2], 36, None, [10, 21, 5]),  # 3/5, 3/5, 4/5
        ([6, 3, 1], 10, None, [6, 3, 1]),
        ([8, 1, 1], 10, [4, 9, 9], [4, 3, 3]),  # what the first cannot take goes to the others
        ([1, 0, 0], 5, [2, 9, 9], [2, 2, 1]),  # weight 0 only once the others are full
        ([0, 0], 3, None, [2, 1]),
        ([5, 5], 100, [3, 4], [3, 4]),
        ([1, 4], 1, None, [0, 1]),
    ],
)
def test_split_budget_examples(weights, total, capacity, expected):
    limit = None if capacity is None else torch.tensor([capacity])
    assert split_budget(torch.tensor([weights]).float(), total, limit).tolist() == [expected]


def test_split_budget_leftover_by_weight():
    """2.2, 1.9 and 0.9: two are left over, for the largest remainders or for the heaviest groups."""
    row = torch.tensor([[2.2, 1.9, 0.9]])
    assert split_budget(row, 5).tolist() == [[2, 2, 1]]
    assert split_budget(row, 5, leftover="weight").tolist() == [[3, 2, 0]]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: split_budget(torch.tensor([[1.0, -1]]), 2), "weights"),
        (lambda: split_budget(torch.tensor([[1.0, torch.nan]]), 2), "weights"),
        (lambda: split_budget(torch.ones(3), 2), "weights"),
        (lambda: split_budget(torch.ones(1, 0), 2), "weights"),
        (lambda: split_budget(torch.ones(1, 2), -1), "total"),
        (lambda: split_budget(torch.ones(1, 2), 1, torch.tensor([[-1, 2]])), "capacity"),
        (lambda: split_budget(torch.ones(1, 2), 1, leftover="first"), "leftover"),
        (lambda: softmax_shares(torch.ones(1, 2), 0), "temperature"),
        (lambda: layer_schedule("linear", 4, 0.5), "kind"),
        (lambda: layer_schedule("cosine", 0, 0.5), "num_layers"),
        (lambda: layer_schedule("cosine", 4, 1.5), "mean"),
        (lambda: layer_schedule("cosine", 4, 0.5, fall=0), "fall"),
        (lambda: layer_schedule("pyramid", 8, 0.9), "mean: got 0.9, a pyramid schedule .* at most 0.4688"),
    ],
)
def test_errors_name_the_argument(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def test_softmax_shares():
    scores = torch.tensor([[1.0, 2, 3], [1e4, -1e4, 0]])
    shares = softmax_shares(scores, 0.5)
    assert torch.allclose(shares.sum(1), torch.ones(2, dtype=torch.float64))
    assert shares[0, 2] / shares[0, 1] == pytest.approx(2.718281828**2)
    torch.testing.assert_close(softmax_shares(scores + 7, 0.5), shares)
    assert torch.allclose(softmax_shares(scores[:1], 1e9), torch.full((1, 3), 1 / 3, dtype=torch.float64))


@given(
    st.sampled_from(["constant", "cosine", "pyramid"]),
    st.integers(1, 40),
    st.floats(0.01, 0.4),
    st.floats(0.05, 1),
    st.integers(1, 6),
)
def test_layer_schedule(kind, layers, mean, fall, stages):
    try:
        shares = layer_schedule(kind, layers, mean, fall, stages)
    except ValueError as error:
        reachable = float(str(error).split("at most ")[1].split()[0])
        assert reachable < mean
        layer_schedule(kind, layers, reachable - 1e-3, fall, stages)
        return
    assert len(shares) == layers and sum(shares) / layers == pytest.approx(mean)
    assert all(a >= b - 1e-12 for a, b in pairwise(shares)) and 0 < shares[-1] <= shares[0] <= 1
    if kind == "cosine" and layers > 1:
        assert shares[-1] / shares[0] == pytest.approx(fall)
        assert sum(shares) / layers == pytest.approx((shares[0] + shares[-1]) / 2)
    if kind == "constant":
        assert shares == pytest.approx([mean] * layers)


def test_pyramid_halves_four_times():
    shares = layer_schedule("pyramid", 32, 0.46875)
    assert shares == pytest.approx([1.0] * 8 + [0.5] * 8 + [0.25] * 8 + [0.125] * 8)
    counts = split_budget(torch.tensor([shares]), 32 * 64, torch.full((1, 32), 576))
    assert int(counts.sum()) == 32 * 64 and sorted(counts[0].tolist(), reverse=True) == counts[0].tolist()
