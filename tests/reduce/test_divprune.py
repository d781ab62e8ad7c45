"""DivPrune against a plain max-min greedy, and the guarantee of its theory."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from tests.reduce.synthetic import Trial
from vistok.host.reducer import Evidence
from vistok.reduce import divprune
from vistok.reduce.divprune import DivPrune


def evidence(seed=0, b=2, n=14, d=5, **more):
    g = torch.Generator().manual_seed(seed)
    return Evidence(**({"features": torch.randn(b, n, d, generator=g, dtype=torch.float64)} | more))


def distances(x):
    return 1 - normalize(x, dim=1) @ normalize(x, dim=1).T


def plain(x, keep):
    """First the token whose second smallest distance (the smallest is its own) is largest, then max-min."""
    apart, chosen = distances(x), []
    while len(chosen) < keep:
        free = [j for j in range(len(x)) if j not in chosen]
        gap = lambda j: float(apart[j, chosen].min() if chosen else apart[j].sort().values[1])  # noqa: E731
        chosen.append(max(free, key=lambda j: (gap(j), -j)))
    return chosen


@settings(max_examples=30)
@given(st.integers(0, 9999), st.integers(1, 13))
def test_same_picks_as_plain_greedy(seed, keep):
    seen = evidence(seed)
    picks = DivPrune().select(seen, keep)
    for i in range(2):
        assert picks[i].tolist() == plain(seen.features[i], keep)
    assert torch.equal(DivPrune().reduce(seen, keep).keep, picks.sort(1).values)


@pytest.mark.parametrize("keep", [2, 3, 4])
def test_closest_pair_is_half_as_far_as_the_best_or_more(keep):
    """In chords, which are a metric: |u - v|^2 = 2 (1 - cosine)."""
    for seed in range(5):
        seen = evidence(seed, b=1, n=10)
        chord = distances(seen.features[0]).clamp_min(0).sqrt()
        closest = lambda chosen: min(float(chord[i, j]) for i, j in combinations(chosen, 2))  # noqa: B023, E731
        best = max(closest(s) for s in combinations(range(10), keep))
        assert closest(DivPrune().select(seen, keep)[0].tolist()) >= best / 2


def test_a_larger_budget_keeps_a_superset():
    sets = [{*DivPrune().reduce(evidence(), keep).keep[0].tolist()} for keep in range(1, 15)]
    assert all(small < large for small, large in pairwise(sets))


def test_duplicates_are_kept_last():
    x = evidence(n=5, d=8).features.float().repeat(1, 3, 1)
    kept = DivPrune().reduce(Evidence(features=x), 5).keep
    assert torch.equal((kept % 5).sort(1).values, torch.arange(5).expand(2, 5))


def test_length_of_the_tokens_does_not_matter():
    seen = evidence()
    longer = evidence(features=seen.features * torch.linspace(0.1, 9, 14)[:, None])
    assert torch.equal(DivPrune().reduce(seen, 6).keep, DivPrune().reduce(longer, 6).keep)


def test_a_zero_vector_is_a_token_like_others():
    x = evidence().features.clone()
    x[:, 4] = 0
    kept = DivPrune().reduce(Evidence(features=x), 6)
    assert kept.keep.shape == (2, 6) and kept.tokens.isfinite().all()


def test_a_cut_picture_is_one_set():
    seen = evidence(n=20)
    cut = evidence(n=20, crops=((2, 4), (3, 4)))
    assert torch.equal(DivPrune().reduce(seen, 6).keep, DivPrune().reduce(cut, 6).keep)


@pytest.mark.parametrize(("diverse", "chance", "holds"), [(0.6, 0.5, True), (0.5, 0.4, False), (0.6, 0.7, False)])
def test_claim(diverse, chance, holds):
    trial = Trial(FasterVLM=0.55, DivPrune=diverse, Random=chance)
    outcome = divprune.claim(trial)
    assert (outcome.baseline, outcome.value, outcome.holds) == (0.55, diverse, holds)
    assert {keep for _, _, keep, _ in trial.calls} == {0.1}
