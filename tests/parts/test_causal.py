"""The small causal model: what sees what, and what ids cost."""

from __future__ import annotations

import math

import pytest
import torch

from vistok.parts.causal import CausalModel


def small(classes=0):
    torch.manual_seed(0)
    return CausalModel(7, 5, 12, 2, 3, classes).eval()


@torch.no_grad()
def test_a_logit_depends_on_what_came_before_only():
    model, ids = small(), torch.randint(7, (2, 4), generator=torch.Generator().manual_seed(0))
    logits = model(ids)
    assert logits.shape == (2, 5, 7)
    changed = ids.clone()
    changed[:, 2] = (ids[:, 2] + 1) % 7
    moved = (model(changed) - logits).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [False, False, False, True, True]


@torch.no_grad()
def test_the_cost_is_that_of_each_id_by_hand():
    model, ids = small(3), torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(0))
    label = torch.tensor([0, 2])
    for row in range(2):
        nats = 0.0
        for i in range(5):
            logits = model(ids[row : row + 1, :i], label[row : row + 1])[0, -1]
            nats -= float(logits.log_softmax(0)[ids[row, i]])
        assert float(model.nats(ids, label)[row]) == pytest.approx(nats, rel=1e-5)
    assert float(model.loss(ids, label)) == pytest.approx(float(model.nats(ids, label).mean()) / 5)


def test_it_learns_a_rule():
    model = small().train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    rng = torch.Generator().manual_seed(0)
    for _ in range(60):
        first = torch.randint(7, (32, 1), generator=rng)
        loss = model.loss((first + torch.arange(5)) % 7)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 5 * float(loss.detach()) < math.log(7) + 0.5  # the first id is a guess, the others follow


def test_bad_input():
    with pytest.raises(ValueError, match="heads: got 5, must divide width, 12"):
        CausalModel(7, 5, 12, 1, 5)
    with pytest.raises(ValueError, match="before: got shape"):
        small()(torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="label: got None"):
        small(3)(torch.zeros(1, 2, dtype=torch.int64))
