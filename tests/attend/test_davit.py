"""davit: what its sheet says must hold, the backbone and the claim."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

import vistok
from vistok.attend.davit import Block, ChannelGroupAttention, DaViT, WindowAttention, claim
from vistok.core.attention import Window


def made(n, dim=12, b=2, seed=0):
    return torch.randn(b, n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def thirds(module, x):
    """Value, query and key of channel attention, query, key and value of windows: (B, groups, N, d) each."""
    groups = getattr(module, "groups", None) or module.heads
    return [t.unflatten(2, (groups, -1)).transpose(1, 2) for t in module.qkv(x).chunk(3, 2)]


@pytest.mark.parametrize("scale", ["head", "tokens"])
def test_channels_equal_a_loop(scale):
    attn = ChannelGroupAttention(12, 3, scale=scale).double()
    x = made(7)
    v, q, k = thirds(attn, x)
    out = torch.zeros_like(v)
    for b in range(2):
        for g in range(3):
            for c in range(4):
                logits = torch.stack([(q[b, g, :, c] * k[b, g, :, e]).sum() for e in range(4)])
                weights = (logits / (4 if scale == "head" else 7) ** 0.5).softmax(0)
                out[b, g, :, c] = sum(weights[e] * v[b, g, :, e] for e in range(4))
    torch.testing.assert_close(attn(x), attn.proj(out.transpose(1, 2).flatten(2)))


def test_channels_equal_attention_over_transposed_tokens():
    attn = ChannelGroupAttention(12, 3).double()
    x = made(9)
    v, q, k = (t.transpose(2, 3) for t in thirds(attn, x))
    plain = scaled_dot_product_attention(q, k, v, scale=4**-0.5).permute(0, 3, 1, 2).flatten(2)
    torch.testing.assert_close(attn(x), attn.proj(plain))


def test_channels_do_not_mind_the_order_or_number_of_tokens():
    attn = ChannelGroupAttention(12, 3, scale="tokens").double()
    x, order = made(11), torch.randperm(11, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(attn(x[:, order]), attn(x)[:, order])
    assert attn(made(5)).shape == (2, 5, 12)
    twice = attn(torch.cat([x, x], 1))
    assert not torch.allclose(twice[:, :11], attn(x))  # logits of the square root of twice the tokens
    head = ChannelGroupAttention(12, 3).double()
    assert head(x).shape == x.shape


def test_a_group_depends_on_itself_alone():
    attn = ChannelGroupAttention(12, 3).double()
    torch.nn.init.eye_(attn.proj.weight)
    x, changed = made(6), None
    before = attn(x)
    with torch.no_grad():
        for third in range(3):
            attn.qkv.weight[third * 12 + 4 : third * 12 + 8] += 1  # of group 1
    changed = (attn(x) - before).abs().amax((0, 1)) > 1e-9
    assert changed.tolist() == [False] * 4 + [True] * 4 + [False] * 4


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("size", [(6, 4), (5, 7), (1, 1)])
def test_windows_equal_a_loop(size, mask):
    attn = WindowAttention(8, 2, 3, mask_padding=mask).double()
    x = made(size[0] * size[1], 8)
    full = x.new_zeros(2, -(-size[0] // 3) * 3, -(-size[1] // 3) * 3, 8)
    full[:, : size[0], : size[1]] = x.unflatten(1, size)
    out = torch.zeros(2, *size, 8, dtype=x.dtype)
    for i in range(size[0]):
        for j in range(size[1]):
            rows, columns = (range(p // 3 * 3, p // 3 * 3 + 3) for p in (i, j))
            seen = [(y, c) for y in rows for c in columns if not mask or (y < size[0] and c < size[1])]
            q = thirds(attn, full[:, i, j][:, None])[0]
            _, k, v = thirds(attn, torch.stack([full[:, y, c] for y, c in seen], 1))
            out[:, i, j] = ((q @ k.transpose(2, 3) / 2).softmax(3) @ v).transpose(1, 2).flatten(2)[:, 0]
    torch.testing.assert_close(attn(x, size), attn.proj(out.flatten(1, 2)))


def test_a_pixel_reaches_its_window_and_no_other_and_channels_all():
    windows, channels = WindowAttention(8, 2, 2).double(), ChannelGroupAttention(8, 2).double()
    x = made(16, 8)
    moved = x.clone()
    moved[:, 5] += 1  # row 1, column 1
    reached = ((windows(moved, (4, 4)) - windows(x, (4, 4))).abs().amax((0, 2)) > 1e-12).view(4, 4)
    assert reached.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert bool(((channels(moved) - channels(x)).abs().amax((0, 2)) > 1e-12).all())
    seen = Window((4, 4), 2).to_dense()
    q, k, v = thirds(windows, x)
    plain = ((q @ k.transpose(2, 3) / 2).masked_fill(~seen, -torch.inf).softmax(3) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(windows(x, (4, 4)), windows.proj(plain))


def test_twice_the_tokens_cost_twice_as_much():
    attn, cost = ChannelGroupAttention(12, 3), []
    for n in (64, 128):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            attn(torch.zeros(1, n, 12))
        cost.append(counter.get_total_flops())
    assert cost[1] == 2 * cost[0] == 2 * (2 * 64 * 12 * 12 * 4 + 4 * 64 * 12 * 4)
    assert Window((8, 16), 4).pairs == 2 * Window((8, 8), 4).pairs


@pytest.mark.parametrize("attn", [ChannelGroupAttention(4, 2), WindowAttention(4, 2, 2)])
def test_gradients(attn):
    attn = attn.double()
    x = made(9, 4, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attn(x, (3, 3)), (x,), fast_mode=True)


def test_half_precision_does_not_overflow():
    attn = ChannelGroupAttention(8, 2)
    x = 60 * made(4096, 8).float().abs()
    low = attn.half()(x.half())
    assert bool(low.isfinite().all())


def test_backbone():
    torch.manual_seed(0)
    dims = (8, 8, 16, 16), (1, 1, 1, 1), (2, 2, 2, 4), 3
    net = DaViT().of(*dims, num_classes=3)
    x = torch.randn(2, 3, 75, 96)
    net(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    for overlapped in (False, True):
        maps = DaViT(overlapped=overlapped, mask_padding=True).of(*dims, features_only=True)
        shapes = [tuple(m.shape) for m in maps(x)]
        assert shapes == [(2, 8, 19, 24), (2, 8, 10, 12), (2, 16, 5, 6), (2, 16, 3, 3)]
    assert maps.feature_info.channels() == [8, 8, 16, 16] and maps.feature_info.reduction() == [4, 8, 16, 32]
    net.eval()
    with torch.no_grad():
        torch.testing.assert_close(net(x)[:1], net(x[:1]))
        pooled = net.forward_maps(x)[-1].mean((2, 3))  # the mean, then the norm
        normed = torch.nn.functional.layer_norm(pooled, (16,))
        torch.testing.assert_close(net(x), net.head(normed))


@pytest.mark.parametrize(("size", "millions"), [("tiny", 28.3), ("small", 49.7), ("base", 87.9), ("large", 196.8)])
def test_as_many_parameters_as_published(size, millions):
    with torch.device("meta"):
        net, other = vistok.create("davit", size=size).build(), timm.create_model(f"davit_{size}")
    count = sum(p.numel() for p in net.parameters())
    assert count == sum(p.numel() for p in other.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.1)


def test_every_second_block_is_of_channels_and_rates_rise():
    with torch.device("meta"):
        net = DaViT(drop_path=0.22).build()
    blocks = [m for m in net.modules() if isinstance(m, Block)]
    kinds = [type(block.attn) for block in blocks]
    assert kinds == [WindowAttention, ChannelGroupAttention] * 6
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.02 * i for i in range(12)])


def test_what_does_not_fit_is_said():
    for call, said in (
        (lambda: ChannelGroupAttention(8, 3), "groups: got 3"),
        (lambda: ChannelGroupAttention(8, 2, scale="n"), "scale: got 'n'"),
        (lambda: WindowAttention(8, 3), "heads: got 3"),
        (lambda: DaViT("huge").build(), "size: got 'huge'"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


@pytest.mark.parametrize(("longer", "holds"), [(4.1, True), (6.0, False)])
def test_the_claim_can_hold_and_can_fail(longer, holds):
    class Trial:
        seed = 3

        def milliseconds(self, runs):
            with torch.no_grad():
                assert [run().shape[1] for run in runs.values()] == [784, 784, 3136, 3136]
            return {"dense": 1.0, "channels": 1.0, "dense, more": 12.0, "channels, more": longer}

    outcome = claim(Trial())
    assert outcome.holds is holds and outcome.value == longer and "100% of the tokens" in outcome.note
