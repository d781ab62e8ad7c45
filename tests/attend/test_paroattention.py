"""paroattention: what its sheet says must hold, calibration, the INT8 path and the claim."""

from __future__ import annotations

import math

import pytest
import torch

from vistok.attend import paroattention
from vistok.attend.paroattention import (
    ORDERS,
    PAROAttention,
    Plan,
    axis_order,
    choose_order,
    claim,
    int8_attention,
    paro_attention,
    quantize_rows,
)
from vistok.bench.attend_trial import AttendTrial
from vistok.core.attention import Dense, attend

GRID = (2, 3, 5)


def made(heads=6, text=0, grid=GRID, d=8, b=2, dtype=torch.float64):
    n = math.prod(grid) + text
    return torch.randn(3, b, heads, n, d, dtype=dtype, generator=torch.Generator().manual_seed(0)).unbind()


def full(text=0, block=4, first=True, groups=1):
    blocks = -(-math.prod(GRID) // block)
    return Plan(GRID, torch.arange(6), torch.ones(groups, 6, blocks, blocks).bool(), block, text, first)


@pytest.mark.parametrize(("text", "first"), [(0, True), (3, True), (3, False)])
def test_all_blocks_are_dense_attention_in_any_order(text, first):
    q, k, v = made(text=text)
    torch.testing.assert_close(
        paro_attention(q, k, v, full(text, first=first)), attend(q, k, v, Dense(30 + text, 30 + text))
    )


def test_inverses_of_the_orders():
    tokens = torch.arange(30)
    for number, name in enumerate(ORDERS):
        back = {"HWF": "WFH", "WFH": "HWF"}.get(name, name)
        grid = tuple(GRID["FHW".index(axis)] for axis in name)
        there = tokens[axis_order(GRID, number)]
        assert torch.equal(there[axis_order(grid, ORDERS.index(back))], tokens)
        assert (number > 0) == (not torch.equal(there, tokens))
    plan = full(3)
    x = made(text=3)[0]
    assert torch.equal(plan.unpermute(plan.permute(x)), x)
    assert torch.equal(plan.permute(x)[:, :, :3], x[:, :, :3])


@pytest.mark.parametrize("executor", ["dense", "tiles"])
@pytest.mark.parametrize(("text", "first"), [(0, True), (2, True), (2, False)])
def test_equal_to_a_loop(text, first, executor):
    """Token by token: what is not kept is in neither numerator nor denominator."""
    q, k, v = made(text=text, b=1)
    mask = torch.rand(2, 6, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.3
    mask.diagonal(dim1=2, dim2=3).fill_(True)
    plan = Plan(GRID, torch.arange(6), mask, 4, text, first)
    start = text if first else 0
    out = torch.empty_like(v)
    for h in range(6):
        place = {start + int(token): at for at, token in enumerate(axis_order(GRID, h))}
        for i in range(30 + text):
            seen = [
                j for j in range(30 + text)
                if i not in place or j not in place or bool(mask[1, h, place[i] // 4, place[j] // 4])
            ]  # fmt: skip
            weights = (q[0, h, i] @ k[0, h, seen].T / 8**0.5).softmax(0)
            out[0, h, i] = weights @ v[0, h, seen]
    torch.testing.assert_close(paro_attention(q, k, v, plan, 1, executor=executor), out)
    assert torch.equal(paro_attention(q, k, v, plan, 7), paro_attention(q, k, v, plan, 1))  # later steps share the last
    assert plan.density == pytest.approx(mask.float().mean().item())


def along_time(grid, places=False):
    """A map of one head that looks at its own place in all frames, or at its frame."""
    f, h, w = grid
    token = torch.arange(f * h * w)
    own = token // (h * w) if places else token % (h * w)
    seen = (own[:, None] == own).float()
    return (seen / seen.sum(1, keepdim=True))[None, None]


def test_diagonals_become_blocks_where_time_is_innermost():
    grid = (4, 3, 2)
    maps = along_time(grid)
    for number, name in enumerate(ORDERS):
        index = axis_order(grid, number)
        blocks = maps[0, 0][index][:, index].view(6, 4, 6, 4).sum((1, 3))
        assert (int((blocks > 0).sum()) == 6) == (name[2] == "F")
    plan = PAROAttention(density=1 / 6, block=4).calibrate([[torch.cat([maps, along_time(grid, True)], 1)]], grid)
    assert ORDERS[plan.order[0]][2] == "F" and ORDERS[plan.order[1]][0] == "F"
    assert torch.equal(plan.mask[0, 0], torch.eye(6, dtype=torch.bool))
    q, k, v = made(2, grid=grid, b=1)
    sparse = paro_attention(q, k, v, plan)[0, 0]
    for place in range(6):
        own = slice(place, None, 6)
        torch.testing.assert_close(sparse[own], (q[0, 0, own] @ k[0, 0, own].T / 8**0.5).softmax(1) @ v[0, 0, own])


def test_queries_and_keys_calibrate_as_their_map_does():
    q, k, _ = made(text=3)
    maps = (q @ k.transpose(2, 3) / 8**0.5).softmax(3)
    system = PAROAttention(density=0.4, block=4)
    plans = [system.calibrate([[s], [s]], GRID, 3) for s in (maps, (q, k))]
    for name in ("order", "mask"):
        assert torch.equal(*(getattr(plan, name) for plan in plans))
    plan = plans[0]
    assert plan.mask.shape == (2, 6, 8, 8) and plan.density == round(0.4 * 64) / 64
    assert bool(plan.mask.diagonal(dim1=2, dim2=3).all())
    lone = system.calibrate([[maps[:1], maps[1:]]], GRID, 3)
    assert torch.equal(lone.mask[0], plan.mask[0])  # two prompts are the mean of both


def test_masks_keep_the_heaviest_blocks():
    q, k, _ = made(1, grid=(1, 4, 4))
    plan = PAROAttention(density=0.5, block=4, orders=(0,)).calibrate([[(q, k)]], (1, 4, 4))
    maps = (q @ k.transpose(2, 3) / 8**0.5).softmax(3).mean(0)[0].view(4, 4, 4, 4).sum((1, 3))
    others = ~torch.eye(4, dtype=torch.bool)
    kept = maps[plan.mask[0, 0] & others]
    assert len(kept) == 4 and kept.min() >= maps[~plan.mask[0, 0]].max()


def test_the_choice_weighs_both_terms():
    mass = torch.tensor([[[[1.0, 1], [1, 1]]], [[[2.0, 0], [0, 2]]]])  # the second order has fewer heavy blocks
    uneven = torch.tensor([[1.0], [3.0]])  # the first is more even
    assert choose_order(mass, uneven, 1.0).tolist() == [1]
    assert choose_order(mass, uneven, 0.0).tolist() == [0]
    assert choose_order(mass[:1].repeat(2, 1, 1, 1), uneven[:1].repeat(2, 1)).tolist() == [0]


@pytest.mark.parametrize("rows", [3, 4])
def test_int8_codes(rows):
    x = torch.randn(2, 3, 10, 8, generator=torch.Generator().manual_seed(0))
    x[:, :, 4:8] = 0
    codes, steps = quantize_rows(x, rows)
    assert codes.dtype == torch.int8 and bool((codes.float() * steps - x).abs().le(steps / 2 * 1.0001).all())
    for start in range(0, 10, rows):
        own = slice(start, start + rows)
        torch.testing.assert_close(steps[:, :, own].amax((2, 3)), x[:, :, own].abs().amax((2, 3)) / 127)


def test_int8_products_are_exact_and_near_full_precision():
    q, k, v = made(6, 3, dtype=torch.float32)
    plan = full(3, 4)
    plain, int8 = (paro_attention(q, k, v, plan, quant=quant) for quant in ("none", "int8"))
    assert torch.cosine_similarity(plain.flatten(), int8.flatten(), 0) > 0.999
    assert not torch.equal(plain, int8)
    codes = [quantize_rows(x, rows) for x, rows in ((q, 2), (k, 4))]
    exact = codes[0][0].long() @ codes[1][0].long().transpose(2, 3)
    weights = (exact * codes[0][1] * codes[1][1].transpose(2, 3) * 8**-0.5).softmax(3)
    torch.testing.assert_close(int8_attention(q, [k], [v], Dense(33, 33), 4), weights @ v, rtol=2e-3, atol=2e-3)
    large = torch.full((1, 1, 2, 2048), 3.0)  # sums beyond float32's whole numbers
    torch.testing.assert_close(int8_attention(large, [large], [large], Dense(2, 2), 2), large)


def test_int8_hides_what_the_mask_hides():
    q, k, v = made(6, dtype=torch.float32)
    mask = torch.eye(8, dtype=torch.bool).expand(1, 6, 8, 8)
    plan = Plan(GRID, torch.zeros(6, dtype=torch.int64), mask, 4)
    near = [paro_attention(q, k, v, plan, quant=quant) for quant in ("none", "int8")]
    torch.testing.assert_close(*near, atol=0.05, rtol=0.05)
    none = Plan(GRID, plan.order, torch.zeros_like(mask), 4)  # by hand: calibration keeps the diagonal
    assert not any(bool(paro_attention(q, k, v, none, quant=quant).any()) for quant in ("none", "int8"))


def test_gradients_and_half_precision():
    q, k, v = (x.requires_grad_() for x in made(b=1))
    plan = PAROAttention(density=0.4, block=4).calibrate([[(q.detach(), k.detach())]], GRID)
    paro_attention(q, k, v, plan).square().sum().backward()
    assert all(bool(x.grad.isfinite().all()) and bool(x.grad.any()) for x in (q, k, v))
    low = paro_attention(*(x.detach().bfloat16() for x in (q, k, v)), plan)
    torch.testing.assert_close(low.double(), paro_attention(q, k, v, plan).detach(), atol=0.05, rtol=0.05)


def test_what_does_not_fit_is_said():
    q, k, v = made()
    with pytest.raises(ValueError, match=r"x: got \(2, 6, 29, 8\), must be \(B, 6, 30, d\)"):
        paro_attention(q[:, :, :29], k, v, full())
    with pytest.raises(ValueError, match=r"x: got \(2, 5, 30, 8\), must be \(B, 6, 30"):
        paro_attention(q[:, :5], k, v, full())
    with pytest.raises(ValueError, match="quant: got 'int4'"):
        paro_attention(q, k, v, full(), quant="int4")
    with pytest.raises(ValueError, match="group: got -1"):
        paro_attention(q, k, v, full(), -1)
    with pytest.raises(ValueError, match=r"mask: got \(1, 6, 8, 8\), must be \(T, 6, 3, 3\)"):
        Plan(GRID, torch.arange(6), torch.ones(1, 6, 8, 8).bool(), 10)
    with pytest.raises(ValueError, match="order: got 6"):
        axis_order(GRID, 6)
    with pytest.raises(ValueError, match="density: got 0"):
        PAROAttention(density=0)
    with pytest.raises(ValueError, match="block: got 5"):
        PAROAttention(block=5)
    with pytest.raises(ValueError, match="samples: got a group"):
        PAROAttention().calibrate([[]], GRID)
    with pytest.raises(ValueError, match=r"samples: got \(2, 6, 30, 8\), must be of 33 tokens"):
        PAROAttention().calibrate([[(q, k)]], GRID, 3)


def test_videos_move():
    trial = AttendTrial()
    clips = paroattention.videos(trial, torch.Generator().manual_seed(0), 16)
    assert clips.shape == (16, 1, 64, 8)
    frames = clips.view(16, 8, 8, 8)
    still = (frames[:, 0] == frames[:, 1]).flatten(1).all(1)
    assert 0 < int(still.sum()) < 16
    torch.testing.assert_close(frames.sum((2, 3)), frames.sum((2, 3))[:, :1].expand(-1, 8))


def test_a_short_claim():
    outcome = claim(AttendTrial(), steps=1, width=8, clips=1)
    assert outcome.holds is (outcome.value < outcome.baseline) and "in INT8" in outcome.note
