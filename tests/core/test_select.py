"""Selections against brute force: every K, ties, padded tokens, and errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.core import oracle
from tests.core.oracle import Case, cases
from vistok.core import select


@given(cases())
def test_topk(case: Case):
    scores = case.whole(*case.mask.shape)
    scores[case.mask & (scores == -2)] = -torch.inf  # a real token of the worst score still goes before padding
    picks = select.topk(scores, case.k, case.mask)
    for b, row in enumerate(picks.tolist()):
        assert row == sorted(case.real(b), key=lambda i: (-scores[b, i].item(), i))[: case.k]


def test_topk_is_nested_and_takes_all():
    scores = torch.rand(2, 9)
    assert torch.equal(select.topk(scores, 4), select.topk(scores, 9)[:, :4])
    assert torch.equal(select.topk(scores, 9).sort(1).values, torch.arange(9).expand(2, 9))


@given(cases(), st.integers(1, 4))
def test_topk_per_group(case: Case, groups: int):
    b, n = case.mask.shape
    scores = case.whole(b, n)
    group = torch.randint(0, groups, (b, n), generator=case.generator)
    count = [[sum(group[p, i] == g for i in case.real(p)) for g in range(groups)] for p in range(b)]
    total = min(case.k, *(sum(c) for c in count))
    budgets = []
    for sizes in count:  # fill groups from the last on
        left, row = total, [0] * groups
        for g in reversed(range(groups)):
            row[g] = min(left, int(sizes[g]))
            left -= row[g]
        budgets.append(row)
    picks = select.topk_per_group(scores, group, torch.tensor(budgets), case.mask)
    assert picks.shape == (b, total)
    for p, row in enumerate(picks.tolist()):
        wanted = []
        for g in range(groups):
            members = [i for i in case.real(p) if group[p, i] == g]
            wanted += sorted(members, key=lambda i: (-scores[p, i].item(), i))[: budgets[p][g]]
        assert row == wanted


def test_topk_per_group_by_sizes():
    scores = torch.tensor([[1.0, 3, 2, 9, 8, 7]])
    picks = select.topk_per_group(scores, [3, 1, 2], torch.tensor([[2, 0, 1]]))
    assert picks.tolist() == [[1, 2, 4]]


@pytest.mark.parametrize(
    ("groups", "budgets", "named"),
    [
        ([3, 3], [[4, 0], [2, 2]], "budgets"),
        ([3, 3], [[1, 0], [1, 1]], "budgets"),
        ([3, 2], [[1, 1], [1, 1]], "groups"),
        (torch.tensor([0, 0, 0, 1, 1, 2]), [[1, 1], [1, 1]], "groups"),
    ],
)
def test_topk_per_group_names_what_is_wrong(groups, budgets, named):
    with pytest.raises(ValueError, match=named):
        select.topk_per_group(torch.rand(2, 6), groups, torch.tensor(budgets))


@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_rows(h: int, w: int, data: st.DataObject):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    scores = torch.randint(0, 3, (2, h * w), generator=generator).double()
    k = data.draw(st.integers(0, h))
    picks = select.rows(scores, (h, w), k)
    for b, row in enumerate(picks.tolist()):
        sums = [scores[b, i * w : (i + 1) * w].sum().item() for i in range(h)]
        chosen = sorted(range(h), key=lambda i: (-sums[i], i))[:k]
        assert row == [i * w + j for i in chosen for j in range(w)]


def test_rows_with_padding_are_left_out():
    mask = torch.ones(1, 6, dtype=torch.bool)
    mask[0, 5] = False
    scores = torch.tensor([[0.0, 0, 1, 1, 9, 9]])
    assert select.rows(scores, (3, 2), 2, mask).tolist() == [[2, 3, 0, 1]]
    with pytest.raises(ValueError, match="only 2"):
        select.rows(scores, (3, 2), 3, mask)
    with pytest.raises(ValueError, match="grid"):
        select.rows(scores, (2, 2), 1)


@given(cases(exact_cosines=True), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.5, "rising"]))
def test_nms(case: Case, threshold):
    scores = case.whole(*case.mask.shape)
    limits = torch.linspace(0, 1.5, max(case.k, 1))[: case.k] if threshold == "rising" else threshold
    picks = select.nms(scores, case.x, case.k, limits, case.mask)
    each = limits.tolist() if threshold == "rising" else [threshold] * case.k
    for b, row in enumerate(picks.tolist()):
        assert row == oracle.suppress(scores[b].tolist(), case.x[b].tolist(), case.real(b), case.k, each)
    if threshold == 0:
        assert torch.equal(picks, select.topk(scores, case.k, case.mask))


@given(cases(exact_cosines=True), st.integers(1, 4), st.booleans())
def test_even_odd(case: Case, step: int, author: bool):
    picks = select.drop_duplicates_even_odd(case.x, case.k, step, case.mask, "author" if author else "raster")
    assert picks.shape == (len(case.x), case.k)
    for b, row in enumerate(picks.tolist()):
        assert row == oracle.even_odd(case.x[b].tolist(), case.real(b), case.k, step, author)


def test_even_odd_drops_the_duplicate():
    x = torch.tensor([[[1.0, 0], [0, 1], [0, 3], [1, 1]]])  # tokens 1 and 2 point the same way; 2 has an even place
    assert select.drop_duplicates_even_odd(x, 3).tolist() == [[0, 1, 3]]


@given(cases(), st.integers(0, 2**31))
def test_random(case: Case, seed: int):
    b, n = case.mask.shape
    picks = select.random(b, n, case.k, seed, case.mask)
    assert torch.equal(picks, select.random(b, n, case.k, seed, case.mask))
    for p, row in enumerate(picks.tolist()):
        assert len(set(row)) == case.k and set(row) <= set(case.real(p))


def test_random_is_uniform_and_depends_on_the_seed():
    picks = select.random(4000, 6, 2, 1)
    share = torch.bincount(picks.flatten(), minlength=6) / 4000
    assert ((share - 1 / 3).abs() < 0.03).all()
    assert not torch.equal(picks, select.random(4000, 6, 2, 2))


@pytest.mark.parametrize(
    "choose",
    [
        lambda x, k, m: select.topk(x[..., 0], k, m),
        lambda x, k, m: select.nms(x[..., 0], x, k, 0.1, m),
        lambda x, k, m: select.drop_duplicates_even_odd(x, k, 2, m),
        lambda x, k, m: select.random(2, 6, k, 0, m),
        lambda x, k, m: select.farthest_points(x, k, mask=m),
        lambda x, k, m: select.max_sum(x, k, mask=m),
        lambda x, k, m: select.facility_location(x @ x.transpose(1, 2), k, ~m),
        lambda x, k, m: select.greedy_dpp(x @ x.transpose(1, 2), k, m),
        lambda x, k, m: select.greedy_dpp_features(x, k, mask=m),
        lambda x, k, m: select.dpc_knn(x, k, mask=m),
        lambda x, k, m: select.k_medoids(x, k, mask=m),
    ],
)
def test_k_out_of_range(choose):
    x = torch.randn(2, 6, 3)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, :2] = False
    assert choose(x, 4, mask).shape == (2, 4)
    for k in (-1, 7):
        with pytest.raises(ValueError, match=f"k: got {k}, must be between 0 and the 6 tokens"):
            choose(x, k, mask)
    with pytest.raises(ValueError, match="picture 1 has only 4 unmasked"):
        choose(x, 5, mask)


@pytest.mark.parametrize("name", ["farthest_points", "max_sum", "greedy_dpp_features", "dpc_knn", "k_medoids"])
def test_batch_rows_are_independent(name):
    x = torch.randn(4, 40, 8)
    together = getattr(select, name)(x, 7)
    alone = torch.cat([getattr(select, name)(row[None], 7) for row in x])
    assert torch.equal(together, alone)
