"""EViT, line by line of its sheet."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

import vistok
from tests.vit.test_contract import case
from tests.vit.towers import DEPTH, PATCHES, built, pixels
from vistok.vit.evit import EViT, KeepRateSchedule, reorganize


def test_keeping_all_is_the_plain_block():
    assert EViT(keep=1.0).plan(196, 12) == [196] * 12
    _, evidence = case()
    assert EViT(keep=1.0).count(20, evidence.stage) == 20


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("keep", [0.9, 0.7, 0.5, 0.33])
def test_token_count(keep, fuse):
    n, plan = 196, EViT(keep=keep, fuse=fuse).plan(196, 12)
    for layer in (3, 6, 9):
        n = math.ceil(keep * n) + fuse
        assert plan[layer] == n


def test_a_single_token_left_over_is_fused_all_the_same():
    """ceil(0.99 * 64) = 64 is nothing to do; 63 and a fused one are as many tokens, but not the same."""
    model, x = built("timm-vit"), pixels()
    with torch.no_grad():
        plain = model(x)
        with vistok.apply(model, EViT(keep=63, layers=(2,))) as session:
            other = model(x)
    assert session.tokens == [PATCHES] * DEPTH and session.states[-1].merged
    assert not torch.equal(plain, other)


@pytest.mark.parametrize("order", ["raster", "author"])
def test_fused_token_is_the_weighted_sum_of_the_others(order):
    state, evidence = case()
    score = evidence.class_row.mean(1)
    after = EViT(order=order).reduce(state, evidence, 7)
    for i in range(3):
        ranked = sorted(range(20), key=lambda j: -float(score[i, j]))
        kept, others = ranked[:7], ranked[7:]
        kept = sorted(kept) if order == "raster" else kept
        assert torch.equal(after.slots[i, :7], state.slots[i, kept])
        torch.testing.assert_close(after.slots[i, 7], sum(score[i, j] * state.slots[i, j] for j in others))
        assert after.source[i, kept].tolist() == list(range(7)) and set(after.source[i, others].tolist()) == {7}
        assert after.size[i].tolist() == [1.0] * 7 + [13.0] and int(after.anchor[i, 7]) == ranked[7]


def test_equal_patches_show_that_the_sum_is_not_normalised():
    state, evidence = case()
    state = state.with_slots(torch.full_like(state.slots, 2.5))
    score = evidence.class_row.mean(1)
    fused = EViT().reduce(state, evidence, 7).slots[:, 7]
    dropped = score.sum(1) - score.topk(7).values.sum(1)
    torch.testing.assert_close(fused, 2.5 * dropped[:, None].expand(-1, 8))


def test_an_order_of_patches_makes_no_difference():
    state, evidence = case()
    turn = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    score = evidence.class_row.mean(1)
    one = reorganize(state, score, 7)
    two = reorganize(state.with_slots(state.slots[:, turn]), score[:, turn], 7)

    def as_set(slots):
        return slots[:, :7].sort(1).values

    assert torch.equal(as_set(one.slots), as_set(two.slots))
    torch.testing.assert_close(one.slots[:, 7], two.slots[:, 7])


def test_gradient_reaches_dropped_tokens_only_through_the_fused_one():
    state, evidence = case()
    score = evidence.class_row.mean(1)
    for fuse in (False, True):
        values = state.slots.clone().requires_grad_()
        after = reorganize(state.with_slots(values), score, 7, fuse)
        gone = after.source[0] == (7 if fuse else -1)
        (kept,) = torch.autograd.grad(after.slots[:, :7].sum(), values, retain_graph=fuse)
        assert not bool(kept[0, gone].any()) and bool((kept[0, ~gone] == 1).all())
        if fuse:
            (fused,) = torch.autograd.grad(after.slots[:, 7].sum(), values)
            torch.testing.assert_close(fused[0, gone], score[0, gone][:, None].expand(-1, 8))


def test_schedule_is_the_papers():
    rate = KeepRateSchedule(base=0.7, start=10, length=100)
    assert [rate(e) for e in (0, 9.99)] == [1.0, 1.0]
    assert rate(10) == 1.0 and rate(60) == pytest.approx(0.85) and rate(110) == 0.7 and rate(300) == 0.7
    falling = [rate(e / 7) for e in range(70, 900)]
    assert all(a >= b for a, b in pairwise(falling))
    lower = KeepRateSchedule(base=0.5, start=2, length=4, maximum=0.9)
    assert lower(1.9) == 1.0 and lower(2) == pytest.approx(0.9) and lower(6) == pytest.approx(0.5)
    assert KeepRateSchedule(length=0)(10) == 0.7


def test_a_few_steps_of_training_along_the_schedule():
    """A session a step; the loss falls, and the tokens with the rate."""
    from tests.vit.towers import KINDS

    model = KINDS["timm-vit"].build(depth=4).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rate, x, labels = KeepRateSchedule(base=0.4, start=2, length=6), pixels(8), torch.arange(8) % 5
    losses, tokens = [], []
    for step in range(10):
        with vistok.apply(model, EViT(keep=rate(step), layers=(1, 2))) as session:
            loss = torch.nn.functional.cross_entropy(model(x), labels)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        tokens.append(session.tokens[-1])
    assert tokens[:3] == [64] * 3 and tokens[-1] == EViT(keep=0.4, layers=(1, 2)).plan(64, 4)[-1]
    assert tokens == sorted(tokens, reverse=True) and losses[-1] < losses[0]


def test_wrong_order_is_named():
    with pytest.raises(ValueError, match=r"^order: got 'falling'"):
        EViT(order="falling")
