"""halonet: what its sheet says must hold, the backbone and the claim."""

from __future__ import annotations

import pytest
import timm
import torch

import vistok
from vistok.attend.halonet import HaloAttn, HaloNet, Shape, claim, halo_attention
from vistok.core.attention import Dense, Halo, Window, attend

TINY = Shape((8, 8, 16, 16), (1, 1, 2, 1), (0, 1, 1, 0), 0.5, 1, (8,))


def made(h, w, stride=1, d=4, dv=3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 2, h, w, n, dtype=torch.float64, generator=rng) for n in (d, d, dv))
    return q[:, :, ::stride, ::stride], k, v


def tables(window, d=4):
    return torch.randn(2, 2 * window - 1, d, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).unbind()


def by_hand(q, k, v, block, halo, rel, mask_border, stride, steps=False):
    """One query at a time, in the window of its block; beyond the rim of zeros there is nothing."""
    h, w = k.shape[2:4]
    window = block + 2 * halo
    out = torch.zeros(*q.shape[:4], v.shape[4], dtype=q.dtype)
    for i in range(q.shape[2]):
        for j in range(q.shape[3]):
            top, left = i * stride // block * block, j * stride // block * block
            own = [(p * stride - start) // (stride if steps else 1) for p, start in ((i, top), (j, left))]
            logits, values = [], []
            for a in range(window):
                for c in range(window):
                    y, x = top - halo + a, left - halo + c
                    inside = 0 <= y < h and 0 <= x < w
                    if y >= h + halo or x >= w + halo or (mask_border and not inside):
                        continue
                    logit = (q[:, :, i, j] * k[:, :, y, x]).sum(2) / 2 if inside else torch.zeros_like(q[:, :, 0, 0, 0])
                    if rel is not None:
                        entries = rel[0][a - own[0] + window - 1] + rel[1][c - own[1] + window - 1]
                        logit = logit + q[:, :, i, j] @ entries
                    logits.append(logit)
                    values.append(v[:, :, y, x] if inside else torch.zeros_like(v[:, :, 0, 0]))
            out[:, :, i, j] = (torch.stack(logits).softmax(0)[..., None] * torch.stack(values)).sum(0)
    return out


@pytest.mark.parametrize("mask_border", [False, True])
@pytest.mark.parametrize(
    ("size", "block", "halo", "stride"), [((6, 4), 2, 1, 1), ((5, 7), 3, 1, 1), ((5, 4), 2, 1, 2), ((4, 4), 4, 3, 2)]
)
def test_equal_to_a_loop(size, block, halo, stride, mask_border):
    q, k, v = made(*size, stride)
    rel = tables(block + 2 * halo)
    for executor in ("dense", "tiles"):
        out = halo_attention(q, k, v, block, halo, rel, mask_border, stride, executor=executor)
        torch.testing.assert_close(out, by_hand(q, k, v, block, halo, rel, mask_border, stride))
    released = halo_attention(q, k, v, block, halo, rel, mask_border, stride, parity="authors")
    torch.testing.assert_close(released, by_hand(q, k, v, block, halo, rel, mask_border, stride, steps=True))
    assert (block == stride or stride == 1) == torch.allclose(released, out)


def test_blocks_inside_are_dense_attention_masked_to_their_window():
    q, k, v = made(12, 12)
    out = halo_attention(q, k, v, 4, 2)
    flat = [t.flatten(2, 3) for t in (q, k, v)]
    seen = Halo((12, 12), 4, 2).to_dense()
    weights = (flat[0] @ flat[1].transpose(2, 3) / 2).masked_fill(~seen, -torch.inf).softmax(3)
    plain = (weights @ flat[2]).unflatten(2, (12, 12))
    torch.testing.assert_close(out[:, :, 4:8, 4:8], plain[:, :, 4:8, 4:8])
    assert not torch.allclose(out, plain)
    torch.testing.assert_close(halo_attention(q, k, v, 4, 2, mask_border=True), plain)


def test_queries_of_a_block_see_the_same_keys():
    q, k, v = made(12, 12)
    same = q[:, :, :1, :1].expand_as(q)
    out = halo_attention(same, k, v, 4, 2).unflatten(3, (3, 4)).unflatten(2, (3, 4))
    torch.testing.assert_close(out, out[:, :, :, :1, :, :1].expand_as(out))


def test_a_shift_by_a_block_and_not_by_a_pixel_goes_through():
    q, k, v = made(16, 16)
    rel = tables(6)

    def inside(shift):
        moved = [t.roll((shift, shift), (2, 3)) for t in (q, k, v)]
        return halo_attention(*moved, 4, 1, rel).roll((-shift, -shift), (2, 3))[:, :, 4:8, 4:8]

    torch.testing.assert_close(inside(4), inside(0))
    assert not torch.allclose(inside(1), inside(0))


def test_no_halo_is_window_attention_and_one_block_is_dense():
    q, k, v = made(8, 6)
    flat = [t.flatten(2, 3) for t in (q, k, v)]
    windows = attend(*flat, Window((8, 6), 2), executor="dense").unflatten(2, (8, 6))
    torch.testing.assert_close(halo_attention(q, k, v, 2, 0), windows)
    dense = attend(*flat, Dense(48, 48)).unflatten(2, (8, 6))
    torch.testing.assert_close(halo_attention(q, k, v, 8, 0), dense)


def test_a_stride_leaves_queries_out():
    q, k, v = made(10, 8)
    rel = tables(6)
    whole = halo_attention(q, k, v, 4, 1, rel)
    strided = halo_attention(q[:, :, ::2, ::2], k, v, 4, 1, rel, stride=2)
    torch.testing.assert_close(strided, whole[:, :, ::2, ::2])


def test_gradients():
    q, k, v = (t[:1, :1].requires_grad_() for t in made(5, 3, d=2, dv=2))
    rel = [t[:, :2].clone().requires_grad_() for t in tables(4)]
    assert torch.autograd.gradcheck(
        lambda q, k, v, *rel: halo_attention(q, k, v, 2, 1, rel, executor="tiles"), (q, k, v, *rel), fast_mode=True
    )


def test_half_precision():
    q, k, v = made(9, 9)
    rel = tables(6)
    low = [t.bfloat16() for t in (q, k, v, *rel)]
    out = halo_attention(*low[:3], 4, 1, tuple(low[3:])).double()
    torch.testing.assert_close(out, halo_attention(q, k, v, 4, 1, rel), atol=0.05, rtol=0.05)


def test_what_a_stride_does_not_divide_is_averaged():
    torch.manual_seed(0)
    x = torch.randn(2, 16, 9, 9)
    odd = HaloAttn(16, 2, 3, 1, stride=2)
    assert odd(x).shape == (2, 16, 4, 4) and odd.q.stride == (1, 1)
    plain = HaloAttn(16, 2, 3, 1)
    plain.load_state_dict(odd.state_dict())
    torch.testing.assert_close(odd(x), torch.nn.functional.avg_pool2d(plain(x), 2))


def test_backbone():
    torch.manual_seed(0)
    net = HaloNet(block=4, heads=2).of(TINY, 3)
    for module in net.modules():  # a block starts as the identity
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    x = torch.randn(2, 3, 96, 70)
    net(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    maps = HaloNet(block=4, heads=2).of(TINY, features_only=True)
    shapes = [tuple(m.shape) for m in maps(x)]
    assert shapes == [(2, 8, 24, 18), (2, 8, 12, 9), (2, 16, 6, 5), (2, 16, 3, 3)]
    assert maps.feature_info.channels() == [8, 8, 16, 16] and maps.feature_info.reduction() == [4, 8, 16, 32]
    net.eval()
    with torch.no_grad():
        torch.testing.assert_close(net(x)[:1], net(x[:1]))


@pytest.mark.parametrize(("size", "published"), [("h1", "halonet_h1"), ("26t", "halonet26t")])
def test_as_many_parameters_as_published(size, published):
    with torch.device("meta"):
        net, other = vistok.create("halonet", size=size).build(), timm.create_model(published)
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in other.parameters())


def test_what_does_not_fit_is_said():
    q, k, v = made(4, 4)
    for call, said in (
        (lambda: halo_attention(q, k, v, 2, 1, tables(3)), r"rel: got \(5, 4\), must be \(7, 4\)"),
        (lambda: halo_attention(q[:, :, 1:], k, v, 2, 1), r"q: got \(3, 4\)"),
        (lambda: HaloAttn(8, 3), "heads: got 3"),
        (lambda: HaloAttn(8, 2, stride=3), "stride: got 3"),
        (lambda: HaloAttn(8, 2, parity="timm"), "parity: got 'timm'"),
        (lambda: HaloNet("h9").build(), "size: got 'h9'"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


@pytest.mark.parametrize(("blocks", "holds"), [(1.0, True), (3.0, False)])
def test_the_claim_can_hold_and_can_fail(blocks, holds):
    class Trial:
        seed = 0

        def milliseconds(self, runs):
            assert runs["blocks"]().shape == (1, 4, 64, 64, 32)
            return {"window by window": 4.0, "in tiles": 2.0, "blocks": blocks}

    outcome = claim(Trial())
    assert outcome.holds is holds and outcome.baseline == 2.0 and "x pairs" in outcome.note
