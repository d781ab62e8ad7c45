"""The counts of the simulator against dense masks cut into tiles, and the published cases."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.test_pattern import axes
from vistok.core.attention import GridWindow, TileOrder, best_stride, best_window, simulate
from vistok.core.attention.simulate import tile_map


def tiled(pattern, query_tile, key_tile):
    """(tiles of queries, tile, tiles of keys, tile) of the dense mask, and which queries are real (tiles, tile).

    Tiles of padding alone are left out."""
    sides = []
    for tile in (query_tile, key_tile):
        order = TileOrder.of(pattern.shape, tile, pattern.dilation).order.view(-1, math.prod(tile))
        sides.append(order[(order >= 0).any(1)])
    rows, columns = sides
    seen = pattern.to_dense()[0, 0][rows.clamp_min(0).flatten()][:, columns.clamp_min(0).flatten()]
    seen = seen & (columns >= 0).flatten() & (rows >= 0).flatten()[:, None]
    return seen.view(*rows.shape, *columns.shape), rows >= 0


@given(st.lists(st.tuples(axes(most=7), st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=2))
def test_counts_are_those_of_the_dense_mask(grid):
    windows, query_tile, key_tile = zip(*grid, strict=True)
    pattern = GridWindow(*zip(*windows, strict=True))
    found = simulate(pattern, query_tile, key_tile)
    seen, real = tiled(pattern, query_tile, key_tile)
    visited = seen.any(3).any(1)
    whole = (seen | ~real[:, :, None, None]).all(3).all(1)
    assert (found.query_tiles, found.key_tiles) == visited.shape
    assert found.visited == int(visited.sum())
    assert found.partial == int((visited & ~whole).sum())
    padding = visited.numel() * math.prod(query_tile) * math.prod(key_tile) / math.prod(pattern.shape) ** 2
    assert found.bound <= found.flop_bound * padding * (1 + 1e-9)
    if not any(pattern.causal):
        assert found.flop_bound == pytest.approx(math.prod(pattern.shape) / math.prod(pattern.kernel))
    if bool(real.all()):
        assert found.perfect == (found.bound == pytest.approx(found.flop_bound * padding))


@given(axes(), st.integers(1, 4), st.integers(1, 4))
def test_map_of_tiles_adds_up(axis, query_tile, key_tile):
    pattern = GridWindow(*((value,) for value in axis))
    some, whole = tile_map(pattern.axes[0], query_tile, key_tile)
    found = simulate(pattern, query_tile, key_tile)
    assert found.visited == int(some.sum()) and found.partial == int((some & ~whole).sum())


@pytest.mark.parametrize(("query_tile", "bound"), [(128, 15.11), (256, 14.32)])
def test_published_case_of_one_axis(query_tile, bound):
    """L = 32,768, k = 2,048: 256 is the smallest stride (a power of two) without a masked tile; its bound is 16."""
    found = {s: simulate(GridWindow((32768,), 2048, s), query_tile, 128) for s in (2**e for e in range(12))}
    assert found[1].partial == 480 and found[1].bound == pytest.approx(bound, abs=0.005)
    assert min(s for s, one in found.items() if one.perfect) == 256
    assert found[256].bound == 16 == found[256].flop_bound


@given(axes(), st.integers(1, 4), st.integers(1, 4))
def test_best_stride_is_the_first_of_the_best(axis, query_tile, key_tile):
    length, kernel, _, dilation, causal = axis
    every = [
        simulate(GridWindow((length,), kernel, s, dilation, causal), query_tile, key_tile) for s in range(1, kernel + 1)
    ]
    ranks = [(one.visited, one.partial) for one in every]
    assert best_stride((length,), kernel, query_tile, key_tile, dilation, causal) == (1 + ranks.index(min(ranks)),)


def test_best_stride_is_chosen_for_each_axis():
    assert best_stride((32, 24), (16, 8), (8, 8), (8, 8)) == (
        *best_stride((32,), 16, 8, 8),
        *best_stride((24,), 8, 8, 8),
    )


def test_best_window_fills_the_density_with_whole_tiles():
    found = best_window((32, 32), 0.25, 8, 8)
    assert simulate(found, 8, 8).perfect and found.density == 0.25 and found.kernel == (16, 16)
    odd = best_window((30, 48, 80), 0.1, (4, 4, 8), (4, 4, 8))
    assert odd.density <= 0.1
    with pytest.raises(ValueError, match=r"density: got 0\.01, must be at least 0.0625"):
        best_window((32, 32), 0.01, 8, 8)
