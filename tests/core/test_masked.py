"""Masked token models: how many are masked, what stays, and guidance."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from vistok.core.masked import guidance_at, gumbel, masked_left, sampling_steps, training_mask

K, MASK = 12, 12


def model(ids, conditional):
    """Logits that depend on the ids, on the place and on the condition."""
    generator = torch.Generator().manual_seed(7)
    table, places = torch.randn(K + 1, K, generator=generator), torch.randn(1, ids.shape[1], K, generator=generator)
    return table[ids].cumsum(1) + places * (2 if conditional else 1)


def run(b=3, n=16, steps=8, seed=0, start=None, **how):
    start = torch.full((b, n), MASK) if start is None else start
    return [start, *sampling_steps(model, start, MASK, steps, generator=torch.Generator().manual_seed(seed), **how)]


@pytest.mark.parametrize(("n", "steps"), [(16, 8), (5, 8), (32, 1), (7, 3), (1, 2)])
def test_counts_follow_the_schedule_and_nothing_kept_is_masked_again(n, steps):
    states = run(n=n, steps=steps)
    assert len(states) == steps + 1
    left = n
    for step, (before, after) in enumerate(pairwise(states)):
        kept = before != MASK
        assert torch.equal(after[kept], before[kept])
        left = max(1, min(left - 1, math.floor(n * math.acos((step + 1) / steps) * 2 / math.pi)))
        expected = 0 if step == steps - 1 else min(left, n)
        assert (after == MASK).sum(1).tolist() == [expected] * 3


def test_pictures_with_other_numbers_of_known_tokens_do_not_see_one_another():
    start = torch.full((3, 10), MASK)
    start[1, :6] = 2
    start[2] = 5
    states = run(start=start, steps=4, temperature=0.0)
    assert torch.equal(states[-1][1, :6], start[1, :6]) and torch.equal(states[-1][2], start[2])
    assert (states[-1] != MASK).all() and all((s[2] == 5).all() for s in states)
    alone = run(start=start[1:2], steps=4, temperature=0.0)
    assert torch.equal(alone[-1][0], states[-1][1])


def test_the_same_under_a_seed_and_greedy_without_temperature():
    assert torch.equal(run()[-1], run()[-1]) and not torch.equal(run()[-1], run(seed=1)[-1])
    assert torch.equal(run(temperature=0.0)[-1], run(temperature=0.0, seed=1)[-1])
    one = run(steps=1, temperature=0.0, scale=0.0, decay="constant")[-1]
    assert torch.equal(one, model(torch.full((3, 16), MASK), True).argmax(-1))


def test_guidance_schedules():
    assert [guidance_at(s, 4, 2.0, "constant") for s in range(4)] == [2.0] * 4
    assert [guidance_at(s, 4, 2.0, "linear") for s in range(4)] == [0, 0.5, 1, 1.5]
    rising = [guidance_at(s, 4, 3.0, "power-cosine", 1.0) for s in range(4)]
    assert rising == sorted(rising) and rising[0] == 0 and rising[2] == pytest.approx(1)
    with pytest.raises(ValueError, match="decay: got 'none'"):
        guidance_at(0, 4, 2.0, "none")
    with pytest.raises(ValueError, match="steps: got 0"):
        run(steps=0)


def test_training_masks():
    u = torch.tensor([0.0, 0.5, 0.999999, 1.0])
    order = torch.rand(4, 30)
    mask = training_mask(u, order)
    assert mask.sum(1).tolist() == [30, 20, 1, 1]
    assert [masked_left(s, 4, 30) for s in range(4)] == [25, 20, 13, 0]


def test_gumbel_noise_is_finite_and_gumbel():
    assert torch.isfinite(gumbel(torch.tensor([0.0, 1.0, 0.5]))).all()
    noise = gumbel(torch.rand(200_000, generator=torch.Generator().manual_seed(0)))
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.03)
