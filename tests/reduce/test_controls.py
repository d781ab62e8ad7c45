"""The controls: ``random`` is random and repeatable, ``uniform`` and ``pool`` cut any grid into even cells."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.reduce.synthetic import Trial, evidence, rows
from vistok.host.reducer import Evidence
from vistok.reduce import pool, random, uniform
from vistok.reduce.pool import Pool
from vistok.reduce.random import Random
from vistok.reduce.uniform import Uniform


def picture(h, w, batch=1, d=1):
    generator = torch.Generator().manual_seed(h * w)
    return Evidence(features=torch.randn(batch, h * w, d, generator=generator), grid=(h, w))


def test_random_is_the_same_in_every_batch_and_another_with_another_seed():
    given = evidence(Random(), batch=3)
    batch = Random(seed=3).reduce(given, 20).keep
    for i in range(3):
        assert torch.equal(Random(seed=3).reduce(rows(given, [i]), 20).keep[0], batch[i])
    assert not torch.equal(Random(seed=4).reduce(given, 20).keep, batch)


def test_random_hits_every_token_alike():
    """400 draws of 16 of 64: each token 100 times, with a standard deviation of 8.7."""
    given = picture(8, 8)
    hits = torch.zeros(64)
    for seed in range(400):
        hits[Random(seed).reduce(given, 16).keep[0]] += 1
    assert hits.sum() == 6400 and 60 < hits.min() and hits.max() < 140
    assert 6 < hits.std() < 11


def test_random_with_a_larger_budget_keeps_a_superset():
    given = picture(6, 10)
    sets = [{*Random().reduce(given, keep).keep[0].tolist()} for keep in range(1, 61)]
    assert all(small < large for small, large in pairwise(sets))


def test_random_draws_over_the_parts_of_a_picture_together():
    kept = Random().reduce(evidence(Random(), crops=((8, 8),) * 4), 64).keep[0]
    places = [{*(kept[kept // 64 == part] % 64).tolist()} for part in range(4)]
    assert len({frozenset(p) for p in places}) == 4 and sum(map(len, places)) == 64


@given(st.integers(1, 14), st.integers(1, 14), st.data())
def test_cells_cut_any_grid_into_any_number(h, w, data):
    """Each cell is a rectangle around its anchor, and none is more than 3 times as large as another."""
    keep = data.draw(st.integers(1, h * w))
    given = picture(h, w)
    merged = Pool().reduce(given, keep)
    assert torch.equal(merged.keep, Uniform().reduce(given, keep).keep)
    sizes = merged.source[0].bincount(minlength=keep)
    assert len(sizes) == keep and 1 <= sizes.min() and sizes.max() <= 3 * sizes.min()
    for slot, anchor in enumerate(merged.keep[0].tolist()):
        places = (merged.source[0] == slot).nonzero()[:, 0]
        up, across = places // w, places % w
        assert (up.max() - up.min() + 1) * (across.max() - across.min() + 1) == len(places)
        assert up.min() <= anchor // w <= up.max() and across.min() <= anchor % w <= across.max()
        assert abs(2 * (anchor // w) - int(up.min() + up.max())) <= 1
        assert abs(2 * (anchor % w) - int(across.min() + across.max())) <= 1


@pytest.mark.parametrize(("grid", "window"), [((24, 24), 2), ((24, 24), 3), ((6, 10), 2), ((9, 6), 3), ((8, 4), 4)])
def test_pool_is_average_pooling_where_the_window_divides_the_grid(grid, window):
    h, w = grid
    given = picture(h, w, batch=2, d=5)
    image = given.features.transpose(1, 2).unflatten(2, grid)
    expected = torch.nn.functional.avg_pool2d(image, window).flatten(2).transpose(1, 2)
    torch.testing.assert_close(Pool().reduce(given, h * w // window**2).tokens, expected)


@pytest.mark.parametrize("keep", [1, 7, 29, 58, 64, 128, 192, 288, 500])
def test_pool_loses_nothing(keep):
    given = picture(24, 24, batch=2, d=5)
    reduction = Pool().reduce(given, keep)
    size = torch.stack([source.bincount(minlength=keep) for source in reduction.source]).unsqueeze(2)
    assert bool((reduction.source >= 0).all())
    torch.testing.assert_close((size * reduction.tokens).sum(1), given.features.sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep", [29, 64, 144, 192, 300, 432])
def test_uniform_is_as_dense_in_every_part_of_the_picture(keep):
    kept = torch.zeros(576).index_fill(0, Uniform().reduce(picture(24, 24), keep).keep[0], 1.0).view(24, 24)
    for half in (kept[:12], kept[12:], kept[:, :12], kept[:, 12:]):
        assert abs(float(half.sum()) / keep - 0.5) <= 1 / 8


def test_tokens_without_a_grid_are_one_row():
    given = Evidence(features=torch.arange(12.0).view(1, 12, 1))
    assert Uniform().reduce(given, 4).keep.tolist() == [[1, 4, 7, 10]]
    assert Pool().reduce(given, 4).tokens.flatten().tolist() == [1, 4, 7, 10]


@pytest.mark.parametrize(("module", "name"), [(random, "Random"), (uniform, "Uniform")])
def test_claim_is_a_quarter_of_the_evidence(module, name):
    assert module.claim(Trial(**{name: 0.29})).holds and module.claim(Trial(**{name: 0.21})).holds
    assert not module.claim(Trial(**{name: 0.31})).holds
    outcome = module.claim(trial := Trial(**{name: 0.19}))
    assert not outcome.holds and outcome.baseline == 0.25 and outcome.value == pytest.approx(0.19)
    assert {call[0] for call in trial.calls} == {"evidence_recall"}


def test_claim_of_pool_is_to_beat_uniform():
    assert pool.claim(Trial(Pool=0.6, Uniform=0.5)).holds
    assert not pool.claim(Trial(Pool=0.4, Uniform=0.5)).holds
