"""lra: every mixer in the same network, as many parameters, masks, the read-outs beside it, and the claim."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from vistok.attend.lra import (
    MIXERS,
    TASKS,
    LongRangeArena,
    Mixer,
    Score,
    claim,
    commonest,
    counted,
    parameters,
)
from vistok.bench.attend_trial import AttendTrial
from vistok.world.lra import Sequences

TINY = LongRangeArena(width=24, layers=2, heads=2, hidden=48, steps=2, batch=4)


@pytest.fixture(scope="module")
def tasks():
    lengths = {"pathfinder": 256}
    return {name: draw(lengths.get(name, 64), 20, 8, 0) for name, draw in TASKS.items()}


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_learns_from_all_its_parameters_and_sees_its_own_rows_alone(tasks, name):
    torch.manual_seed(0)
    train = tasks["listops"][0]
    net = LongRangeArena(24, 2, 2, 96).build(name, train, free=True)
    tokens = torch.tensor(train.tokens[:6])
    net(tokens).square().sum().backward()
    without = [n for n, p in net.named_parameters() if p.grad is None]
    assert not without and all(bool(p.grad.isfinite().all()) for p in net.parameters())
    net.eval()
    torch.testing.assert_close(net(tokens[:2]), net(tokens)[:2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_runs(tasks, name):
    score = TINY.run(AttendTrial(), "dense", tasks[name])
    assert 0 <= score.accuracy <= 1 and not score.free and score.steps_per_second > 0


def test_parameters_are_within_a_tenth_or_it_is_said(tasks):
    train = tasks["listops"][0]
    arena = LongRangeArena(48, 2, 4, 96)
    plain = arena.build("dense", train)
    within = []
    for name in MIXERS:
        net = arena.build(name, train, free=True)
        if arena.fits(net, plain):
            within.append(name)
            assert abs(parameters(arena.build(name, train)) / parameters(plain) - 1) <= 0.1
        else:
            with pytest.raises(ValueError, match=f"name: got '{name}', which has"):
                arena.build(name, train)
    assert {"transnext", "infsa", "davit", "s2aformer", "gna", "halonet"} <= set(within)


@pytest.mark.parametrize("name", MIXERS)
def test_what_is_behind_padding_changes_nothing(tasks, name):
    train = tasks["listops"][0]
    net = TINY.build(name, train, free=True).eval()
    row = torch.tensor(train.tokens[:1])
    length = int((row >= 0).sum())
    assert length < 64
    with torch.no_grad():
        before = net(row)
        net.place[length:] += 10
        net.embed.weight[-1] += 10
        torch.testing.assert_close(net(row), before)


@pytest.mark.parametrize("name", ["dense", "infsa", "infsa-pure", "softhgnn"])
def test_mixers_that_mask_padding(name):
    torch.manual_seed(0)
    layer = MIXERS[name].make(24, 2, (8, 8), 0).eval()
    mask = (torch.arange(64) < 40).expand(2, 64)
    x = torch.randn(2, 64, 24)
    other = torch.where(mask[..., None], x, torch.randn(2, 64, 24))
    before, after = (MIXERS[name].call(layer, given, (8, 8), mask)[:, :40] for given in (x, other))
    torch.testing.assert_close(after, before)


def test_pairs_are_encoded_alike(tasks):
    net = TINY.build("dense", tasks["retrieval"][0]).eval()
    pair = torch.tensor(tasks["retrieval"][0].tokens[:2])
    a, b = net.encode(pair[:, 0]), net.encode(pair[:, 1])
    torch.testing.assert_close(net(pair), net.head(torch.cat([a, b, a * b, a - b], 1)))


def test_read_outs_without_a_network():
    tokens = np.array([[0, 0, 1, -1], [1, 1, 1, 0], [0, 0, 0, 1], [1, 1, 0, 1]])
    rows = Sequences(tokens, np.array([0, 1, 0, 1]), 2, 2)
    assert counted(rows, rows) == 1.0 and commonest(rows, rows[1:2]) == 0.0 and commonest(rows, rows) == 0.5
    same = Sequences(np.stack([tokens, tokens[::-1]], 1), np.array([0, 0, 0, 1]), 2, 2)
    assert 0 <= counted(same, same) <= 1 and commonest(same, same) == 0.75


def test_parts_of_a_task_have_no_row_in_common(tasks):
    for train, test in tasks.values():
        rows = np.concatenate([train.tokens, test.tokens]).reshape(28, -1)
        assert len(np.unique(rows, axis=0)) == 28


def test_a_mixer_of_ones_own(tasks):
    mine = {
        "mean": Mixer(lambda d, h, s, i: nn.Linear(d, d), lambda of, x, s, m: of(x.mean(1, keepdim=True)).expand_as(x))
    }
    assert TINY.run(AttendTrial(), "mean", tasks["text"], mine).parameters > 0


def test_equal_seeds_give_equal_scores(tasks):
    first, again = (TINY.run(AttendTrial(), "transnext", tasks["text"]) for _ in range(2))
    assert first.accuracy == again.accuracy and first.parameters == again.parameters


def test_what_does_not_fit_is_said(tasks):
    with pytest.raises(ValueError, match="name: got 'x'"):
        TINY.build("x", tasks["text"][0])
    odd = Sequences(np.zeros((2, 50), np.int64), np.zeros(2, np.int64), 2, 4)
    with pytest.raises(ValueError, match="task: got sequences of 50"):
        TINY.build("dense", odd)


@pytest.mark.parametrize("better", [True, False])
def test_the_claim_can_hold_and_can_fail(monkeypatch, better):
    def run(self, trial, name, task, mixers=MIXERS):
        return Score(0.6 if (name == "transnext") == better else 0.5, 1, False, 1.0)

    monkeypatch.setattr(LongRangeArena, "run", run)
    outcome = claim(AttendTrial(), tasks=("text",))
    assert (outcome.holds is better and "text 50.0%, 60.0%" in outcome.note) or not better
