"""Merges: mass is conserved, ``source`` says the truth, values equal those of loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.core import oracle
from tests.core.oracle import Case, cases
from vistok.core import merge
from vistok.core.merge import Merged


def sizes(case: Case) -> Tensor | None:
    weighted = torch.randint(0, 2, (1,), generator=case.generator).item()
    return case.whole(*case.mask.shape, low=1, high=5) if weighted else None


def conserves_mass(x: Tensor, size: Tensor | None, merged: Merged) -> None:
    """Sizes and size-weighted sums of what was not dropped; every slot's mean by a loop; anchors in their slots."""
    size = torch.ones(x.shape[:2], dtype=x.dtype) if size is None else size
    stays = (merged.source >= 0).to(x.dtype)
    torch.testing.assert_close(merged.size.sum(1), (size * stays).sum(1))
    before = torch.einsum("bn,bnd->bd", size * stays, x)
    torch.testing.assert_close(torch.einsum("bk,bkd->bd", merged.size, merged.tokens), before)
    for b in range(len(x)):
        for slot in range(merged.tokens.shape[1]):
            members = (merged.source[b] == slot).nonzero()[:, 0]
            weight = size[b, members]
            assert merged.size[b, slot].item() == pytest.approx(weight.sum().item())
            if len(members):
                mean = (weight[:, None] * x[b, members]).sum(0) / weight.sum()
                torch.testing.assert_close(merged.tokens[b, slot], mean)
                assert int(merged.anchor[b, slot]) in members.tolist()
            else:
                assert int(merged.anchor[b, slot]) == -1 and (merged.tokens[b, slot] == 0).all()
            if len(members) == 1:  # bit for bit
                assert torch.equal(merged.tokens[b, slot], x[b, members[0]])


@given(cases(), st.integers(1, 5))
def test_size_weighted_mean(case: Case, slots: int):
    source = torch.randint(-1, slots, case.mask.shape, generator=case.generator)
    size = sizes(case)
    merged = merge.size_weighted_mean(case.x, source, slots, size)
    conserves_mass(case.x, size, merged)
    assert torch.equal(merged.source, source)
    spread = merge.unmerge(merged.tokens, source)
    for b in range(len(source)):
        for i, slot in enumerate(source[b].tolist()):
            assert torch.equal(spread[b, i], merged.tokens[b, slot] if slot >= 0 else torch.zeros_like(spread[b, i]))


def test_size_weighted_mean_of_odd_sizes_and_no_size():
    """0.1 * x / 0.1 is not x in floating point; a lone token stays itself. Tokens of size 0 count for nothing."""
    x = torch.randn(1, 60, 3)
    lone = merge.size_weighted_mean(x, torch.arange(60)[None], 60, torch.rand(1, 60) + 0.05)
    assert torch.equal(lone.tokens, x)
    empty = merge.size_weighted_mean(x[:, :2], torch.zeros(1, 2, dtype=torch.int64), 1, torch.tensor([[0.0, 2]]))
    assert torch.equal(empty.tokens[0, 0], x[0, 1]) and empty.size.item() == 2


def test_merges_keep_the_dtype_and_accumulate_in_single():
    x = torch.randn(1, 400, 4).bfloat16()
    merged = merge.size_weighted_mean(x, torch.zeros(1, 400, dtype=torch.int64), 1)
    assert merged.tokens.dtype == torch.bfloat16 and merged.size.dtype == torch.float32
    torch.testing.assert_close(merged.tokens[0, 0], x[0].float().mean(0).bfloat16())


def test_merges_have_gradients():
    x = torch.randn(1, 6, 3, dtype=torch.float64, requires_grad=True)
    metric = torch.randn(1, 6, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: merge.bipartite_soft_matching(v, 2, metric=metric).tokens, x)


@given(cases(exact_cosines=True))
def test_nearest_anchor(case: Case):
    if not case.k:
        return
    anchors = torch.stack(
        [
            torch.tensor(case.real(b))[torch.randperm(len(case.real(b)), generator=case.generator)[: case.k]]
            for b in range(len(case.x))
        ]
    )
    values, size = case.whole(*case.mask.shape, 3), sizes(case)
    merged = merge.nearest_anchor(values, anchors, metric=case.x, size=size, mask=case.mask)
    conserves_mass(values, size, merged)
    assert torch.equal(merged.anchor, anchors)
    assert torch.equal(merged.source, merge.nearest_slot(case.x, anchors, case.mask))
    for b, slots in enumerate(merged.source.tolist()):
        x, places = case.x[b].tolist(), anchors[b].tolist()
        for i, slot in enumerate(slots):
            if i in places:
                assert slot == places.index(i)
            elif not case.mask[b, i]:
                assert slot == -1
            else:
                assert slot == oracle.best(range(case.k), lambda s, x=x, i=i, at=places: oracle.cosine(x[i], x[at[s]]))


