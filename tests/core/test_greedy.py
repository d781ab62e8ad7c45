"""Greedy set selections against brute force, and the guarantees that their theory gives."""

from __future__ import annotations

from itertools import combinations, pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.core import oracle
from tests.core.oracle import Case, cases
from vistok.core import greedy
from vistok.core.score import cosine
from vistok.core.tensors import unit


def starts(case: Case) -> list[int]:
    """The longest real row of each picture."""
    x = case.x.tolist()
    return [oracle.best(case.real(b), lambda i, b=b: oracle.dot(x[b][i], x[b][i])) for b in range(len(x))]


@given(cases())
def test_farthest_points(case: Case):
    if not case.k:
        assert greedy.farthest_points(case.x, 0, mask=case.mask).shape == (len(case.x), 0)
        return
    for given_start in (True, False):
        first = [case.real(b)[-1] for b in range(len(case.x))] if given_start else starts(case)
        start = torch.tensor(first) if given_start else None
        picks = greedy.farthest_points(case.x, case.k, start, mask=case.mask)
        for b, row in enumerate(picks.tolist()):
            assert row == oracle.farthest(case.x[b].tolist(), case.real(b), case.k, first[b], oracle.squared)


@given(cases(exact_cosines=True))
def test_farthest_points_by_cosine(case: Case):
    if case.k:
        x = case.x.masked_fill((case.x == 0).all(2, keepdim=True), 1)  # a zero row has no direction
        first = torch.tensor([case.real(b)[0] for b in range(len(x))])
        picks = greedy.farthest_points(x, case.k, first, "cosine", case.mask)
        for b, row in enumerate(picks.tolist()):
            distance = lambda p, q: 1 - oracle.cosine(p, q)  # noqa: E731
            assert row == oracle.farthest(x[b].tolist(), case.real(b), case.k, row[0], distance)


def test_farthest_points_radius_is_within_twice_the_optimum():
    x = torch.randn(1, 11, 2, dtype=torch.float64)
    apart = torch.cdist(x[0], x[0])

    def radius(chosen):
        return apart[:, list(chosen)].amin(1).max()

    picks = greedy.farthest_points(x, 4, torch.tensor([3]))[0].tolist()
    assert picks[0] == 3
    assert radius(picks) <= 2 * min(radius(c) for c in combinations(range(11), 4)) + 1e-9


