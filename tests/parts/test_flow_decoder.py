"""Decoders by flow: kinds of tokens, what sees what, times and alignment."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vistok.core.flow import FLEXTOK, NOISE_FIRST, Velocity
from vistok.parts.flow_decoder import Alignment, FlowDecoder, KindBlock, fat_logit_normal, flow_loss, resized
from vistok.parts.flow_head import FlowHead, published_head


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@torch.no_grad()
def test_kinds_have_modulations_of_their_own_and_free_tokens_none():
    block = KindBlock(8, 2, 2, zero_init=False)
    x, kind = torch.randn(2, 5, 8), torch.tensor([2, 0, 0, 1, 1])
    before = block(x, kind, torch.ones(2, 8))
    assert not torch.allclose(block(x, torch.tensor([2, 0, 0, 1, 0]), torch.ones(2, 8)), before)
    block.modulation.weight.zero_()
    block.modulation.bias.zero_()
    moved = (block(x, kind, torch.ones(2, 8)) - x).abs().amax((0, 2)) > 0
    assert moved.tolist() == [True, False, False, False, False]
    alone = x[:, :1] + block.attention(block.norm1(x))[:, :1]
    torch.testing.assert_close(block(x, kind, torch.ones(2, 8))[:, :1], alone + block.mlp(block.norm2(alone)))
    with pytest.raises(ValueError, match="heads: got 3"):
        KindBlock(8, 3, 1)


@torch.no_grad()
def test_the_decoder_sees_its_tokens_time_and_all_patches():
    decoder = FlowDecoder(3, 4, 16, 2, 2, zero_init=False)
    x, t, tokens = torch.randn(2, 3, 8, 12), torch.tensor([0.2, 0.7]), torch.randn(2, 5, 16)
    made = decoder(x, t, tokens)
    assert made.shape == x.shape
    for other in (decoder(x, t, tokens.flip(0)), decoder(x, t.flip(0), tokens), decoder(x.flip(3), t, tokens).flip(3)):
        assert not torch.allclose(made, other, atol=1e-3)
    torch.testing.assert_close(decoder(x[1:], t[1:], tokens[1:]), made[1:])
    with pytest.raises(ValueError, match="must be of"):
        FLEXTOK.value_of(Velocity(made, replace(FLEXTOK, noise_at=0)))


@torch.no_grad()
def test_a_patch_is_drawn_from_its_own_condition_and_noise():
    head = FlowHead(12, 8, 16, 2, zero_init=False)
    x, t, cond = torch.randn(5, 12), torch.rand(5), torch.randn(5, 8)
    before = head(x, t, cond)
    other = torch.arange(5) != 2
    for changed in ((x + other[:, None], t, cond), (x, t * other + t[2] * ~other, cond + other[:, None])):
        assert torch.allclose(head(*changed)[2], before[2], atol=1e-6)
    for changed in ((x.flip(0), t, cond), (x, 1 - t, cond), (x, t, cond.flip(0))):
        assert not torch.allclose(head(*changed)[0], before[0], atol=1e-4)


@torch.no_grad()
def test_new_networks_give_no_velocity():
    assert not FlowDecoder(3, 4, 16, 2, 2)(torch.randn(2, 3, 8, 8), torch.rand(2), torch.randn(2, 5, 16)).any()
    assert not FlowHead(12, 8, 16, 2)(torch.randn(5, 12), torch.rand(5), torch.randn(5, 8)).any()


@torch.no_grad()
def test_a_tap_is_the_patches_after_that_block():
    decoder = FlowDecoder(3, 4, 16, 3, 2, zero_init=False)
    x, t, tokens = torch.randn(2, 3, 8, 12), torch.rand(2), torch.randn(2, 5, 16)
    seen = []
    for block in decoder.blocks:
        block.register_forward_hook(lambda _, given, out: seen.append(out[:, :6]))
    for tap in (1, 2, 3):
        seen.clear()
        velocity, met = decoder.tapped(x, t, tokens, tap)
        assert torch.equal(met, seen[tap - 1]) and torch.equal(velocity, decoder(x, t, tokens))


def test_flow_loss_is_that_of_its_convention():
    data, noise, t = torch.randn(3, 4), torch.randn(3, 4), torch.rand(3)
    share = t[:, None]
    for flow, mixed, target in (
        (FLEXTOK, share * noise + (1 - share) * data, noise - data),
        (NOISE_FIRST, share * data + (1 - share) * noise, data - noise),
    ):
        seen = []
        loss = flow_loss(flow, lambda x, t, seen=seen: seen.append(x) or torch.zeros_like(x), data, t, noise)
        torch.testing.assert_close(loss, target.square().mean())
        torch.testing.assert_close(seen[0], mixed)


def test_fat_times_reach_both_ends():
    t = fat_logit_normal(20000)
    ends = (t < 0.01).float().mean() + (t > 0.99).float().mean()
    assert 0 <= float(t.min()) and float(t.max()) <= 1 and float(t.mean()) == pytest.approx(0.5, abs=0.01)
    assert 0.001 < float(ends) < 0.004  # a tenth of 0.02; the logit-normal has none to speak of


def test_resized_maps_and_alignment():
    x = torch.arange(4.0).view(1, 4, 1)
    assert torch.equal(resized(x, (2, 2), (2, 2)), x)
    torch.testing.assert_close(resized(x, (2, 2), (1, 1)), torch.full((1, 1, 1), 1.5))
    alignment = Alignment(8, 6)
    features, teacher = torch.randn(2, 4, 8), torch.randn(2, 16, 6)
    loss = alignment(features, teacher, (2, 2), (4, 4))
    assert 0 < float(loss.detach()) < 2
    same = alignment(features, alignment.mlp(features).detach(), (2, 2), (2, 2))
    assert float(same.detach()) == pytest.approx(0, abs=1e-5)


def test_published_head_has_its_cosines_in_front():
    weight = torch.arange(16 * 256.0).view(16, 256)
    found = published_head({"time_embed.mlp.0.weight": weight, "res_blocks.1.mlp.w3.bias": torch.ones(16)})
    assert torch.equal(found["time.0.weight"], torch.cat([weight[:, 128:], weight[:, :128]], 1))
    assert set(found) == {"time.0.weight", "blocks.1.down.bias"}
