"""STViT with super tokens: what its sheet says must hold, the backbone and the claim."""

from __future__ import annotations

import pytest
import torch

from tests.vit.made_trial import MadeTrial
from vistok.core.supertoken import associate
from vistok.vit.stvit_supertoken import (
    MapAttention,
    SuperTokenAttention,
    SuperTokenBlock,
    SuperTokens,
    SuperTokenViT,
    claim,
)


def test_equal_to_a_dense_matrix():
    """``Qd A (Qd^T X / column sums)`` with the association written out as a matrix of all pixels and cells."""
    torch.manual_seed(0)
    attention = SuperTokenAttention(8, 2, (3, 2)).double()
    x = torch.randn(1, 8, 6, 6).double()
    _, found = associate(x, (3, 2))
    h, w = found.grid
    dense = torch.zeros(36, h * w).double()
    for cell in range(h * w):
        for pixel in range(6):
            y, z = cell // w * 3 + pixel // 2, cell % w * 2 + pixel % 2
            for n in range(9):
                i, j = cell // w + n // 3 - 1, cell % w + n % 3 - 1
                if 0 <= i < h and 0 <= j < w:
                    dense[y * 6 + z, i * w + j] = found.weights[0, cell, pixel, n]
    tokens = (dense.T @ x.flatten(2)[0].T) / dense.sum(0)[:, None]
    mixed = attention.stoken_refine(tokens.T.view(1, 8, h, w)).flatten(2)[0].T
    torch.testing.assert_close(attention(x), (dense @ mixed).T.view(1, 8, 6, 6))


def test_weights_sum_to_one():
    _, found = associate(torch.randn(2, 8, 10, 13), (4, 3), 2)
    torch.testing.assert_close(found.weights.sum(3), torch.ones(found.weights.shape[:3]))


def test_constant_map_without_refinement():
    x = torch.full((1, 4, 15, 15), 0.5)
    y = SuperTokenAttention(4, 1, (3, 3), refine=False)(x)
    torch.testing.assert_close(y[:, :, 3:12, 3:12], x[:, :, 3:12, 3:12])
    assert (y[:, :, :3] < x[:, :, :3]).all() and (y[:, :, :, 12:] < 0.5).all()


def test_cells_of_one_pixel_are_plain_attention():
    """And that is multi-head attention with query, key and value of a head side by side."""
    torch.manual_seed(0)
    attention = SuperTokenAttention(8, 2, (1, 1), qkv_bias=True)
    x = torch.randn(2, 8, 3, 5)
    plain = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    order = [head * 12 + part * 4 + i for part in range(3) for head in range(2) for i in range(4)]
    with torch.no_grad():
        plain.in_proj_weight.copy_(attention.stoken_refine.qkv.weight[order, :, 0, 0])
        plain.in_proj_bias.copy_(attention.stoken_refine.qkv.bias[order])
        plain.out_proj.weight.copy_(attention.stoken_refine.proj.weight[:, :, 0, 0])
        plain.out_proj.bias.copy_(attention.stoken_refine.proj.bias)
    rows = x.flatten(2).transpose(1, 2)
    expected = plain(rows, rows, rows, need_weights=False)[0].transpose(1, 2).view_as(x)
    torch.testing.assert_close(attention(x), expected)


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (8, 8), (7, 3)])
def test_any_size(size):
    x = torch.randn(2, 8, *size)
    assert SuperTokenAttention(8, 2, (4, 4), 2)(x).shape == x.shape


def test_fewer_tokens_attend():
    seen = []
    attention = SuperTokenAttention(8, 2, (4, 4))
    attention.stoken_refine.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    attention(torch.randn(1, 8, 16, 12))
    assert seen == [(1, 8, 4, 3)]


def test_block_with_layer_scale_starts_at_its_position():
    """Scales of 0 leave the position's convolution alone; gradients reach everything but the association."""
    block = SuperTokenBlock(8, 2, (2, 2), layer_scale=0.0).eval()
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(block(x), block.pos_embed(x))
    block = SuperTokenBlock(8, 2, (2, 2), layer_scale=0.1, drop_path=0.2)
    block(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


def test_backbone():
    system = SuperTokens((8, 16, 16), (1, 2, 1), (1, 2, 2), (4, 2, 1), projection=24)
    model = system.build(7).eval()
    x = torch.randn(3, 3, 40, 56)
    assert model.forward_features(x).shape == (3, 16, 3, 4)
    assert model(x).shape == (3, 7)
    torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=1e-4, atol=1e-5)


def test_default_is_the_small_model_of_the_paper():
    with torch.device("meta"):
        model = SuperTokens().build()
    assert 24e6 < sum(p.numel() for p in model.parameters()) < 26e6  # the authors' README: 25M


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="heads: got 3, must divide dim, 8"):
        MapAttention(8, 3)
    with pytest.raises(ValueError, match=r"dims, depths, heads, cells: got \(2, 1, 2, 2\)"):
        SuperTokenViT(2, (8, 8), (1,), (1, 1), (1, 1))


def test_claim():
    trial = MadeTrial(0.2, 0.3, size=96)
    outcome = claim(trial, steps=2)
    assert (outcome.baseline, outcome.value, outcome.holds) == (0.2, 0.3, True)
    assert all(len(losses) == 2 for _, losses in trial.trained)
    assert not claim(MadeTrial(0.3, 0.2, size=96), steps=1).holds
