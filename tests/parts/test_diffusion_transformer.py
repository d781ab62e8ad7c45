"""The small diffusion transformer: shapes, adaLN-zero, attention that can be exchanged, and that it learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vistok.core.flow import NOISE_FIRST
from vistok.parts.diffusion_transformer import (
    DiffusionTransformer,
    ModulatedBlock,
    SelfAttention,
    grid_sinusoids,
    plain_attention,
    unpatch,
)


def net(**how):
    torch.manual_seed(0)
    return DiffusionTransformer(2, 2, 16, 2, 2, **how)


def awake(model):
    """With weights that are not zero."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


def test_velocity_is_of_the_pictures_shape_and_zero_before_training():
    x, t = torch.randn(3, 2, 8, 12), torch.rand(3)
    assert torch.equal(net()(x, t), torch.zeros_like(x))
    assert awake(net())(x, t).shape == x.shape


def test_a_new_block_is_the_identity():
    block = ModulatedBlock(16, plain_attention(16, 2))
    x = torch.randn(2, 12, 16)
    assert torch.equal(block(x, (3, 4), torch.randn(2, 16)), x)


def test_pictures_of_a_batch_do_not_see_one_another_and_their_times_matter():
    model, x, t = awake(net()), torch.randn(3, 2, 4, 4), torch.tensor([0.1, 0.5, 0.9])
    out = model(x, t)
    torch.testing.assert_close(out[1:2], model(x[1:2], t[1:2]))
    assert not torch.allclose(out[1:2], model(x[1:2], t[2:]), atol=1e-3)


def test_attention_is_called_once_a_block_with_the_grid():
    seen = []

    class Seen(SelfAttention):
        def forward(self, x, size=None):
            seen.append((tuple(x.shape), size))
            return super().forward(x, size)

    model = net(attention=lambda width, heads: Seen(width, heads, qkv_bias=True))
    x, t = torch.randn(1, 2, 4, 6), torch.rand(1)
    model.load_state_dict(net().state_dict())
    assert awake(model)(x, t).shape == x.shape
    assert seen == [((1, 6, 16), (2, 3))] * 2


def test_places_differ_and_axes_are_apart():
    found = grid_sinusoids((3, 4), 18)
    assert found.shape == (12, 18) and len(found.unique(dim=0)) == 12 and bool((found[:, 16:] == 0).all())
    table = found.view(3, 4, 18)
    assert bool((table[:, :1, :8] == table[:, :, :8]).all()) and bool((table[:1, :, 8:] == table[:, :, 8:]).all())
    with pytest.raises(ValueError, match="dim: got 3"):
        grid_sinusoids((3, 4), 3)


def test_patches_return_to_their_places():
    x = torch.randn(2, 3, 4, 6)
    cut = x.unfold(2, 2, 2).unfold(3, 2, 2)  # (B, C, h, w, row, column)
    assert torch.equal(unpatch(cut.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2), (2, 3), 2), x)


def test_pictures_that_do_not_fit_are_said():
    with pytest.raises(ValueError, match="x: got 5 x 4 pixels"):
        net()(torch.randn(1, 2, 5, 4), torch.rand(1))


def test_it_learns():
    model, rng = net(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(120):
        data = torch.ones(16, 2, 4, 4) * torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
        noise, t = torch.randn(data.shape, generator=rng), torch.rand(16, generator=rng)
        found = NOISE_FIRST.velocity(model(NOISE_FIRST.mix(data, noise, t), t))
        loss = NOISE_FIRST.loss(found, NOISE_FIRST.target(data, noise))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.35 * sum(losses[:10])
