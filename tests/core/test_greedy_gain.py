"""Extensions of the greedy selections against brute force: a start that isolates, weights, qualities far apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.core import oracle
from tests.core.oracle import Case, cases
from vistok.core import greedy
from vistok.core.score import cosine


def isolated(x, real, distance):
    """The real token whose nearest other real one is farthest; a lone token is."""
    gap = lambda i: min((distance(x[i], x[j]) for j in real if j != i), default=float("inf"))  # noqa: E731
    return oracle.best(real, gap)


def weighted(x, real, k, start, distance, weight):
    picks = [start][:k]
    while len(picks) < k:
        left = [i for i in real if i not in picks]
        picks.append(oracle.best(left, lambda i: weight[i] * min(distance(x[i], x[p]) for p in picks)))
    return picks


@given(cases(), st.integers(0, 3))
def test_starts_at_the_most_isolated(case: Case, small: int):
    """``small``: with few tokens as the most of which the Gram matrix is held, the panels are used instead."""
    if not case.k:
        return
    whole, greedy.WHOLE = greedy.WHOLE, small
    try:
        picks = greedy.farthest_points(case.x, case.k, "isolated", mask=case.mask)
    finally:
        greedy.WHOLE = whole
    assert torch.equal(picks, greedy.farthest_points(case.x, case.k, "isolated", mask=case.mask))
    for b, row in enumerate(picks.tolist()):
        x, real = case.x[b].tolist(), case.real(b)
        assert row == oracle.farthest(x, real, case.k, isolated(x, real, oracle.squared), oracle.squared)


@given(cases(exact_cosines=True))
def test_starts_at_the_most_isolated_by_cosine(case: Case):
    if case.k:
        x = case.x.masked_fill((case.x == 0).all(2, keepdim=True), 1)  # a zero row has no direction
        picks = greedy.farthest_points(x, case.k, "isolated", "cosine", case.mask)
        for b, row in enumerate(picks.tolist()):
            assert row[0] == isolated(x[b].tolist(), case.real(b), lambda p, q: 1 - oracle.cosine(p, q))


def test_panels_of_many_tokens(monkeypatch):
    x = torch.randn(2, 1100, 5, dtype=torch.float64)
    apart = torch.cdist(x, x) + torch.diag(torch.full((1100,), torch.inf))
    monkeypatch.setattr(greedy, "WHOLE", 100)
    assert torch.equal(greedy.farthest_points(x, 1, "isolated")[:, 0], apart.amin(2).argmax(1))


@given(cases(exact_cosines=True), st.integers(0, 2))
def test_weight_multiplies_the_distance(case: Case, most: int):
    if not case.k:
        return
    weight = case.whole(*case.mask.shape, low=0, high=most + 2)
    distance = lambda p, q: 1 - oracle.cosine(p, q)  # noqa: E731
    x = case.x.masked_fill((case.x == 0).all(2, keepdim=True), 1)
    start = torch.tensor([case.real(b)[-1] for b in range(len(x))])
    for metric, apart in (("cosine", distance), ("euclidean", oracle.squared)):
        picks = greedy.farthest_points(x, case.k, start, metric, case.mask, weight)
        for b, row in enumerate(picks.tolist()):
            assert row == weighted(x[b].tolist(), case.real(b), case.k, int(start[b]), apart, weight[b].tolist())


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_duplicates_of_picks_come_last_whatever_their_weight(metric):
    """In float32, where the distance of equal rows is not exactly 0."""
    x = torch.randn(1, 6, 700).repeat(1, 3, 1) + 1
    weight = torch.rand(1, 18) + 0.01
    weight[:, 6:] *= 1e9
    picks = greedy.farthest_points(x, 18, torch.tensor([3]), metric, weight=weight)[0]
    assert sorted((picks[:6] % 6).tolist()) == list(range(6))


def test_equal_weights_change_nothing():
    x = torch.randn(3, 40, 8)
    plain = greedy.farthest_points(x, 20, metric="cosine")
    assert torch.equal(plain, greedy.farthest_points(x, 20, metric="cosine", weight=torch.ones(3, 40)))


def test_wrong_starts_and_weights_are_named():
    x = torch.randn(2, 5, 3)
    with pytest.raises(ValueError, match="start"):
        greedy.farthest_points(x, 2, "middle")
    for weight in (torch.ones(2, 4), -torch.ones(2, 5)):
        with pytest.raises(ValueError, match="weight"):
            greedy.farthest_points(x, 2, weight=weight)


def test_dpp_of_qualities_far_apart():
    """Volumes that are small because the quality is, not because of rounding, still count; in float32."""
    x = torch.eye(40)[None] + 0.1 * torch.randn(1, 40, 40)
    quality = torch.logspace(0, -5, 40)[torch.randperm(40)][None]
    kernel = greedy_kernel(x.double(), quality.double())
    picks = greedy.greedy_dpp_features(x, 40, quality)
    assert torch.equal(picks, greedy.greedy_dpp(kernel, 40))
    chosen = picks[0, :30].tolist()
    volume = [torch.linalg.det(kernel[0][[*chosen, i]][:, [*chosen, i]]).item() for i in range(40)]
    assert int(picks[0, 30]) == oracle.best([i for i in range(40) if i not in chosen], volume.__getitem__)


def greedy_kernel(x, quality):
    return quality[:, :, None] * quality[:, None] * cosine(x)
