"""Small networks of attention claims, on handwritten digits."""

from __future__ import annotations

import torch
from torch import nn

from vistok.bench.attend_trial import AttendTrial


def test_learns_digits_and_repeats_itself():
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        losses = AttendTrial(seed=3).fit(model, 40, peak_lr=1e-2)
        found.append((losses, AttendTrial().accuracy(model)))
        assert not model.training
    assert found[0] == found[1] and found[0][1] > 0.6 and losses[-1] < losses[0] / 2
    assert AttendTrial().accuracy(model, torch.zeros_like) < 0.2


def test_draws_by_the_generator():
    trial = AttendTrial()
    pictures, labels = trial.draw(torch.Generator().manual_seed(1), 9)
    assert pictures.shape == (9, 1, 8, 8) and labels.shape == (9,) and pictures.min() == -1 and pictures.max() <= 1
    again, _ = trial.draw(torch.Generator().manual_seed(1), 9)
    assert torch.equal(pictures, again)


def test_a_loss_of_its_own():
    model = nn.Linear(1, 1)
    losses = AttendTrial().fit(model, 5, loss=lambda net, rng: net(torch.rand(4, 1, generator=rng)).square().mean())
    assert len(losses) == 5
