"""s2aformer: what its sheet says must hold, the backbone, and the claim."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import Attention
from torch import nn
from torch.nn.functional import conv2d
from torch.utils.flop_counter import FlopCounterMode

from vistok.attend.s2aformer import HybridPerceptionBlock, S2AFormer, StripSelfAttention, claim, strip_flops
from vistok.bench.attend_trial import AttendTrial


def strip(dim=12, heads=3, qk_dim=1, sr=2):
    torch.manual_seed(0)
    return StripSelfAttention(dim, heads, qk_dim, sr).double()


def tokens(h=4, w=6, dim=12):
    return torch.randn(2, h * w, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_all_channels_and_no_reduction_are_plain_attention():
    layer, x = strip(qk_dim=4, sr=1), tokens()
    plain = Attention(12, 3, qkv_bias=True).double()
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(plain.qkv, name).copy_(torch.cat([getattr(of, name) for of in (layer.q, layer.k, layer.v)]))
            getattr(plain.proj, name).copy_(getattr(layer.proj, name))
    torch.testing.assert_close(layer(x, (4, 6)), plain(x))


@pytest.mark.parametrize("qk_dim", [1, 2, 4, 5])
def test_equal_to_loops(qk_dim):
    layer, x = strip(qk_dim=qk_dim), tokens()
    grid = x.mT.unflatten(2, (4, 6))
    few = layer.norm(conv2d(grid, layer.reduce.weight, layer.reduce.bias, 2, groups=12).flatten(2).mT)
    q, k, v = layer.q(x), layer.k(few), layer.v(few)
    out = torch.zeros_like(x)
    for h in range(3):
        for i in range(24):
            part, wide = slice(h * qk_dim, (h + 1) * qk_dim), slice(4 * h, 4 * h + 4)
            logits = (q[:, i, None, part] * k[:, :, part]).sum(2) / qk_dim**0.5
            out[:, i, wide] = (logits.softmax(1)[:, :, None] * v[:, :, wide]).sum(1)
    torch.testing.assert_close(layer(x, (4, 6)), layer.proj(out))


def test_logits_of_one_channel_have_rank_one_and_rank_keys_alone():
    q, k, v = strip().split(tokens(), (4, 6))
    logits = q @ k.transpose(2, 3)
    assert bool((torch.linalg.matrix_rank(logits) == 1).all())
    torch.testing.assert_close(logits, q * k[..., 0][:, :, None])
    order = logits.argsort(3)  # the same for all queries, or turned round
    forward = (order == k[..., 0].argsort(2)[:, :, None]).all(3)
    backward = (order == k[..., 0].argsort(2).flip(2)[:, :, None]).all(3)
    assert bool((forward | backward).all()) and v.shape == (2, 3, 6, 4)


@pytest.mark.parametrize("qk_dim", [1, 4])
def test_operations_are_as_counted(qk_dim):
    layer, x = strip(qk_dim=qk_dim).float(), tokens(8, 8)[:1].float()
    qk, av = strip_flops(64, 16, 12, 3, qk_dim)
    assert qk == 2 * 64 * 16 * 3 * qk_dim and av == 2 * 64 * 16 * 12
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        q, k, v = layer.split(x, (8, 8))
        (q @ k.transpose(2, 3)).softmax(3) @ v
    projections = 2 * 64 * 12 * 3 * qk_dim + 2 * 16 * 12 * (3 * qk_dim + 12)
    assert counter.get_total_flops() == qk + av + projections + 2 * 16 * 4 * 12


def test_without_attention_and_local_module_a_convolution_and_an_mlp_are_left():
    torch.manual_seed(0)
    block, x = HybridPerceptionBlock(12, 3, sr=2).double().eval(), tokens()
    for layer in (block.attn.proj, block.lim.proj):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    conv = x + conv2d(x.mT.unflatten(2, (4, 6)), block.conv.weight, block.conv.bias, 1, 1, groups=12).flatten(2).mT
    torch.testing.assert_close(block(x, (4, 6)), conv + block.mlp(block.norm3(conv)))


def test_a_block_is_its_four_parts_in_order():
    torch.manual_seed(0)
    block, x = HybridPerceptionBlock(12, 3, sr=2).double().eval(), tokens()
    f = x + block.conv(x.mT.unflatten(2, (4, 6))).flatten(2).mT
    f = f + block.attn(block.norm1(f), (4, 6))
    f = f + block.lim(block.norm2(f), (4, 6))
    torch.testing.assert_close(block(x, (4, 6)), f + block.mlp(block.norm3(f)))


def test_maps_that_are_not_divided_keep_their_inner_keys():
    layer = strip()
    x = tokens(5, 7)
    found = layer.reduced(x, (5, 7)).unflatten(1, (3, 4))
    inner = x.unflatten(1, (5, 7))[:, :4, :6].flatten(1, 2)
    torch.testing.assert_close(found[:, :2, :3], layer.reduced(inner, (4, 6)).unflatten(1, (2, 3)))
    assert layer(x, (5, 7)).shape == x.shape
    assert strip(sr=8)(tokens(3, 3), (3, 3)).shape == (2, 9, 12)


def test_backbone():
    net = S2AFormer(dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), heads=(1, 2, 3, 4)).build(7)
    x = torch.randn(2, 3, 64, 96)
    logits = net(x)
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    maps = S2AFormer(dims=(8, 16, 24, 32), heads=(1, 2, 3, 4)).build(features_only=True).eval()(x)
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 16, 24), (16, 8, 12), (24, 4, 6), (32, 2, 3)]
    attns = [m for m in S2AFormer().build(0).modules() if isinstance(m, StripSelfAttention)]
    assert [a.sr for a in attns] == [8, 8, 4, 4, 2, 2, 1, 1] and attns[-1].q.out_features == 8


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="heads: got 5"):
        strip(heads=5)
    with pytest.raises(ValueError, match="qk_dim, sr: got 0, 2"):
        strip(qk_dim=0)


@pytest.mark.parametrize(("after", "faster", "holds"), [(0.895, True, True), (0.88, True, False), (0.95, False, False)])
def test_the_claim_can_hold_and_can_fail(after, faster, holds):
    class Trial(AttendTrial):
        def accuracy(self, model, change=None):
            return after if model.stages[0].blocks[0].attn.q.out_features == 2 else 0.9

        def milliseconds(self, runs):
            return {"full": 2.0, "strip": 1.0 if faster else 3.0}

    outcome = claim(Trial(), steps=2)
    assert outcome.holds is holds and "2 steps" in outcome.note
