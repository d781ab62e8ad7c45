"""Exchanging what mixes in a diffusion transformer, and putting it back."""

from __future__ import annotations

import pytest
import torch

from vistok.core.flow import MING
from vistok.parts.diffusion_transformer import DiffusionTransformer, plain_attention
from vistok.parts.mixed_attention import MixedAttention, dense, mixing, projections, velocity_error, velocity_loss


def net(attention=MixedAttention):
    torch.manual_seed(0)
    made = DiffusionTransformer(1, 1, 16, 2, 2, attention)
    torch.nn.init.normal_(made.head.weight)
    for block in made.blocks:
        torch.nn.init.normal_(block.modulation.weight, std=0.1)
    return made


X, T = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0.2, 0.7])


def test_as_the_plain_one():
    mixed, plain = net(), net(plain_attention)
    plain.load_state_dict(mixed.state_dict())
    torch.testing.assert_close(mixed(X, T), plain(X, T))


def test_what_mixes_is_exchanged_and_comes_back():
    made, sizes = net(), []

    def first(q, k, v, size):
        sizes.append(size)
        return v[:, :, :1].expand_as(v)

    before = made(X, T)
    with pytest.raises(KeyError), mixing(made, [first, first]):
        assert not torch.allclose(made(X, T), before)
        raise KeyError
    assert sizes == [(3, 4)] * 2 and torch.equal(made(X, T), before)
    assert velocity_error(made, X, T, [dense, dense]) == 0 < velocity_error(made, X, T, [dense, first])
    with pytest.raises(ValueError, match="mixes: got 1, must be one for each of 2"), mixing(made, [first]):
        pass


def test_projections_are_those_of_each_layer():
    made = net()
    found = projections(made, X, T)
    assert len(found) == 2 and all(x.shape == (2, 2, 12, 8) and not x.requires_grad for seen in found for x in seen)
    made.blocks[1].attention.qkv.weight.data.mul_(2)
    again = projections(made, X, T)
    assert torch.equal(found[0][0], again[0][0]) and not torch.equal(found[1][0], again[1][0])


def test_velocity_loss():
    """A network of zeros misses by the whole velocity, whose mean square is that of noise plus that of the data."""
    still = torch.nn.Module()
    still.forward = lambda x, t: torch.zeros_like(x)
    losses = [velocity_loss(still, torch.ones(4000, 1, 2, 2), torch.Generator().manual_seed(0), f) for f in (MING,) * 2]
    assert losses[0] == losses[1] and abs(losses[0].item() - 2) < 0.05
