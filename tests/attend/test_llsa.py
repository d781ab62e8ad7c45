"""llsa: what its sheet says must hold, against masks on dense attention, its cost, and the claim."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vistok.attend.llsa import LLSA, claim, count, levels_for, llsa, select
from vistok.bench.attend_trial import AttendTrial
from vistok.core.attention import BlockMask, CoarseKV, Dense, TokenIndex, attend
from vistok.core.attention.curves import z_order
from vistok.parts.diffusion_transformer import DiffusionTransformer, plain_attention


def made(n=64, b=2, heads=2, d=8, dtype=torch.float64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [x.requires_grad_() for x in torch.randn(3, b, heads, n, d, dtype=dtype, generator=rng).unbind()]


def pooled(x, size):
    return x.unflatten(2, (-1, size)).mean(3)


def picks(q, k, block, topk, levels):
    """Indices of each level from 1 up, one query at a time, from lists."""
    found = {}
    for level in range(levels, 0, -1):
        size = block**level
        scores = pooled(q, size) @ pooled(k, size).transpose(2, 3)
        index = torch.empty(*scores.shape[:3], topk, dtype=torch.int64)
        for b in range(scores.shape[0]):
            for h in range(scores.shape[1]):
                for u in range(scores.shape[2]):
                    allowed = range(scores.shape[3])
                    if level < levels:
                        above = found[level + 1][b, h, u // block].tolist()
                        allowed = [c for c in allowed if c // block in above]
                    best = sorted(allowed, key=lambda c: (-scores[b, h, u, c].item(), c))[:topk]
                    index[b, h, u] = torch.tensor(sorted(best))
        found[level] = index
    return [found[level] for level in range(1, levels + 1)]


def oracle(q, k, v, block, topk, levels):
    """Dense attention under a mask over tokens and means, these with the logarithm of their weight."""
    n = q.shape[2]
    index = picks(q, k, block, topk, levels)
    patterns = [BlockMask.from_index(index[0], n, n, (block, block))]
    for level in range(1, levels):
        children = (index[level][..., None] * block + torch.arange(block)).flatten(3)
        patterns.append(TokenIndex(children.repeat_interleave(block ** (level + 1), 2), n, n // block**level))
    patterns.append(Dense(n, n // block**levels))
    weights = tuple(level * math.log(block) for level in range(levels + 1))
    keys, values = (torch.cat([x, *(pooled(x, block**i) for i in range(1, levels + 1))], 2) for x in (k, v))
    return attend(q, keys, values, CoarseKV(tuple(patterns), weights), executor="dense")


@pytest.mark.parametrize(("n", "block", "topk", "levels"), [(64, 4, 3, 1), (64, 4, 2, 2), (64, 4, 1, 3), (96, 4, 5, 2)])
def test_equal_to_a_mask_on_dense_attention(n, block, topk, levels):
    given = made(n)
    for a, b in zip(select(*given[:2], block, topk, levels), picks(*given[:2], block, topk, levels), strict=True):
        assert torch.equal(a, b)
    out, expected = llsa(*given, block, topk, levels), oracle(*given, block, topk, levels)
    torch.testing.assert_close(out, expected)
    above = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    for a, b in zip(*(torch.autograd.grad(x, given, above) for x in (out, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_released_gradient_of_one_level():
    """Keys and values get a fourth of their share through the means (blocks of 4); queries and two levels the same."""
    given = made()
    for levels in (1, 2):
        theirs = torch.autograd.grad(llsa(*given, 4, 2, levels, "authors").sum(), given)
        ours = torch.autograd.grad(llsa(*given, 4, 2, levels).sum(), given)
        assert torch.equal(theirs[0], ours[0])
        assert torch.equal(theirs[1], ours[1]) == torch.equal(theirs[2], ours[2]) == (levels == 2)
    q, k, v = given
    index = picks(q, k, 4, 2, 1)[0]
    pattern = CoarseKV((BlockMask.from_index(index, 64, 64, (4, 4)), Dense(64, 16)), (0.0, math.log(4)))
    means = [pooled(x.detach(), 4).requires_grad_() for x in (k, v)]
    out = attend(q, torch.cat([k, means[0]], 2), torch.cat([v, means[1]], 2), pattern, executor="dense")
    fine = torch.autograd.grad(out.sum(), [k, v, *means])
    theirs = torch.autograd.grad(llsa(*given, 4, 2, 1, "authors").sum(), (k, v))
    for i in range(2):
        torch.testing.assert_close(theirs[i], fine[i] + fine[i + 2].repeat_interleave(4, 2) / 4 / 4)
    assert torch.equal(llsa(*given, 4, 2, 1, "authors"), llsa(*given, 4, 2, 1))


def test_blocks_of_like_tokens():
    """Fine and coarse copies have one logit: a softmax of blocks, those that are picked counted once more."""
    q, k, v = (x.detach().repeat_interleave(4, 2) for x in made(16))
    index = select(q, k, 4, 3, 1)[0]
    logits = q @ k[:, :, ::4].transpose(2, 3) / 8**0.5
    picked = torch.zeros(2, 2, 16, 16, dtype=torch.float64).scatter(3, index, 1.0).repeat_interleave(4, 2)
    weights = logits.exp() * (4 + 4 * picked)
    torch.testing.assert_close(llsa(q, k, v, 4, 3, 1), weights / weights.sum(3, keepdim=True) @ v[:, :, ::4])


def test_all_picked_is_one_level():
    q, k, _ = made()
    assert torch.equal(select(q, k, 4, 4, 2)[1], torch.arange(4).expand(2, 2, 4, 4))
    assert torch.equal(select(q, k, 4, 4, 2)[0], select(q, k, 4, 4, 1)[0])
    same = torch.ones(1, 1, 16, 2)
    assert select(same, same, 4, 2, 1)[0].tolist() == [[[[0, 1]] * 4]]  # ties go to the lower


def test_keys_of_a_query():
    for n in (4096, 16_384, 65_536):
        assert count(n).keys == 128 + 128 + n // 256
        assert count(n, levels=1).keys == 128 + n // 16
    given = made(64, 1, 1)
    assert LLSA(4, 2, 2).count(64).keys == 2 * 2 * 4 + 4
    for i in range(64):  # a token is seen in a picked block, and in every mean above it
        grad = torch.autograd.grad(llsa(*given, 4, 2, 2)[0, 0, i].sum(), given[2])[0]
        assert bool((grad != 0).any(3).all())


def flops(n, levels):
    """Counted by torch: products of choosing, of both pooled sides, and of attention."""
    q, k, v = (x.detach() for x in made(n, 1, 1, 8, torch.float32))
    with FlopCounterMode(display=False) as found:
        select(q, k, 4, 2, levels)
    choosing = found.get_total_flops()
    with FlopCounterMode(display=False) as found:
        llsa(q, k, v, 4, 2, levels)
    return choosing, found.get_total_flops() - choosing


def test_the_selection_is_n_log_n():
    """What is computed is what is counted; N log N with as many levels as N asks for, N^2 with one."""
    total = {}
    for n in (256, 1024, 4096, 16_384):
        levels = levels_for(n, 4, 2)
        cost = count(n, 4, 2, 0)
        assert n // 4**levels in (4, 8) and count(n, 4, 2, levels) == cost
        choosing, attending = flops(n, levels)
        assert choosing == 2 * 8 * cost.selection
        assert attending == 4 * 8 * cost.attention
        assert cost.selection <= 4 * n and cost.total / (n * math.log(n)) < 8
        total[n] = cost
    assert count(16_384, 4, 2, 1).selection == 256 * count(1024, 4, 2, 1).selection
    growth = [total[16_384].total / total[1024].total, total[4096].total / total[256].total]
    assert all(16 < g < 16 * 2 for g in growth)
    assert count(65_536, levels=0).total < count(65_536).total < 65_536**2 / 100


def test_zorder_and_a_layer():
    order = z_order(16, 16).order
    for run in order.split(16):
        assert sorted((run // 16).unique().tolist()) == list(range(int(run[0]) // 16, int(run[0]) // 16 + 4))
    torch.manual_seed(0)
    system = LLSA(4, 2, 2)
    sparse, full = (DiffusionTransformer(1, 1, 16, 2, 2, of) for of in (system.build, plain_attention))
    torch.nn.init.normal_(sparse.head.weight)
    for block in sparse.blocks:
        torch.nn.init.normal_(block.modulation.weight, std=0.1)
    full.load_state_dict(sparse.state_dict())
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.8])
    out = sparse(x, t)
    assert not torch.allclose(out, full(x, t))
    out.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in sparse.parameters())
    q, k, v = made()
    laid = z_order(8, 8)
    expected = laid.unpermute(llsa(*(laid.permute(x) for x in (q, k, v)), 4, 2, 2))
    assert torch.equal(system.mix(q, k, v, (8, 8)), expected)


@pytest.mark.parametrize(("n", "topk"), [(1024, 2), (2048, 4), (4096, 8)])
def test_lengths_at_which_the_release_fails(n, topk):
    q, k, v = (x.detach() for x in made(n, 1, 1, 4, torch.float32))
    out = llsa(q, k, v, 16, topk, 2)
    assert bool(out.isfinite().all())
    torch.testing.assert_close(out, oracle(q, k, v, 16, topk, 2), rtol=1e-4, atol=1e-5)


def test_half_precision():
    given = made(256, 1)
    low = [x.detach().bfloat16().requires_grad_() for x in given]
    llsa(*low, 16, 2, 1).square().sum().backward()
    assert all(x.grad.dtype == torch.bfloat16 and bool(x.grad.isfinite().all()) for x in low)


def test_what_does_not_fit_is_said():
    q, k, v = made()
    with pytest.raises(ValueError, match=r"q: got 64 tokens, must be divided by 16\^2"):
        llsa(q, k, v)
    with pytest.raises(ValueError, match="q: got 64 tokens, must be divided by 4"):
        llsa(q, k, v, 4, 5, 2)
    with pytest.raises(ValueError, match="q, k, v: got"):
        llsa(q, k[:, :1], v, 4)
    with pytest.raises(ValueError, match="block, topk, levels: got 1, 8, 2"):
        LLSA(1)
    with pytest.raises(ValueError, match="parity: got 'theirs'"):
        LLSA(parity="theirs")


def test_a_short_claim():
    outcome = claim(AttendTrial(), steps=3, width=8, held_out=2)
    assert outcome.holds is (outcome.value < outcome.baseline) and "random" in outcome.note
