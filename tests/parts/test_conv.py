"""Convolutional encoder and decoder: shapes, where attention is, and what the conditioned norms read."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.nn.functional import group_norm

from vistok.parts.conv import AttentionBlock, ConvDecoder, ConvEncoder, Norm, ResidualBlock


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@torch.no_grad()
def test_shapes_and_the_way_back():
    x = torch.randn(2, 3, 16, 24)
    for mults, attention, norm, shuffle in product(
        ((1,), (1, 2), (1, 1, 2)), (True, False), ("plain", "spatial", "adaptive"), (False, True)
    ):
        encoder = ConvEncoder(5, 8, mults, 1, attention=attention)
        decoder = ConvDecoder(5, 8, mults, 1, attention=attention, norm=norm, shuffle=shuffle)
        z = encoder(x)
        assert z.shape == (2, 5, 16 // encoder.factor, 24 // encoder.factor)
        assert decoder(z).shape == x.shape
        assert torch.allclose(decoder(z[:1]), decoder(z)[:1], atol=1e-5)


def test_the_published_size():
    """Parameters of LlamaGen's encoder (128 channels, 1-1-2-2-4, 2 blocks, z 256) by its own sum of layers."""
    encoder, decoder = ConvEncoder(), ConvDecoder()
    assert encoder.factor == 16

    def conv(a, b, k=3):
        return a * b * k * k + b

    def block(a, b):
        return 2 * a + conv(a, b) + 2 * b + conv(b, b) + (conv(a, b, 1) if a != b else 0)

    attention = 2 * 512 + 4 * conv(512, 512, 1)
    middle = 2 * block(512, 512) + attention
    down = block(128, 128) * 4 + block(128, 256) + block(256, 256) * 3 + block(256, 512) + block(512, 512)
    strided = 2 * conv(128, 128) + 2 * conv(256, 256)
    wanted = conv(3, 128) + down + strided + 2 * attention + middle + 2 * 512 + conv(512, 256)
    assert sum(p.numel() for p in encoder.parameters()) == wanted
    up = block(512, 512) * 3 + block(512, 256) + block(256, 256) * 5 + block(256, 128) + block(128, 128) * 5
    raised = conv(512, 512) + 2 * conv(256, 256) + conv(128, 128)
    wanted = conv(256, 512) + middle + up + 3 * attention + raised + 2 * 128 + conv(128, 3)
    assert sum(p.numel() for p in decoder.parameters()) == wanted


def test_attention_is_in_the_middle_and_at_the_coarsest_level():
    for network, count in ((ConvEncoder(4, 8, (1, 2), 2), 3), (ConvDecoder(4, 8, (1, 2), 2), 4)):
        found = [name for name, part in network.named_modules() if isinstance(part, AttentionBlock)]
        assert len(found) == count and sum(name.startswith("middle") for name in found) == 1
        assert len({name.split(".")[1] for name in found if name.startswith("levels")}) == 1
    assert not [m for m in ConvDecoder(4, 8, (1, 2), attention=False).modules() if isinstance(m, AttentionBlock)]


@torch.no_grad()
def test_attention_by_hand():
    block, x = AttentionBlock(4), torch.randn(1, 4, 2, 3)
    h = group_norm(x, 4, eps=1e-6)
    q, k, v = block.qkv(h).flatten(2)[0].t().chunk(3, 1)
    seen = torch.stack(
        [sum(w * row for w, row in zip((q[i] @ k.t() / 2).softmax(0), v, strict=True)) for i in range(6)]
    )
    torch.testing.assert_close(block(x), x + block.out(seen.t().view(1, 4, 2, 3)))


@torch.no_grad()
def test_a_spatial_norm_reads_its_place_and_an_adaptive_one_the_whole():
    x, condition = torch.randn(1, 4, 4, 4), torch.randn(1, 3, 2, 2)
    other = condition.clone()
    other[0, :, 0, 1] += 1
    spatial, adaptive = Norm(4, 3), Norm(4, 3, spatial=False)
    changed = (spatial(x, other) != spatial(x, condition)).any(1)[0]
    assert changed.tolist() == [[False, False, True, True]] * 2 + [[False] * 4] * 2
    assert (adaptive(x, other) != adaptive(x, condition)).all()
    shuffled = condition.flatten(2)[..., torch.tensor([2, 0, 3, 1])].view_as(condition)
    torch.testing.assert_close(adaptive(x, shuffled), adaptive(x, condition))
    gain = adaptive.gain(condition[0].flatten(1).std(1, correction=0)[:, None, None])
    made = gain * group_norm(x, 4) + adaptive.shift(condition[0].mean((1, 2))[:, None, None])
    torch.testing.assert_close(adaptive(x, condition), made, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_condition_beside_the_codes():
    z, condition = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    for norm, read in (("plain", False), ("spatial", True), ("adaptive", True)):
        decoder = ConvDecoder(4, 8, (1, 2), 1, norm=norm)
        assert torch.equal(decoder(z), decoder(z, z))
        assert torch.equal(decoder(z), decoder(z, condition)) != read


def test_everything_learns():
    for norm in ("plain", "spatial", "adaptive"):
        networks = torch.nn.Sequential(ConvEncoder(4, 8, (1, 2), 1), ConvDecoder(4, 8, (1, 2), 1, norm=norm))
        networks(torch.randn(2, 3, 8, 8)).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in networks.parameters())


def test_a_block_of_other_width_has_a_skip():
    assert ResidualBlock(4, 6)(torch.randn(1, 4, 3, 3)).shape == (1, 6, 3, 3)
    assert isinstance(ResidualBlock(4, 4).skip, torch.nn.Identity)


def test_refusals():
    with pytest.raises(ValueError, match="norm: got 'batch', must be"):
        ConvDecoder(4, 8, (1,), norm="batch")
    with pytest.raises(ValueError, match="x: got 6 x 8, must be multiples of 4"):
        ConvEncoder(4, 8, (1, 1, 1))(torch.randn(1, 3, 6, 8))
