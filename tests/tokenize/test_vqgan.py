"""VQGAN, LlamaGen, VAR: the layouts of their weights, by networks that are written out here."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate, pad, silu

from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.tokenize.vqgan import VQGAN, claim

SMALL = dict(image=16, width=8, mults=(1, 1, 2), blocks=1, channels=8, codes=32, dim=4, restart_after=3)
WIDTHS, BLOCKS, CHANNELS = (8, 8, 16), 2, 8


def conv(a, b, k=3, stride=1, padding=None):
    return nn.Conv2d(a, b, k, stride, k // 2 if padding is None else padding)


def norm(channels):
    return nn.GroupNorm(8 if channels == 8 else 16, channels, eps=1e-6)


def residual(a, b):
    made = nn.Module()
    made.norm1, made.conv1, made.norm2, made.conv2 = norm(a), conv(a, b), norm(b), conv(b, b)
    if a != b:
        made.nin_shortcut = conv(a, b, 1)
    return made


def attention(c, layout):
    made = nn.Module()
    made.norm, made.proj_out = norm(c), conv(c, c, 1)
    if layout == "var":
        made.qkv = conv(c, 3 * c, 1)
    else:
        made.q, made.k, made.v = (conv(c, c, 1) for _ in range(3))
    return made


def middle(c, layout):
    parts = residual(c, c), attention(c, layout), residual(c, c)
    if layout == "llamagen":
        return nn.ModuleList(parts)
    made = nn.Module()
    made.block_1, made.attn_1, made.block_2 = parts
    return made


def level(a, b, count, attends, layout, change=None):
    made = nn.Module()
    blocks = nn.ModuleList(residual(a if i == 0 else b, b) for i in range(count))
    setattr(made, "res" if layout == "llamagen" else "block", blocks)
    made.attn = nn.ModuleList(attention(b, layout) for _ in range(count if attends else 0))
    if change:
        name, stride = change
        inside = nn.Module()
        inside.conv = conv(b, b, 3, stride, 0 if stride == 2 else 1)
        setattr(made, name, inside)
    return made


def published(layout, codes=32, dim=4, scales=()):
    """A network with the published names, and functions that run it as its repository does."""
    last = len(WIDTHS) - 1
    net = nn.Module()
    net.encoder, net.decoder = nn.Module(), nn.Module()
    net.encoder.conv_in = conv(3, WIDTHS[0])
    net.decoder.conv_in = conv(CHANNELS, WIDTHS[-1])
    downs = [
        level(WIDTHS[max(i - 1, 0)], WIDTHS[i], BLOCKS, i == last, layout, ("downsample", 2) if i < last else None)
        for i in range(last + 1)
    ]
    ups = [
        level(WIDTHS[min(i + 1, last)], WIDTHS[i], BLOCKS + 1, i == last, layout, ("upsample", 1) if i else None)
        for i in reversed(range(last + 1))
    ]
    if layout == "llamagen":
        net.encoder.conv_blocks, net.decoder.conv_blocks = nn.ModuleList(downs), nn.ModuleList(ups)
    else:
        net.encoder.down, net.decoder.up = nn.ModuleList(downs), nn.ModuleList(reversed(ups))
    for part, width, out in ((net.encoder, WIDTHS[-1], CHANNELS), (net.decoder, WIDTHS[0], 3)):
        part.mid = middle(WIDTHS[-1], layout)
        part.norm_out, part.conv_out = norm(width), conv(width, out)
    kernel = 3 if layout == "var" else 1
    net.quant_conv, net.post_quant_conv = conv(CHANNELS, dim, kernel), conv(dim, CHANNELS, kernel)
    net.quantize = nn.Module()
    net.quantize.embedding = nn.Embedding(codes, dim)
    if layout == "llamagen":
        net.quantize.register_buffer("codebook_used", torch.zeros(65536))
    if layout == "var":
        net.quantize.quant_resi = nn.Module()
        net.quantize.quant_resi.qresi_ls = nn.ModuleList(conv(dim, dim) for _ in range(4))
        net.quantize.register_buffer("ema_vocab_hit_SV", torch.zeros(len(scales), codes))

    def run_residual(block, x):
        h = block.conv2(silu(block.norm2(block.conv1(silu(block.norm1(x))))))
        return h + (block.nin_shortcut(x) if hasattr(block, "nin_shortcut") else x)

    def run_attention(block, x):
        b, c, h, w = x.shape
        y = block.norm(x)
        q, k, v = block.qkv(y).chunk(3, 1) if layout == "var" else (block.q(y), block.k(y), block.v(y))
        weights = (q.flatten(2).transpose(1, 2) @ k.flatten(2) * c**-0.5).softmax(-1)
        seen = (weights @ v.flatten(2).transpose(1, 2)).transpose(1, 2).view(b, c, h, w)
        return x + block.proj_out(seen)

    def run_middle(mid, x):
        one, two, three = list(mid) if layout == "llamagen" else (mid.block_1, mid.attn_1, mid.block_2)
        return run_residual(three, run_attention(two, run_residual(one, x)))

    def run_level(one, x):
        for i, block in enumerate(one.res if layout == "llamagen" else one.block):
            x = run_residual(block, x)
            if len(one.attn):
                x = run_attention(one.attn[i], x)
        return x

    def encode(x):
        x = net.encoder.conv_in(2 * x - 1)
        for one in downs:
            x = run_level(one, x)
            if hasattr(one, "downsample"):
                x = one.downsample.conv(pad(x, (0, 1, 0, 1)))
        x = net.encoder.conv_out(silu(net.encoder.norm_out(run_middle(net.encoder.mid, x))))
        return net.quant_conv(x)

    def decode(z):
        x = run_middle(net.decoder.mid, net.decoder.conv_in(net.post_quant_conv(z)))
        for one in ups:
            x = run_level(one, x)
            if hasattr(one, "upsample"):
                x = one.upsample.conv(interpolate(x, scale_factor=2.0, mode="nearest"))
        return (net.decoder.conv_out(silu(net.decoder.norm_out(x))) + 1) / 2

    return net, encode, decode


@pytest.mark.parametrize("layout", ["llamagen", "taming", "var"])
@torch.no_grad()
def test_published_weights_give_what_the_published_network_gives(layout):
    torch.manual_seed(0)
    scales = (1, 2, 3, 4) if layout == "var" else ()
    net, encode, decode = published(layout, scales=scales)
    norm_of = {"llamagen": "both", "taming": "none", "var": "none"}[layout]
    recipe = VQGAN(
        16, 8, (1, 1, 2), BLOCKS, CHANNELS, 3 if scales else 1, 32, 4, norm_of, scales, 4 if scales else 0, None
    )
    model = recipe.build().eval()
    model.load_published(net.state_dict())
    x = torch.rand(2, 3, 16, 16)
    latents = encode(x)
    torch.testing.assert_close(model.latents(x), latents.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)
    codes = model.encode(x)
    z = codes.z.transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(model.render(codes.z), decode(z), atol=1e-5, rtol=1e-5)
    if layout == "taming":
        table = net.quantize.embedding.weight
        nearest = torch.cdist(latents.flatten(2).transpose(1, 2), table.expand(2, -1, -1)).argmin(-1)
        assert torch.equal(codes.ids, nearest)
    if layout == "var":
        assert codes.ids.shape == (2, 1 + 4 + 9 + 16) and model.tokens == 16


def test_weights_of_another_size_are_refused():
    net, _, _ = published("llamagen")
    state = net.state_dict()
    state.pop("quant_conv.bias")
    model = VQGAN(16, 8, (1, 1, 2), BLOCKS, CHANNELS, 1, 32, 4, restart_after=None).build()
    with pytest.raises(ValueError, match=r"state: lacks \['down.bias'\]"):
        model.load_published(state)


def test_bad_sizes():
    with pytest.raises(ValueError, match="image: got 18, must be a multiple of 4"):
        VQGAN(18, 8, (1, 1, 2), 1, 8, 1, 32, 4).build()
    with pytest.raises(ValueError, match=r"scales: got \(1, 2\), the last must be 4"):
        VQGAN(16, 8, (1, 1, 2), 1, 8, 1, 32, 4, scales=(1, 2)).build()


def test_the_claim_runs():
    outcome = claim(TokenizeTrial(pictures=4, size=32), steps=1)
    assert outcome.metric and outcome.baseline > 0 and outcome.value > 0
