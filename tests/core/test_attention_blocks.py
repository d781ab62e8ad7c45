"""Orders along curves, and blocks of tokens."""

from __future__ import annotations

import itertools

import pytest
import torch

from vistok.core.attention.blocks import block_mean, block_sizes, random_blocks, similar_blocks, top_blocks
from vistok.core.attention.curves import hilbert_order, z_order

SHAPES = [(7,), (1, 1), (5, 4), (2, 9), (4, 4, 4), (3, 5, 7), (2, 6, 10), (13, 4, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_hilbert_steps_to_neighbours(shape):
    order = hilbert_order(shape)
    n = torch.tensor(shape).prod()
    assert torch.equal(order.order.sort().values, torch.arange(n))
    points = torch.stack(torch.unravel_index(order.order, shape), 1)
    steps = (points[1:] - points[:-1]).abs()
    assert not len(steps) or steps.max() == 1
    if all(length % 2 == 0 for length in shape):
        assert bool((steps.sum(1) == 1).all())
    x = torch.randn(2, 3, int(n), 4)
    assert torch.equal(order.unpermute(order.permute(x)), x)


def test_runs_of_a_hilbert_curve_are_compact():
    """64 side by side in a cube of 16 reach less far than a raster's, or than any line's."""
    points = torch.stack(torch.unravel_index(hilbert_order((16, 16, 16)).order, (16, 16, 16)), 1).view(64, 64, 3)
    assert (points.amax(1) - points.amin(1)).float().mean() < 5.5


def test_runs_of_a_z_order_are_squares():
    order = z_order(16, 8)
    places = torch.arange(128).view(16, 8).flatten()[order.order]
    for bits in (1, 2, 3):
        for run in places.split(4**bits):
            y, x = run // 8, run % 8
            assert int(y.max() - y.min()) == int(x.max() - x.min()) == 2**bits - 1
    assert torch.equal(order.order[order.inverse], torch.arange(128))
    assert z_order(2, 2).order.tolist() == [0, 1, 2, 3] and z_order(4, 4).order.tolist()[:8] == [0, 1, 4, 5, 2, 3, 6, 7]
    assert torch.equal(z_order(3, 5).order, torch.arange(15))


def test_means_and_sizes():
    x = torch.randn(2, 3, 10, 4)
    expected = torch.stack([part.mean(2) for part in x.split(4, 2)], 2)
    torch.testing.assert_close(block_mean(x, 4), expected)
    assert block_sizes(10, 4).tolist() == [4, 4, 2] and block_sizes(8, 4).tolist() == [4, 4]
    low = torch.full((1, 1, 4096, 1), 1.001).bfloat16()
    assert block_mean(low, 4096).item() == low[0, 0, 0, 0].item()  # a sum in bfloat16 would stop at 256


def test_best_blocks():
    scores = torch.tensor([[[[1.0, 3, 3, 2], [0, 0, 0, 0]]]])
    assert top_blocks(scores, 2).tolist() == [[[[False, True, True, False], [True, True, False, False]]]]
    q, k = torch.randn(2, 2, 3, 9, 4)
    means = [torch.stack([part.mean(2) for part in x.split(4, 2)], 2) for x in (q, k)]
    best = (means[0] @ means[1].transpose(2, 3)).argmax(3, keepdim=True)
    chosen = similar_blocks(q, k, 4, 1)
    assert chosen.shape == (2, 3, 3, 3) and torch.equal(chosen, torch.zeros_like(chosen).scatter(3, best, True))
    drawn = [random_blocks(q, k, 4, 2, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert bool((drawn[0].sum(3) == 2).all())


def test_what_does_not_fit_is_said():
    for shape in itertools.chain([()], [(0, 3)], [(1, 2, 3, 4)]):
        with pytest.raises(ValueError, match="shape: got"):
            hilbert_order(shape)
    with pytest.raises(ValueError, match="height, width: got 0, 4"):
        z_order(0, 4)
    with pytest.raises(ValueError, match="keep: got 5, must be 1 to the 4 blocks"):
        top_blocks(torch.zeros(1, 1, 1, 4), 5)