def test_nearest_anchor_without_anchors():
    with pytest.raises(ValueError, match="anchors"):
        merge.nearest_anchor(torch.randn(1, 4, 2), torch.empty(1, 0, dtype=torch.int64))


def matched(x: list, free: list[bool], r: int) -> tuple[dict[int, int], list[int]]:
    """Which even token joins which odd one, and the even ones that stay, by falling similarity."""
    even, odd = range(0, len(x), 2), range(1, len(x), 2)
    best, value = {}, {}
    for i in even:
        partners = [j for j in odd if free[i] and free[j]]
        if partners:
            best[i] = oracle.best(partners, lambda j, i=i: oracle.cosine(x[i], x[j]))
            value[i] = oracle.cosine(x[i], x[best[i]])
    falling = sorted(even, key=lambda i: -value.get(i, -9))
    return {i: best[i] for i in falling[:r]}, falling[r:]


@given(cases(exact_cosines=True), st.integers(0, 2), st.sampled_from(["raster", "author"]), st.data())
def test_bipartite_soft_matching(case: Case, protected: int, order: str, data: st.DataObject):
    b, n = case.mask.shape
    free = [[i >= protected and bool(case.mask[p, i]) for i in range(n)] for p in range(b)]
    most = min(sum(f[::2]) if any(f[1::2]) else 0 for f in free)
    r = data.draw(st.integers(0, most))
    values, size = case.whole(b, n, 3), sizes(case)
    merged = merge.bipartite_soft_matching(
        values, r, metric=case.x, size=size, protected=protected, mask=case.mask, order=order
    )
    assert merged.tokens.shape == (b, n - r, 3)
    conserves_mass(values, size, merged)
    for p in range(b):
        joins, stay = matched(case.x[p].tolist(), free[p], r)
        slots = [*(sorted(stay) if protected else stay), *range(1, n, 2)]
        assert merged.anchor[p].tolist() == (sorted(slots) if order == "raster" else slots)
        place = {token: slot for slot, token in enumerate(merged.anchor[p].tolist())}
        assert merged.source[p].tolist() == [place[joins.get(i, i)] for i in range(n)]
    if r == 0 and order == "raster":
        assert torch.equal(merged.tokens, values)
    with pytest.raises(ValueError, match=f"r: got {most + 1}"):
        merge.bipartite_soft_matching(values, most + 1, metric=case.x, protected=protected, mask=case.mask)


def test_bipartite_matching_of_equal_tokens_changes_nothing():
    x = torch.randn(1, 1, 5).expand(1, 12, 5)
    merged = merge.bipartite_soft_matching(x, 6)
    torch.testing.assert_close(merged.tokens, x[:, :6])
    torch.testing.assert_close(merge.unmerge(merged.tokens, merged.source), x)
    with pytest.raises(ValueError, match="order"):
        merge.bipartite_soft_matching(x, 6, order="similarity")


@given(cases(), st.data())
def test_merged_pairs_are_size_weighted_means(case: Case, data: st.DataObject):
    """Several may join one token; slots in raster order or any other."""
    b, n = case.mask.shape
    r, shuffled = data.draw(st.integers(0, n - 1)), data.draw(st.booleans())
    order = torch.stack([torch.randperm(n, generator=case.generator) for _ in range(b)])
    gone, stay = order[:, :r], order[:, r:]
    into = stay.gather(1, torch.randint(0, n - r, (b, r), generator=case.generator))
    size = sizes(case)
    merged = merge.merge_pairs(case.x, gone, into, size, stay if shuffled else None)
    conserves_mass(case.x, size, merged)
    assert torch.equal(merged.anchor, stay if shuffled else stay.sort(1).values)
    again = merge.size_weighted_mean(case.x, merged.source, n - r, size, merged.anchor)
    torch.testing.assert_close((merged.tokens, merged.size), (again.tokens, again.size))
    for p in range(b):
        place = {token: slot for slot, token in enumerate(merged.anchor[p].tolist())}
        joins = dict(zip(gone[p].tolist(), into[p].tolist(), strict=True))
        assert merged.source[p].tolist() == [place[joins.get(i, i)] for i in range(n)]


