"""Counts for methods that let all tokens into the decoder's first layers, against exhaustive search."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vistok.core.stages import stages_from_all

PYRAMID = ((0.25, 0.5, 0.75), (1, 0.5, 0.25))


def spent(stages, limit, num_layers):
    """Tokens added up over the layers."""
    now, total = limit, 0
    for layer in range(num_layers):
        now = stages.get(layer, now)
        total += now
    return total


def test_published_counts():
    """PyramidDrop; AdaToken-3D's default; FastV at the mean of its own count; SparseVLM to a token."""
    assert stages_from_all(*PYRAMID, 270, 576, 32) == {8: 288, 16: 144, 24: 72}
    assert stages_from_all((0.25, 0.5, 0.75), (0.8, 0.6, 0.4), 700, 1000, 32) == {8: 800, 16: 600, 24: 400}
    assert stages_from_all((2 / 32,), (1,), 306, 576, 32) == {2: 288}
    assert stages_from_all((1 / 16, 3 / 16, 15 / 32), (300, 200, 110), 188, 576, 32) == {2: 299, 6: 200, 15: 110}


depths = st.lists(st.floats(0, 1), min_size=1, max_size=4, unique=True).map(sorted)
shapes = st.lists(st.floats(0.05, 1), min_size=4, max_size=4).map(lambda s: sorted(s, reverse=True))


@settings(max_examples=50)
@given(depths, shapes, st.integers(1, 40), st.integers(1, 70), st.data())
def test_mean_is_met_within_half_a_token(depths, shape, num_layers, limit, data):
    mean = data.draw(st.integers(1, limit))
    stages = stages_from_all(depths, shape[: len(depths)], mean, limit, num_layers)
    counts = [limit, *stages.values()]
    assert abs(spent(stages, limit, num_layers) / num_layers - mean) < 0.5
    assert counts == sorted(counts, reverse=True) and counts[-1] >= 1
    assert list(stages) == sorted(stages) and all(0 <= layer < num_layers for layer in stages)
    if mean == limit:
        assert not stages
    elif stages:
        first = min(stages)
        assert first * limit <= 0.75 * mean * num_layers
        assert first <= min(math.ceil(depths[0] * num_layers), num_layers - 1)


@pytest.mark.parametrize("num_layers", [4, 6, 9])
@pytest.mark.parametrize("mean", [2, 3, 5, 6, 8])
def test_nearest_to_the_mean_then_to_the_shape(num_layers, mean):
    """Exhaustively, of all falling counts within a token of the real ones that the shape asks for."""
    limit, shape = 9, PYRAMID[1]
    stages = stages_from_all(*PYRAMID, mean, limit, num_layers)
    starts = list(stages)
    lengths = [b - a for a, b in zip(starts, [*starts[1:], num_layers], strict=True)]
    total = mean * num_layers - starts[0] * limit
    low, high = 0.0, limit / shape[-1]
    for _ in range(60):  # the level at which the shape, cut off at the limit, spends what is left
        level = (low + high) / 2
        enough = sum(n * min(limit, level * s) for n, s in zip(lengths, shape, strict=True)) > total
        low, high = (low, level) if enough else (level, high)
    real = [min(limit, high * s) for s in shape]

    def far(counts):
        error = abs(sum(n * c for n, c in zip(lengths, counts, strict=True)) - total)
        return error, sum(n * (c - q) ** 2 for n, c, q in zip(lengths, counts, real, strict=True))

    near = [c for c in product(range(1, limit + 1), repeat=3) if list(c) == sorted(c, reverse=True)]
    near = [c for c in near if all(abs(x - q) <= 1 for x, q in zip(c, real, strict=True))]
    best, ours = min(map(far, near)), far(tuple(stages.values()))
    assert ours[0] == best[0] and ours[1] == pytest.approx(best[1], abs=1e-6)


def test_stages_move_towards_layer_0_together():
    assert list(stages_from_all(*PYRAMID, 192, 576, 32)) == [8, 16, 24]
    assert list(stages_from_all(*PYRAMID, 128, 576, 32)) == [5, 14, 23]
    assert list(stages_from_all(*PYRAMID, 20, 576, 32)) == [0, 11, 21]
    assert stages_from_all((1 / 3,), (1,), 49, 196, 6) == {1: 20}
    assert stages_from_all((1,), (1,), 5, 64, 1) == {0: 5}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"depths": ()}, "depths"),
        ({"depths": (0.5,)}, "depths"),
        ({"depths": (0.5, 0.2)}, "depths"),
        ({"depths": (0.5, 1.2)}, "depths"),
        ({"shape": (0.5, 1)}, "shape"),
        ({"shape": (0.5, 0)}, "shape"),
        ({"mean": 0}, "mean"),
        ({"mean": 11}, "mean"),
        ({"num_layers": 0}, "num_layers"),
    ],
)
def test_wrong_arguments_are_named(change, named):
    right = {"depths": (0.2, 0.5), "shape": (1, 0.5), "mean": 4, "limit": 10, "num_layers": 8}
    with pytest.raises(ValueError, match=f"^{named}: got"):
        stages_from_all(**(right | change))