@given(cases(exact_cosines=True))
def test_max_sum(case: Case):
    if not case.k:
        assert greedy.max_sum(case.x, 0, mask=case.mask).shape == (len(case.x), 0)
        return
    first = torch.tensor([case.real(b)[len(case.real(b)) // 2] for b in range(len(case.x))])
    picks = greedy.max_sum(case.x, case.k, first, case.mask)
    for b, row in enumerate(picks.tolist()):
        assert row == oracle.least_similar(case.x[b].tolist(), case.real(b), case.k, int(first[b]))


def test_max_sum_second_pick_is_in_the_other_cluster():
    centre = torch.randn(2, 16)
    x = (centre.repeat_interleave(10, 0) + 0.05 * torch.randn(20, 16))[None]
    assert int(greedy.max_sum(x, 2, torch.tensor([4]))[0, 1]) >= 10
    assert int(greedy.farthest_points(x, 2, torch.tensor([14]), "cosine")[0, 1]) < 10


@given(cases(), st.integers(0, 6), st.integers(1, 6))
def test_facility_location(case: Case, text_rows: int, image_rows: int):
    """One or two stacked matrices, entries of any sign, few values: all gains tie often, and saturate."""
    b, n = case.mask.shape
    parts = [case.whole(b, text_rows, n), case.whole(b, image_rows, n)]
    with patch.object(greedy, "LAZY_START", 1):  # else so few columns would all be evaluated at once
        picks = greedy.facility_location(parts, case.k, ~case.mask)
    for p, row in enumerate(picks.tolist()):
        rows = torch.cat(parts, 1)[p].tolist()
        assert row == oracle.cover(rows, case.real(p), case.k)


@pytest.mark.parametrize("kind", ["random", "clustered", "equal"])
@pytest.mark.parametrize("start_width", [1, 16])
def test_facility_location_is_plain_greedy_at_size(kind, start_width, monkeypatch):
    """The lazy rounds pick what evaluating every gain at every step picks (both in float32, same sums)."""
    monkeypatch.setattr(greedy, "LAZY_START", start_width)
    b, n, k = 3, 150, 60
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(b, n, 32, generator=generator)
    if kind == "clustered":
        x = x[:, :12].repeat_interleave(13, 1)[:, :n] + 0.3 * x
    if kind == "equal":
        x = x[:, :1].expand(b, n, 32)
    matrix = (cosine(x) / 0.2).softmax(-1)
    columns = matrix.transpose(1, 2).contiguous()
    best, barred, expected = torch.zeros(b, 1, n), torch.zeros(b, n), []
    for _ in range(k):
        pick = ((columns - best).clamp_min(0).sum(2) + barred).argmax(1)
        expected.append(pick)
        barred[torch.arange(b), pick] = -torch.inf
        best = torch.maximum(best, columns[torch.arange(b), pick][:, None])
    assert torch.equal(greedy.facility_location(matrix, k), torch.stack(expected, 1))


def test_facility_location_is_within_its_guarantee():
    """f(greedy) >= (1 - 1/e) f(best), gains fall, f of all tokens is the sum of row maxima, excluded never picked."""
    for seed in range(20):
        matrix = torch.rand(1, 7, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        rows = matrix[0].tolist()
        picks = greedy.facility_location(matrix, 8)[0].tolist()
        values = [oracle.coverage(rows, picks[:i]) for i in range(9)]
        gains = [b - a for a, b in pairwise(values)]
        assert all(a >= b - 1e-12 for a, b in pairwise(gains)) and min(gains) >= 0
        assert values[-1] == pytest.approx(matrix.amax(2).sum().item())
        best = max(oracle.coverage(rows, c) for c in combinations(range(8), 3))
        assert values[3] >= (1 - 1 / torch.e) * best
        exclude = torch.arange(8)[None] == picks[0]
        assert picks[0] not in greedy.facility_location(matrix, 7, exclude)[0]


def test_facility_location_without_rows():
    with pytest.raises(ValueError, match="matrices"):
        greedy.facility_location([torch.zeros(1, 0, 4)], 2)


@given(st.integers(1, 3), st.integers(1, 9), st.integers(0, 2**31), st.data())
def test_dpp_raises_the_determinant_most(b: int, n: int, seed: int, data: st.DataObject):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b, n, n + 2, generator=generator, dtype=torch.float64)
    kernel = x @ x.transpose(1, 2)
    mask = torch.rand(b, n, generator=generator) < 0.8
    k = data.draw(st.integers(0, int(mask.sum(1).min())))
    picks = greedy.greedy_dpp(kernel, k, mask)
    for p, row in enumerate(picks.tolist()):
        chosen: list[int] = []
        real = mask[p].nonzero()[:, 0].tolist()
        for pick in row:
            left = [i for i in real if i not in chosen]
            volume = {i: torch.linalg.det(kernel[p][[*chosen, i]][:, [*chosen, i]]).item() for i in left}
            assert pick == oracle.best(left, volume.__getitem__)
            chosen.append(pick)


def test_dpp_of_features_is_dpp_of_their_kernel():
    x, quality = torch.randn(2, 30, 12, dtype=torch.float64), torch.rand(2, 30, dtype=torch.float64) + 0.1
    kernel = quality[:, :, None] * quality[:, None] * cosine(x)
    assert torch.equal(greedy.greedy_dpp_features(x, 9, quality), greedy.greedy_dpp(kernel, 9))
    assert torch.equal(greedy.greedy_dpp_features(x, 9), greedy.greedy_dpp(cosine(x), 9))


def test_dpp_past_the_rank_takes_the_lowest_index():
    x = torch.eye(3, dtype=torch.float32)[[2, 2, 0, 0, 1]]
    assert greedy.greedy_dpp_features(x[None], 5).tolist() == [[0, 2, 4, 1, 3]]
    assert greedy.greedy_dpp(torch.eye(4)[None], 4).tolist() == [[0, 1, 2, 3]]
    assert greedy.greedy_dpp(torch.zeros(1, 3, 3), 3).tolist() == [[0, 1, 2]]
    flat = torch.randn(1, 40, 3)  # rank 3: what rounding leaves of the others is no volume
    for picks in (greedy.greedy_dpp_features(flat, 9)[0].tolist(), greedy.greedy_dpp(cosine(flat), 9)[0].tolist()):
        assert picks[3:] == [i for i in range(40) if i not in picks[:3]][:6]
    with pytest.raises(ValueError, match="kernel"):
        greedy.greedy_dpp(torch.zeros(3, 3), 1)


@pytest.mark.parametrize("start", [torch.tensor([0]), torch.tensor([0, 9]), torch.tensor([0, 2])])
def test_bad_starts(start):
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 2] = False
    for choose in (greedy.farthest_points, greedy.max_sum):
        with pytest.raises(ValueError, match="start"):
            choose(torch.randn(2, 5, 3), 2, start, mask=mask)
    with pytest.raises(ValueError, match="metric"):
        greedy.farthest_points(torch.randn(2, 5, 3), 2, metric="manhattan")


@pytest.mark.parametrize("n", [1, 40, 96, 250])
def test_similarity_rows_both_ways(n):
    x = unit(torch.randn(2, n, 8, dtype=torch.float64))
    pick = torch.tensor([n - 1, n // 2])
    whole = (x @ x.transpose(1, 2))[torch.arange(2), pick]
    for k in (0, n):  # few calls: products on demand; many: the Gram matrix
        torch.testing.assert_close(greedy.similarity_rows(x, k)(pick), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    x = torch.randn(2, 50, 16).to(dtype)
    for name in ("farthest_points", "max_sum", "greedy_dpp_features"):
        assert torch.equal(getattr(greedy, name)(x, 12), getattr(greedy, name)(x.float(), 12))


def test_inputs_that_require_gradients():
    x = torch.randn(2, 30, 8, requires_grad=True)
    for name in ("farthest_points", "max_sum", "greedy_dpp_features"):
        assert torch.equal(getattr(greedy, name)(x, 12), getattr(greedy, name)(x.detach(), 12))
    for name in ("facility_location", "greedy_dpp"):
        assert torch.equal(getattr(greedy, name)(cosine(x), 12), getattr(greedy, name)(cosine(x).detach(), 12))