def test_what_equals_the_token_it_joins_changes_nothing():
    x = torch.randn(2, 1, 5).expand(2, 6, 5)
    merged = merge.merge_pairs(x, torch.tensor([[0, 5]] * 2), torch.tensor([[3, 3]] * 2), torch.rand(2, 6) + 0.1)
    assert torch.equal(merged.tokens, x[:, :4])


def test_soft_matching_breaks_ties_by_the_lower_index():
    even, into = merge.soft_matching(torch.ones(1, 9, 2), 3, protected=1)
    assert even.tolist() == [[2, 4, 6, 8]] and into.tolist() == [[1, 1, 1]]
    with pytest.raises(ValueError, match=r"^r: got 5, must be between 0 and 4"):
        merge.soft_matching(torch.ones(1, 9, 2), 5, protected=1)


@given(cases(), st.integers(0, 12), st.booleans(), st.booleans())
def test_knn_weighted(case: Case, neighbours: int, weighted: bool, normalise: bool):
    b, n = case.mask.shape
    centres = torch.stack([torch.randperm(n, generator=case.generator)[: case.k] for _ in range(b)])
    affinity = case.whole(b, case.k, n)
    weight = torch.rand(b, n, generator=case.generator, dtype=torch.float64) if weighted else None
    merged = merge.knn_weighted(case.x, centres, affinity, neighbours, weight, normalise)
    w = torch.ones(b, n, dtype=torch.float64) if weight is None else weight
    put_in = torch.zeros_like(case.x[:, 0])
    for p in range(b):
        inside: dict[int, list[int]] = {}
        others = [i for i in range(n) if i not in centres[p].tolist()]
        for s, c in enumerate(centres[p].tolist()):
            near = sorted(others, key=lambda i, s=s, p=p: (-affinity[p, s, i].item(), i))[:neighbours]
            total = case.x[p, c] + sum((w[p, i] * case.x[p, i] for i in near), torch.zeros_like(case.x[p, c]))
            size = 1 + sum(w[p, i].item() for i in near)
            put_in[p] += total
            torch.testing.assert_close(merged.tokens[p, s], total / size if normalise else total)
            assert merged.size[p, s].item() == pytest.approx(size)
            for i in near:
                inside.setdefault(i, []).append(s)
        for i, slot in enumerate(merged.source[p].tolist()):
            if i in centres[p].tolist():
                assert slot == centres[p].tolist().index(i)
            elif i in inside:
                assert slot == oracle.best(inside[i], lambda s, i=i, p=p: affinity[p, s, i].item())
            else:
                assert slot == -1
    mass = merged.size[..., None] * merged.tokens if normalise else merged.tokens
    torch.testing.assert_close(mass.sum(1), put_in)


@given(st.integers(1, 7), st.integers(1, 7), st.data())
def test_window_mean(h: int, w: int, data: st.DataObject):
    rows, columns = data.draw(st.integers(1, h)), data.draw(st.integers(1, w))
    x = torch.randn(2, h * w, 3, dtype=torch.float64)
    size = torch.rand(2, h * w, dtype=torch.float64) + 0.1 if data.draw(st.booleans()) else None
    merged = merge.window_mean(x, (h, w), (rows, columns), size)
    conserves_mass(x, size, merged)
    counts = torch.bincount(merged.source[0], minlength=rows * columns).view(rows, columns)
    assert (counts > 0).all()  # sides are cut as evenly as possible
    assert (h // rows) * (w // columns) <= counts.min() and counts.max() <= -(-h // rows) * -(-w // columns)
    assert merged.anchor[0].tolist() == sorted(merged.anchor[0].tolist())
    if size is None and h % rows == 0 and w % columns == 0:
        picture = x.transpose(1, 2).view(2, 3, h, w)
        pooled = torch.nn.functional.avg_pool2d(picture, (h // rows, w // columns))
        torch.testing.assert_close(merged.tokens, pooled.flatten(2).transpose(1, 2))


def test_window_mean_stands_in_the_middle():
    assert merge.window_mean(torch.randn(1, 36, 2), (6, 6), (2, 2)).anchor.tolist() == [[7, 10, 25, 28]]
    for wrong, named in [(((6, 5), (2, 2)), "grid"), (((6, 6), (7, 1)), "cells"), (((6, 6), (0, 1)), "cells")]:
        with pytest.raises(ValueError, match=named):
            merge.window_mean(torch.randn(1, 36, 2), *wrong)
