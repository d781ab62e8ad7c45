"""rectified-spaattn: what its sheet says must hold, against a loop, and the claim."""

from __future__ import annotations

import math

import pytest
import torch

from vistok.attend.rectified_spaattn import (
    RectifiedSpaAttn,
    choose_blocks,
    claim,
    implicit_attention,
    neighbor_blocks,
    pooling_gains,
    rectified_block_attention,
)
from vistok.bench.attend_trial import AttendTrial
from vistok.core.attention import Dense, attend
from vistok.core.attention.curves import hilbert_order


def made(n=24, text=0, b=2, heads=2, d=8, dtype=torch.float64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(3, b, heads, n + text, d, dtype=dtype, generator=rng).unbind()


def dense(q, k, v):
    return attend(q, k, v, Dense(q.shape[2], k.shape[2]))


def by_hand(q, k, v, text, block, drop, p_min):
    """One picture, head and block of queries at a time, as published: means, shares of mass, choice, gain and error."""
    n = q.shape[2] - text
    parts = [list(range(s, min(s + block, n))) for s in range(0, n, block)]
    out = dense(q, k, v)
    for i in range(len(q)):
        for h in range(q.shape[1]):
            Q, K, V = q[i, h], k[i, h], v[i, h]
            means = [torch.stack([x[p].mean(0) for p in parts]) for x in (Q, K, V)]
            spread = [torch.stack([(x[p] - x[p].mean(0)).abs().mean(0) for p in parts]) for x in (Q, K)]
            for row, own in enumerate(parts):
                p = (torch.cat([means[1], K[n:]]) @ means[0][row] / Q.shape[1] ** 0.5).softmax(0)
                share = torch.tensor([len(part) for part in parts]) * p[: len(parts)]
                whole = share.sum() + p[len(parts) :].sum()
                mass = torch.cat([share, p[len(parts) :].sum()[None]]) / whole
                order = mass.argsort(descending=True, stable=True)
                count = max(int((mass[order].cumsum(0) <= p_min).sum()) + 1, max(1, int((1 - drop) * len(parts))))
                chosen = {int(c) for c in order[:count]} - {len(parts)}
                kept, extra = 1.0, torch.zeros_like(V[0])
                for c in range(len(parts)):
                    gain = (means[0][row] @ means[1][c]).abs()
                    error = (spread[0][row] @ means[1][c]).abs() + (means[0][row] @ spread[1][c]).abs()
                    if c not in chosen and gain > error:
                        kept, extra = kept - mass[c], extra + mass[c] * means[2][c]
                seen = [j for c in sorted(chosen) for j in parts[c]] + list(range(n, len(Q)))
                weights = (Q[own] @ K[seen].T / Q.shape[1] ** 0.5).softmax(1)
                out[i, h, own] = kept * (weights @ V[seen]) + extra
    return out


@pytest.mark.parametrize("executor", ["dense", "tiles"])
@pytest.mark.parametrize(("n", "text"), [(24, 0), (24, 3), (22, 3)])
def test_equal_to_a_loop(n, text, executor):
    q, k, v = made(n, text)
    out, stats = rectified_block_attention(q, k, v, text, 4, 0.6, 0.3, executor=executor)
    torch.testing.assert_close(out, by_hand(q, k, v, text, 4, 0.6, 0.3))
    assert 0 < stats.density < 1 and bool((stats.pooled > 0).any()) and bool((stats.kept < 1).any())


@pytest.mark.parametrize("text", [0, 3])
def test_all_blocks_are_dense_attention(text):
    q, k, v = made(22, text)
    ways = dict(drop=0.0), dict(p_min=1.0), dict(neighbors=torch.ones(6, 6, dtype=torch.bool))
    for how in ways[1:] if text else ways:  # text takes a place, so that all but one are not all
        out, stats = rectified_block_attention(q, k, v, text, 4, **how)
        torch.testing.assert_close(out, dense(q, k, v))
        if how != dict(p_min=1.0):  # rounding may leave the last block out, but for nothing
            assert stats.density == 1 and bool((stats.kept == 1).all()) and not bool(stats.pooled.any())


def test_mass_is_shared_out():
    q, k, v = made(22, 3)
    mass = implicit_attention(q[:, :, :22], k[:, :, :22], k[:, :, 22:], 4)
    torch.testing.assert_close(mass.sum(3), torch.ones(2, 2, 6).double())
    stats = rectified_block_attention(q, k, v, 3, 4)[1]
    torch.testing.assert_close(stats.kept + stats.pooled.sum(3), torch.ones(2, 2, 6).double())
    assert not bool((stats.pooled.bool() & stats.mask).any())


@pytest.mark.parametrize("text", [0, 3])
@pytest.mark.parametrize("drop", [0.5, 0.8, 0.99])
def test_blocks_of_like_tokens_give_dense_attention(text, drop):
    """Pooling errs by nothing then, and the estimate is the truth."""
    q, k, v = made(6, text)
    q, k, v = (torch.cat([x[:, :, :6].repeat_interleave(4, 2)[:, :, :22], x[:, :, 6:]], 2) for x in (q, k, v))
    assert bool(pooling_gains(q[:, :, :22], k[:, :, :22], 4).all())
    out, stats = rectified_block_attention(q, k, v, text, 4, drop, 0.0)
    torch.testing.assert_close(out, dense(q, k, v))
    assert stats.density < 1


def test_every_row_keeps_its_share():
    q, k, _ = made(40, 5)
    for p_min in (0.0, 0.3, 0.9):
        mass = implicit_attention(q[:, :, :40], k[:, :, :40], k[:, :, 40:], 4)
        sizes = []
        for top_k in (1, 3, 6):
            chosen = choose_blocks(mass, top_k, p_min)
            rank = mass.argsort(dim=3, descending=True, stable=True).argsort(dim=3)
            text_first = rank[..., -1] < top_k
            assert bool((chosen.sum(3) >= top_k - text_first.int()).all())
            sizes.append(chosen)
        assert not bool((sizes[0] & ~sizes[1]).any() | (sizes[1] & ~sizes[2]).any())
    even = torch.full((1, 1, 2, 5), 0.2)
    assert choose_blocks(even, 2, 0.0).tolist() == [[[[True, True, False, False]] * 2]]
    assert choose_blocks(even, 1, 0.5).sum().item() == 6


def test_text_of_different_lengths():
    """A picture with less text is as alone; what is not there changes nothing."""
    q, k, v = made(22, 4)
    there = torch.tensor([[True, True, True, True], [True, True, False, False]])
    out, stats = rectified_block_attention(q, k, v, 4, 4, text_mask=there)
    alone, own = rectified_block_attention(*(x[1:, :, :24] for x in (q, k, v)), 2, 4)
    torch.testing.assert_close(out[1:, :, :24], alone)
    assert torch.equal(stats.mask[1:], own.mask)
    torch.testing.assert_close(out[:1], rectified_block_attention(*(x[:1] for x in (q, k, v)), 4, 4)[0])


def test_smooth_fields_err_less_than_plain_sparse_attention():
    y, x = torch.meshgrid(*[torch.linspace(0, 3, 16)] * 2, indexing="ij")
    rng = torch.Generator().manual_seed(0)
    waves = torch.stack([(a * y + b * x + c).sin() for a, b, c in 3 * torch.rand(24, 3, generator=rng)])
    q, k, v = hilbert_order((16, 16)).permute(waves.flatten(1).T.view(1, 1, 256, 24)).split(8, 3)
    full = dense(q, k, v)
    errors = [
        (rectified_block_attention(q, k, v, block=16, p_min=0.0, rectify=rectify)[0] - full).norm() / full.norm()
        for rectify in (True, False)
    ]
    assert errors[0] < 0.7 * errors[1]


def test_neighbours_lie_side_by_side():
    shape = (3, 4, 4)
    order = hilbert_order(shape).order
    near = neighbor_blocks(shape, order, 4)
    at = torch.stack(torch.unravel_index(order, shape), 1)
    distance = (at[:, None] - at).abs().sum(2)
    expected = torch.stack([torch.stack([d.min() <= 1 for d in row.split(4, 1)]) for row in distance.split(4)])
    assert torch.equal(near, expected)
    first = neighbor_blocks(shape, order, 4, first_frame=True)
    holds = torch.stack([(part < 16).any() for part in order.split(4)])
    assert torch.equal(first, near | holds)
    q, k, v = made(48)
    stats = RectifiedSpaAttn(4, 0.9, 0.0)(q, k, v, shape)[1]
    assert not bool((near & ~stats.mask).any())


@pytest.mark.parametrize("text", [0, 2])
def test_the_operator_takes_and_gives_raster_order(text):
    q, k, v = made(30, text)
    order = hilbert_order((5, 6))
    out, _ = RectifiedSpaAttn(4, 0.8, 0.3, near=False)(q, k, v, (5, 6))
    curved = [torch.cat([order.permute(x[:, :, :30]), x[:, :, 30:]], 2) for x in (q, k, v)]
    expected = rectified_block_attention(*curved, text, 4)[0]
    torch.testing.assert_close(order.permute(out[:, :, :30]), expected[:, :, :30])
    torch.testing.assert_close(out[:, :, 30:], expected[:, :, 30:])


def test_gradients_and_half_precision():
    q, k, v = (x.requires_grad_() for x in made(22, 3))
    rectified_block_attention(q, k, v, 3, 4)[0].square().sum().backward()
    assert all(bool(x.grad.isfinite().all()) and bool(x.grad.any()) for x in (q, k, v))
    like = made(6, dtype=torch.float32)
    low = [x.repeat_interleave(4, 2).bfloat16() for x in like]
    out, _ = rectified_block_attention(*low, 0, 4)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), dense(*(x.float() for x in low)), atol=0.05, rtol=0.05)


