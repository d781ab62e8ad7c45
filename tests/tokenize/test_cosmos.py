"""Cosmos: its layout, and what it is made of."""

from __future__ import annotations

import pytest
import torch

from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.tokenize.cosmos import Cosmos, claim

SMALL = dict(image=16, patch=2, factor=4, width=8, mults=(1, 2), blocks=1, channels=8, levels=(8, 5, 5))


def published(factor):
    """Names and shapes of a DiscreteImageTokenizer of width 8, levels of 16 and 32 channels, one block each."""
    sizes: dict[str, tuple[int, ...]] = {}

    def conv(name, a, b, k=3):
        sizes[f"{name}.weight"], sizes[f"{name}.bias"] = (b, a, k, k), (b,)

    def residual(name, a, b):
        sizes[f"{name}.norm1.weight"] = sizes[f"{name}.norm1.bias"] = (a,)
        sizes[f"{name}.norm2.weight"] = sizes[f"{name}.norm2.bias"] = (b,)
        conv(f"{name}.conv1", a, b)
        conv(f"{name}.conv2", b, b)
        if a != b:
            conv(f"{name}.nin_shortcut", a, b, 1)

    def middle(net):
        residual(f"{net}.mid.block_1", 32, 32)
        residual(f"{net}.mid.block_2", 32, 32)
        sizes[f"{net}.mid.attn_1.norm.weight"] = sizes[f"{net}.mid.attn_1.norm.bias"] = (32,)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{net}.mid.attn_1.{part}", 32, 32, 1)

    conv("encoder.conv_in", 48, 8)
    residual("encoder.down.0.block.0", 8, 16)
    residual("encoder.down.1.block.0", 16, 32)
    conv("encoder.down.0.downsample.conv", 16, 16)
    conv("decoder.conv_in", 12, 32)
    for i, (a, b) in enumerate(((32, 16), (32, 32))):
        residual(f"decoder.up.{i}.block.0", a, b)
        residual(f"decoder.up.{i}.block.1", b, b)
    conv("decoder.up.1.upsample.conv", 32, 32)
    if factor == 16:
        conv("encoder.down.1.downsample.conv", 32, 32)
        conv("decoder.up.0.upsample.conv", 16, 16)
    for net, width, out in (("encoder", 32, 12), ("decoder", 16, 48)):
        middle(net)
        sizes[f"{net}.norm_out.weight"] = sizes[f"{net}.norm_out.bias"] = (width,)
        conv(f"{net}.conv_out", width, out)
    conv("quant_conv", 12, 6, 1)
    conv("post_quant_conv", 6, 12, 1)
    return {name: torch.randn(size) for name, size in sizes.items()}


@pytest.mark.parametrize("factor", [8, 16])
def test_published_names_fill_the_network(factor):
    model = Cosmos(32, 4, factor, 8, (2, 4), 1, 12).build().eval()
    state = published(factor)
    model.load_published(state)
    own = model.state_dict()
    assert torch.equal(own["encoder.levels.1.0.skip.weight"], state["encoder.down.1.block.0.nin_shortcut.weight"])
    assert torch.equal(own["decoder.levels.1.1.conv1.weight"], state["decoder.up.0.block.1.conv1.weight"])
    assert torch.equal(own["decoder.ups.0.weight"], state["decoder.up.1.upsample.conv.weight"])
    assert torch.equal(own["encoder.middle.1.qkv.bias"][12 * 0 : 32], state["encoder.mid.attn_1.q.bias"])
    assert model.encode(torch.rand(1, 3, 32, 32)).ids.shape == (1, (32 // factor) ** 2)
    state.pop("quant_conv.bias")
    with pytest.raises(ValueError, match=r"state: lacks \['down.bias'\]"):
        model.load_published(state)


def test_the_transform_alone_loses_nothing():
    """With an encoder and decoder that pass the wavelets on, the picture comes back."""
    model = Cosmos(16, 4, 4, 8, (1,), 1, 48, (5, 5)).build()
    model.down = model.up = model.encoder = model.decoder = torch.nn.Identity()  # type: ignore[assignment]
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(model.render(model.latents(x)), x)


def test_bad_sizes():
    for hyper, message in (
        (dict(patch=3), "patch: got 3, must be a power of two"),
        (dict(factor=2, patch=4), "factor: got 2, must be 4 or more"),
        (dict(factor=8, image=20), "factor: got 8, must be 4 or more and divide image, 20"),
        (dict(patches="dct"), "patches: got 'dct'"),
    ):
        with pytest.raises(ValueError, match=message):
            Cosmos(**{"image": 32, "patch": 4, "factor": 8, "mults": (1, 2), **hyper}).build()


def test_the_claim_runs():
    outcome = claim(TokenizeTrial(pictures=4, size=32), steps=1)
    assert outcome.metric and outcome.baseline > 0 and outcome.value > 0
