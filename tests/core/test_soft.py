"""Soft aggregation and its way back, against loops over slots and tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vistok.core.soft import aggregate, gather_weights, return_weights, unpool


def softmax(values):
    top = max(values, default=0.0)
    exp = [math.exp(v - top) for v in values]
    return [e / sum(exp) for e in exp]


def oracle(x, logits, mask):
    """Slots, what ``unpool`` and what ``return_weights`` gives back of them; one picture, with Python floats."""
    k, n, c = len(logits), len(x), len(x[0])
    real = [j for j in range(n) if mask[j]]
    weights = [[0.0] * n for _ in range(k)]
    for i in range(k):
        for j, share in zip(real, softmax([logits[i][j] for j in real]), strict=True):
            weights[i][j] = share
    slots = [[sum(weights[i][j] * x[j][d] for j in range(n)) for d in range(c)] for i in range(k)]
    unpooled, returned = [], []
    for j in range(n):
        total = sum(weights[i][j] for i in range(k)) or 1.0
        unpooled.append([sum(weights[i][j] * slots[i][d] for i in range(k)) / total for d in range(c)])
        back = softmax([logits[i][j] for i in range(k)])
        returned.append([mask[j] * sum(back[i] * slots[i][d] for i in range(k)) for d in range(c)])
    return slots, unpooled, returned


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(1, 4), st.integers(0, 999))
def test_against_loops(b, k, n, c, seed):
    rng = torch.Generator().manual_seed(seed)
    x, logits = torch.randn(b, n, c, generator=rng), 3 * torch.randn(b, k, n, generator=rng)
    mask = torch.rand(b, n, generator=rng) > 0.3
    weights = gather_weights(logits, mask)
    slots = aggregate(x, weights)
    for i in range(b):
        expected = oracle(x[i].double().tolist(), logits[i].double().tolist(), mask[i].tolist())
        got = slots[i], unpool(slots, weights)[i], aggregate(slots, return_weights(logits, mask))[i]
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, torch.tensor(theirs), rtol=1e-4, atol=1e-5)


def test_slots_are_convex_combinations_and_equal_values_stay():
    logits = torch.randn(2, 3, 4, 7)
    weights = gather_weights(logits)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 4))
    torch.testing.assert_close(return_weights(logits).sum(-1), torch.ones(2, 3, 7))
    same = torch.full((2, 3, 7, 5), 1.5)
    torch.testing.assert_close(aggregate(same, weights), torch.full((2, 3, 4, 5), 1.5))
    torch.testing.assert_close(unpool(aggregate(same, weights), weights), same)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    x, logits = torch.randn(1, 6, 3, dtype=dtype), torch.randn(1, 2, 6, dtype=dtype)
    weights = gather_weights(logits)
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    slots = aggregate(x, weights)
    assert slots.dtype == unpool(slots, weights).dtype == dtype
    expected = aggregate(x.double(), gather_weights(logits.double()))
    torch.testing.assert_close(slots.double(), expected, rtol=2e-2, atol=2e-2)


def test_extreme_logits_and_nothing_left_stay_finite():
    x, logits = torch.randn(2, 5, 3, dtype=torch.float16), 6e4 * torch.rand(2, 4, 5).sub(0.5).sign().half()
    mask = torch.tensor([[True] * 5, [False] * 5])
    slots = aggregate(x, gather_weights(logits, mask))
    assert slots.isfinite().all() and not slots[1].any()
    assert unpool(slots, gather_weights(logits, mask)).isfinite().all()


def test_gradients_with_a_mask():
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, True, True, False], [False] * 5])

    def round_trip(x, logits):
        weights = gather_weights(logits, mask)
        slots = aggregate(x, weights)
        return unpool(slots, weights), aggregate(slots, return_weights(logits, mask))

    assert torch.autograd.gradcheck(round_trip, (x, logits))


def test_errors_name_the_argument():
    x, weights = torch.randn(1, 4, 2), torch.rand(1, 3, 5)
    with pytest.raises(ValueError, match=r"weights: got columns for 5 tokens, must be the 4 of x"):
        aggregate(x, weights)
    with pytest.raises(ValueError, match=r"weights: got rows for 3 slots, must be the 4"):
        unpool(x, weights)
    with pytest.raises(ValueError, match=r"mask: got \(1, 4\), must be \(1, 5\)"):
        gather_weights(weights, torch.ones(1, 4, dtype=torch.bool))