def test_what_does_not_fit_is_said():
    q, k, v = made()
    with pytest.raises(ValueError, match=r"q, k, v: got \(2, 2, 24, 8\), \(2, 1, 24, 8\)"):
        rectified_block_attention(q, k[:, :1], v[:, :1])
    with pytest.raises(ValueError, match="text_len: got 24"):
        rectified_block_attention(q, k, v, 24)
    with pytest.raises(ValueError, match=r"text_mask: got \(2, 3\), must be \(2, 4\)"):
        rectified_block_attention(q, k, v, 4, text_mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"neighbors: got \(2, 2\), must be \(6, 6\)"):
        rectified_block_attention(q, k, v, 0, 4, neighbors=torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="shape: got"):
        RectifiedSpaAttn()(q, k, v, (5, 5))
    with pytest.raises(ValueError, match="drop, p_min: got 1"):
        RectifiedSpaAttn(drop=1)
    with pytest.raises(ValueError, match="block: got 0"):
        RectifiedSpaAttn(block=0)
    with pytest.raises(ValueError, match="first_frame: got True"):
        RectifiedSpaAttn(near=False, first_frame=True)


def test_a_short_claim():
    outcome = claim(AttendTrial(), steps=1, width=8, side=8)
    assert outcome.holds is (outcome.value < outcome.baseline) and "random" in outcome.note
    assert math.isfinite(outcome.value)
