"""Super tokens against a dense association matrix built pixel by pixel."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vistok.core.supertoken import Association, add_neighbours, associate, neighbours


def dense(x, cell, iterations):
    """(super tokens (C, m), matrix (padded pixels, m)) of one map ``x`` (C, H, W), every pixel and cell by a loop."""
    c, height, width = x.shape
    ch, cw = cell
    h, w = -(-height // ch), -(-width // cw)
    padded = x.new_zeros(c, h * ch, w * cw)
    padded[:, :height, :width] = x
    pixels = [(y, z) for y in range(h * ch) for z in range(w * cw)]
    tokens = torch.stack(
        [padded[:, i * ch : i * ch + ch, j * cw : j * cw + cw].flatten(1).mean(1) for i in range(h) for j in range(w)],
        1,
    )
    for _ in range(iterations):
        matrix = x.new_zeros(len(pixels), h * w)
        for row, (y, z) in enumerate(pixels):
            logits, cells = [], []
            for i in range(y // ch - 1, y // ch + 2):
                for j in range(z // cw - 1, z // cw + 2):
                    inside = 0 <= i < h and 0 <= j < w
                    cells.append(i * w + j if inside else None)
                    logits.append(float(padded[:, y, z] @ tokens[:, i * w + j]) / math.sqrt(c) if inside else 0.0)
            for cell_number, share in zip(cells, torch.tensor(logits, dtype=x.dtype).softmax(0), strict=True):
                if cell_number is not None:
                    matrix[row, cell_number] = share
        tokens = padded.flatten(1) @ matrix / (matrix.sum(0) + 1e-12)
    return tokens, matrix


SIDE, CELL = st.integers(1, 7), st.integers(1, 4)


@given(SIDE, SIDE, CELL, CELL, st.integers(1, 3), st.integers(0, 99))
def test_equal_to_a_dense_matrix(height, width, ch, cw, iterations, seed):
    x = 2 * torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tokens, association = associate(x, (ch, cw), iterations)
    assert association.grid == tokens.shape[2:]
    back = association.unpool(tokens)
    assert back.shape == x.shape
    for i in range(2):
        expected, matrix = dense(x[i], (ch, cw), iterations)
        torch.testing.assert_close(tokens[i].flatten(1), expected)
        full = (matrix @ expected.T).T.reshape(3, association.grid[0] * ch, -1)[:, :height, :width]
        torch.testing.assert_close(back[i], full)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_add_neighbours_is_the_adjoint_of_neighbours(h, w, seed):
    rng = torch.Generator().manual_seed(seed)
    a = torch.randn(2, 3, h, w, generator=rng, dtype=torch.float64)
    b = torch.randn(2, h * w, 3, 9, generator=rng, dtype=torch.float64)
    left = (neighbours(a).transpose(2, 3) * b).sum()
    torch.testing.assert_close(left, (a * add_neighbours(b, (h, w))).sum())


def test_weights_sum_to_one_over_the_nine_cells():
    _, association = associate(torch.randn(2, 4, 9, 11), (3, 4), 2)
    assert association.weights.shape == (2, 9, 12, 9)
    torch.testing.assert_close(association.weights.sum(3), torch.ones(2, 9, 12))


def test_constant_map_comes_back_whole_but_at_the_border():
    """In the inner cells; the outer ones lose the share that goes beyond the edge."""
    x = torch.full((1, 2, 12, 12), 0.7)
    tokens, association = associate(x, (3, 3))
    torch.testing.assert_close(tokens, torch.full((1, 2, 4, 4), 0.7))
    back = association.unpool(tokens)
    torch.testing.assert_close(back[:, :, 3:9, 3:9], x[:, :, 3:9, 3:9])
    logit = 2 * 0.7 * 0.7 / math.sqrt(2)
    inside = 4 * math.exp(logit) / (4 * math.exp(logit) + 5)  # 4 of the 9 cells of a corner
    torch.testing.assert_close(back[:, :, :3, :3], torch.full((1, 2, 3, 3), 0.7 * inside))


def test_gradient_goes_through_the_pixels_alone():
    x = torch.randn(1, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    tokens, association = associate(x, (2, 3), 2)
    assert not association.weights.requires_grad
    fixed = Association(association.weights, (5, 6), (2, 3))
    (ours,) = torch.autograd.grad(association.unpool(tokens).square().sum(), x)
    (theirs,) = torch.autograd.grad(fixed.unpool(fixed.pool(x)).square().sum(), x)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    x = torch.randn(1, 8, 7, 9).to(dtype)
    tokens, association = associate(x, (3, 3))
    assert tokens.dtype == association.unpool(tokens).dtype == dtype
    expected, _ = associate(x.double(), (3, 3))
    torch.testing.assert_close(tokens.double(), expected, rtol=1e-2, atol=1e-2)


def test_errors_name_the_argument():
    x = torch.randn(1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"cell: got \(0, 2\)"):
        associate(x, (0, 2))
    with pytest.raises(ValueError, match="iterations: got 0"):
        associate(x, (2, 2), 0)
