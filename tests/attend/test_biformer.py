"""biformer: what its sheet says must hold, the backbone and the claim."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import conv2d

import vistok
from vistok.attend import biformer
from vistok.attend.biformer import (
    FULL,
    BiFormer,
    BiLevelRoutingAttention,
    bi_level_routing_attention,
    claim,
    route,
    routed_attention,
)


def made(h, w, c=8, b=2, seed=0):
    return torch.randn(3, b, c, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).unbind()


def by_hand(q, k, v, heads, region, topk):
    """One picture, one query at a time."""
    b, c, h, w = q.shape
    down, across = -(-h // region[0]), -(-w // region[1])
    of = [(y // region[0]) * across + x // region[1] for y in range(h) for x in range(w)]
    out = torch.zeros_like(v)
    for n in range(b):
        flat = [t[n].flatten(1) for t in (q, k, v)]
        members = [[i for i in range(h * w) if of[i] == r] for r in range(down * across)]
        means = [[t[:, m].mean(1) for m in members] for t in flat[:2]]
        for r, own in enumerate(members):
            logits = torch.stack([means[0][r] @ other for other in means[1]])
            seen = [j for best in logits.topk(topk).indices.tolist() for j in members[best]]
            for i in own:
                for part in torch.arange(c).chunk(heads):
                    weights = (flat[0][part, i] @ flat[1][part][:, seen] * c**-0.5).softmax(0)
                    out[n, part, i // w, i % w] = flat[2][part][:, seen] @ weights
    return out


@pytest.mark.parametrize("executor", ["dense", "tiles"])
@pytest.mark.parametrize(("size", "region", "topk"), [((6, 6), (2, 3), 2), ((7, 5), (2, 3), 3), ((5, 3), (1, 1), 4)])
def test_equal_to_a_loop(size, region, topk, executor):
    q, k, v = made(*size)
    out, index = bi_level_routing_attention(q, k, v, 2, region, topk, executor=executor)
    torch.testing.assert_close(out, by_hand(q, k, v, 2, region, topk))
    assert index.shape[2] == topk


@pytest.mark.parametrize("size", [(6, 6), (7, 8)])
def test_all_regions_are_dense_attention(size):
    torch.manual_seed(0)
    routed = BiLevelRoutingAttention(8, 2, 3, 10**6, 3).double()
    x = made(*size)[0]
    q, k, v = (t.flatten(2).unflatten(1, (2, 4)).transpose(2, 3) for t in routed.qkv_linear(x).chunk(3, 1))
    plain = ((q @ k.transpose(2, 3)) * 8**-0.5).softmax(3) @ v
    values = routed.qkv_linear(x).chunk(3, 1)[2]
    plain = plain.transpose(2, 3).reshape(x.shape) + conv2d(values, routed.lepe.weight, routed.lepe.bias, 1, 1, 1, 8)
    torch.testing.assert_close(routed(x), routed.output_linear(plain))


def test_full_is_ordinary_attention():
    full = BiLevelRoutingAttention(8, 2, topk=FULL, side_dwconv=0).double()
    x = made(5, 4)[0]
    q, k, v = (t.flatten(2).unflatten(1, (2, 4)).transpose(2, 3) for t in full.qkv_linear(x).chunk(3, 1))
    plain = (q @ k.transpose(2, 3) / 2).softmax(3) @ v
    torch.testing.assert_close(full(x), full.output_linear(plain.transpose(2, 3).reshape(x.shape)))


def test_the_value_of_a_region_that_is_not_seen_changes_nothing():
    q, k, v = made(6, 6, b=1)
    out, index = bi_level_routing_attention(q, k, v, 2, (2, 2), 3)
    changed = v.clone()
    changed[:, :, 2:4, 4:6] += 1  # region 5
    other, _ = bi_level_routing_attention(q, k, changed, 2, (2, 2), 3)
    moved = (out != other).any(1)[0].view(3, 2, 3, 2).transpose(1, 2).flatten(0, 1).flatten(1).any(1)
    assert moved.tolist() == (index[0] == 5).any(1).tolist() and 0 < int(moved.sum()) < 9


def test_routes_do_not_depend_on_the_order_in_a_region():
    q, k, _ = made(6, 6)
    mixed = [x.unflatten(2, (3, 2)).flip(3).flatten(2, 3) for x in (q, k)]
    assert torch.equal(route(q, k, (2, 2), 4)[0], route(*mixed, (2, 2), 4)[0])


def test_routes_are_nested_and_ties_go_to_the_lower_region():
    q, k, _ = made(6, 8)
    most = route(q, k, (2, 2), 12)[0]
    for topk in range(1, 12):
        assert torch.equal(route(q, k, (2, 2), topk)[0], most[..., :topk])
    same = torch.ones(1, 2, 4, 4)
    assert route(same, same, (2, 2), 2)[0].tolist() == [[[0, 1]] * 4]


def test_gradients_come_from_attention_alone():
    q, k, v = (x.requires_grad_() for x in made(5, 4, b=1))
    index, logits = route(q, k, (2, 2), 2)
    assert not logits.requires_grad
    given = torch.autograd.grad(bi_level_routing_attention(q, k, v, 2, (2, 2), 2)[0].square().sum(), (q, k, v))
    fixed = torch.autograd.grad(routed_attention(q, k, v, 2, (2, 2), index).square().sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(given, fixed, strict=True))
    assert torch.autograd.gradcheck(lambda *x: routed_attention(*x, 2, (2, 2), index), (q, k, v), fast_mode=True)


def test_parity_is_zeros_around_the_map():
    """Whole maps are alike; a cut-off one is as one with zeros after the projection."""
    q, k, v = made(5, 4, b=1)
    filled = [torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (q, k, v)]
    index, _ = route(q, k, (2, 2), 3)
    published = routed_attention(q, k, v, 2, (2, 2), index, parity="authors")
    torch.testing.assert_close(published, routed_attention(*filled, 2, (2, 2), index)[:, :, :5])
    assert not torch.allclose(published, routed_attention(q, k, v, 2, (2, 2), index))
    whole = [x[:, :, :4] for x in (q, k, v)]
    index, _ = route(*whole[:2], (2, 2), 3)
    same = [routed_attention(*whole, 2, (2, 2), index, parity=p) for p in ("paper", "authors")]
    assert torch.equal(*same)


def test_half_precision():
    q, k, v = made(7, 7)
    index, _ = route(q, k, (2, 2), 3)
    low = routed_attention(*(x.bfloat16() for x in (q, k, v)), 2, (2, 2), index)
    torch.testing.assert_close(low.double(), routed_attention(q, k, v, 2, (2, 2), index), atol=0.05, rtol=0.05)


def test_backbone():
    small = BiFormer(head_dim=4, n_win=3)
    torch.manual_seed(0)
    net = small.of((8, 8, 16, 16), (1, 1, 1, 1), num_classes=3)
    x = torch.randn(2, 3, 75, 96)
    net(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    maps = small.of((8, 8, 16, 16), (1, 1, 1, 1), features_only=True)
    shapes = [tuple(m.shape) for m in maps(x)]
    assert shapes == [(2, 8, 19, 24), (2, 8, 10, 12), (2, 16, 5, 6), (2, 16, 3, 3)]
    assert maps.feature_info.channels() == [8, 8, 16, 16] and maps.feature_info.reduction() == [4, 8, 16, 32]
    net.eval()
    with torch.no_grad():
        torch.testing.assert_close(net(x)[:1], net(x[:1]))


@pytest.mark.parametrize(("size", "millions"), [("tiny", 13.1), ("small", 25.5), ("base", 56.8)])
def test_published_number_of_parameters(size, millions):
    with torch.device("meta"):
        net = vistok.create("biformer", size=size).build()
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == millions


def test_what_does_not_fit_is_said():
    q, k, _ = made(4, 4)
    with pytest.raises(ValueError, match="topk: got 5, must be 1 to the 4 regions"):
        route(q, k, (2, 2), 5)
    with pytest.raises(ValueError, match="heads: got 3"):
        BiLevelRoutingAttention(8, 3)
    with pytest.raises(ValueError, match="topk: got -1"):
        BiLevelRoutingAttention(8, 2, topk=-1)
    with pytest.raises(ValueError, match="parity: got 'paperr'"):
        BiLevelRoutingAttention(8, 2, parity="paperr")
    with pytest.raises(ValueError, match="size: got 'huge'"):
        BiFormer("huge").build()
    with pytest.raises(ValueError, match="topks: got 2"):
        BiFormer(topks=(1, 2)).build()


def test_like_regions_hold_more_than_near_ones(monkeypatch):
    """A chessboard of two textures: routing finds the like ones, which are no neighbours."""
    rng = torch.Generator().manual_seed(0)
    kinds = torch.randint(256, (2, 4, 4, 3), generator=rng).repeat(1, 8, 8, 1)
    board = torch.arange(49).view(7, 7) % 2
    picture = kinds[board].transpose(1, 2).reshape(224, 224, 3).numpy()
    monkeypatch.setattr(biformer, "photos", lambda size: [SimpleNamespace(name="cat", image=picture)])
    routed, near = biformer._held()
    assert routed > 1.5 * near and 0 < near < routed < 1


@pytest.mark.parametrize(("routed", "held", "holds"), [(1.0, 0.2, True), (3.0, 0.2, False), (1.0, 0.05, False)])
def test_the_claim_can_hold_and_can_fail(monkeypatch, routed, held, holds):
    class Trial:
        seed = 0

        def milliseconds(self, runs):
            assert runs["routed"]()[1].shape == (1, 49, 4)
            return {"dense": 2.0, "routed": routed}

    monkeypatch.setattr(biformer, "_held", lambda: (held, 0.1))
    outcome = claim(Trial())
    assert outcome.holds is holds and outcome.value == routed and "the nearest 10.0%" in outcome.note
