"""catanet: what its sheet says must hold, the network and the claim."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import normalize

from vistok.attend import catanet
from vistok.attend.catanet import (
    CATANet,
    IntraGroupAttention,
    PatchAttention,
    TokenAggregationBlock,
    center_iter,
    claim,
    grouped_attention,
    run_means,
)
from vistok.bench.attend_trial import AttendTrial


def block(**how):
    torch.manual_seed(0)
    return TokenAggregationBlock(**{**dict(dim=8, qk_dim=4, heads=2, centers=3, group=5, mlp_dim=6), **how}).double()


def made(h=4, w=5, b=2, seed=0):
    return torch.randn(b, 8, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def softmax_of(q, k, v):
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


@pytest.mark.parametrize("parity", ["paper", "authors"])
@pytest.mark.parametrize(("n", "group"), [(13, 5), (12, 4), (11, 3), (7, 6), (10, 16), (1, 4)])
def test_groups_equal_to_a_loop(n, group, parity):
    """Also where what lacks is longer than the picture: mirrored forth and back."""
    q, k = torch.randn(2, 2, 3, n, 4, dtype=torch.float64)
    v = torch.randn(2, 3, n, 5, dtype=torch.float64)
    size = min(group, n)
    positions = list(range(n))
    while parity == "authors" and len(positions) < (-(-n // size) + 1) * size:
        positions += [*reversed(range(n)), *range(n)]
    expected = torch.zeros_like(v)
    for start in range(0, n, size):
        seen = positions[start : start + 2 * size]
        own = slice(start, start + size)
        expected[:, :, own] = softmax_of(q[:, :, own], k[:, :, seen], v[:, :, seen])
    torch.testing.assert_close(grouped_attention(q, k, v, group, parity), expected)


@pytest.mark.parametrize("parity", ["paper", "authors"])
def test_one_group_is_dense_attention_plus_the_centres(parity):
    torch.manual_seed(0)
    layer = IntraGroupAttention(8, 4, 2, 100, parity).double()
    x, order = torch.randn(2, 9, 8).double(), torch.stack([torch.randperm(9) for _ in range(2)])
    k_global, v_global = torch.randn(2, 3, 2).double(), torch.randn(2, 3, 4).double()
    q, k, v = (of(x).unflatten(2, (2, -1)).transpose(1, 2) for of in (layer.to_q, layer.to_k, layer.to_v))
    both = softmax_of(q, k, v) + softmax_of(q, k_global, v_global)
    expected = layer.proj(both.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, order, k_global, v_global), expected)


def test_sorting_and_back_is_the_identity(monkeypatch):
    layer = IntraGroupAttention(8, 4, 2, 3)
    monkeypatch.setattr(catanet, "grouped_attention", lambda q, k, v, group, parity: v)
    x, order = torch.randn(2, 10, 8), torch.stack([torch.randperm(10) for _ in range(2)])
    nothing = torch.zeros(2, 3, 2), torch.zeros(2, 3, 4)
    torch.testing.assert_close(layer(x, order, *nothing), layer.proj(layer.to_v(x)))


def test_a_step_of_k_means_by_hand():
    torch.manual_seed(0)
    x, centers = normalize(torch.randn(2, 9, 4).double(), dim=2), normalize(torch.randn(4, 4).double(), dim=1)
    centers[3] = -normalize(x.sum((0, 1)), dim=0) * 1.0
    x = x + 0.9 * normalize(x.sum((0, 1)), dim=0)  # none is near the last one
    found = center_iter(x, centers)
    for m in range(4):
        members = [t for t in x.flatten(0, 1) if int((centers @ t).argmax()) == m]
        expected = normalize(sum(members), dim=0) if members else centers[m]
        torch.testing.assert_close(found[m], expected)
    assert torch.equal(found[3], centers[3])
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4).double())
    torch.testing.assert_close(center_iter(x.flip(0), centers), found)


@pytest.mark.parametrize(("n", "centers"), [(12, 4), (10, 4), (3, 5), (9, 2)])
def test_first_centres(n, centers):
    x = torch.randn(2, n, 3).double()
    for parity, lacking in (("paper", -n % centers), ("authors", centers - n % centers)):
        filled = [*range(n), *([*reversed(range(n)), *range(n)] * 3)[:lacking]]
        run = len(filled) // centers
        for m in range(centers):
            expected = x[:, filled[m * run : (m + 1) * run]].mean((0, 1))
            torch.testing.assert_close(run_means(x, centers, parity)[m], expected)
    torch.testing.assert_close(run_means(x.flip(0), centers), run_means(x, centers))


def test_centres_in_training_and_evaluation():
    layer, x = block(n_iter=2), made()
    tokens = layer.norm(x.flatten(2).transpose(1, 2)).detach()
    unit = normalize(tokens, dim=2)
    one = center_iter(unit, normalize(run_means(tokens, 3), dim=1))
    layer(x)
    torch.testing.assert_close(layer.means, center_iter(unit, one))
    before = layer.means.clone()
    second = center_iter(unit, center_iter(unit, before))
    layer(x)
    torch.testing.assert_close(layer.means, 0.999 * before + 0.001 * second)
    state = copy.deepcopy(layer.eval().state_dict())
    layer(made(seed=1))
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    fresh = block().eval()
    fresh(x)
    assert not bool(fresh.initialised) and not bool(fresh.means.any())


def test_tokens_are_sorted_by_their_centre():
    layer, tokens = block(), torch.randn(2, 20, 8).double()
    centers = torch.randn(3, 8).double()
    order = layer.order(tokens, centers, (4, 5))
    for picture, places in zip(tokens, order.tolist(), strict=True):
        own = [int((normalize(centers, dim=1) @ t).argmax()) for t in picture]
        assert places == sorted(range(20), key=lambda i: own[i])


def test_gradients_also_through_the_centres():
    layer = block()
    x = made().requires_grad_()
    layer(x)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in layer.parameters()) and bool(x.grad.isfinite().all())
    tokens = torch.randn(2, 20, 8).double().requires_grad_()
    layer.find_centers(tokens).sum().backward()
    assert bool(tokens.grad.any())
    # Two blocks that share centres may both run before the backward pass.
    (layer(x) + layer(x)).sum().backward()


@pytest.mark.parametrize("size", [(4, 4), (7, 5), (3, 9), (12, 11)])
def test_patches_equal_to_a_loop(size):
    torch.manual_seed(0)
    layer = PatchAttention(8, 4, 2, 5, 6).double()
    x = made(*size)
    starts = [sorted({min(s, max(n - 5, 0)) for s in range(0, max(n - 5, 0) + 3, 3)}) for n in size]
    total, cover = torch.zeros_like(x), torch.zeros(size)
    for top in starts[0]:
        for left in starts[1]:
            cut = (slice(None), slice(None), slice(top, top + 5), slice(left, left + 5))
            tokens = layer.norm(x[cut].flatten(2).transpose(1, 2))
            q, k, v = (of(tokens).unflatten(2, (2, -1)).transpose(1, 2) for of in (layer.to_q, layer.to_k, layer.to_v))
            seen = layer.proj(softmax_of(q, k, v).transpose(1, 2).flatten(2))
            total[cut] += seen.transpose(1, 2).unflatten(2, x[cut].shape[2:])
            cover[cut[2:]] += 1
    assert bool((cover > 0).all())
    expected = x + total / cover
    torch.testing.assert_close(layer(x), expected + layer.mlp(expected))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_network(scale):
    system = CATANet(scale, 8, 4, 2, 6, (5, 6), (3, 4), (7, 8), 2)
    torch.manual_seed(0)
    net = system.build()
    x = torch.rand(2, 3, 9, 7)
    out = net(x)
    assert out.shape == (2, 3, 9 * scale, 7 * scale)
    out.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    net.eval()
    with torch.no_grad():
        torch.testing.assert_close(net(x)[:1], net(x[:1]))


@pytest.mark.parametrize(("scale", "parameters"), [(2, 477435), (3, 549635), (4, 535195)])
def test_number_of_parameters(scale, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in CATANet(scale).build().parameters()) == parameters


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="scale: got 5"):
        CATANet(5).build()
    with pytest.raises(ValueError, match="patches, centers, groups: got"):
        CATANet(patches=(8,)).build()
    with pytest.raises(ValueError, match="heads: got 3"):
        block(heads=3)
    with pytest.raises(ValueError, match="n_iter: got 0"):
        block(n_iter=0)
    with pytest.raises(ValueError, match="patch: got 2"):
        PatchAttention(8, 4, 2, 2)


def test_the_control_groups_windows():
    x = torch.randn(1, 64, 8).double()
    windows = catanet._Windows(8, 4, 2, 3, 16).double()
    order = windows.order(x, torch.randn(3, 8).double(), (8, 8))[0]
    assert sorted(order.tolist()) == list(range(64))
    assert set(order[:16].tolist()) == {8 * i + j for i in range(4) for j in range(4)}


def test_the_claim_is_judged_on_other_photographs():
    train, test = catanet._pixels(False), catanet._pixels(True)
    assert all(0 <= p.min() and 0.2 < p.max() <= 1 and p.shape[0] == 3 for p in train + test)
    assert not any(a.shape == b.shape and torch.equal(a, b) for a in train for b in test)
    bilinear = torch.nn.Upsample(scale_factor=2, mode="bilinear")
    assert 29 < catanet.psnr(bilinear, test) < 33


@pytest.mark.parametrize(("windows", "ours", "holds"), [(40.0, 41.0, True), (40.0, 39.0, False), (8.0, 9.0, False)])
def test_the_claim_can_hold_and_can_fail(monkeypatch, windows, ours, holds):
    class Trial(AttendTrial):
        def fit(self, model, steps, *, loss, **how):
            loss(model, torch.Generator().manual_seed(0)).backward()
            return []

    def judged(net, pictures):
        return windows if isinstance(net.blocks[0][0], catanet._Windows) else ours

    monkeypatch.setattr(catanet, "psnr", judged)
    monkeypatch.setattr(catanet, "_pixels", lambda test: [torch.rand(3, 70, 80)])
    outcome = claim(Trial(), steps=1)
    assert (
        outcome.holds is holds and (outcome.baseline, outcome.value) == (windows, ours) and "bilinear" in outcome.note
    )
