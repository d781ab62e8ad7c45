"""HiRED against plain loops over parts, and what its sheet says must hold; where crops lie, also inside a host."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vistok
from tests.core import oracle
from tests.host.families import FAMILIES, prompt
from tests.reduce.synthetic import Trial
from vistok.host.reducer import Evidence, Reducer
from vistok.reduce import hired
from vistok.reduce._crops import rows_and_columns, shown_by
from vistok.reduce.hired import HiRED


def boxes(heights, widths):
    """Of the thumbnail and of crops with these heights and widths, row by row."""
    h, w = sum(heights), sum(widths)
    out = [(0.0, 0.0, 1.0, 1.0)]
    for r, rows in enumerate(heights):
        for c, columns in enumerate(widths):
            x, y = sum(widths[:c]), sum(heights[:r])
            out.append((x / w, y / h, (x + columns) / w, (y + rows) / h))
    return tuple(out)


def cut(heights=(6, 6), widths=(6, 6), thumbnail=(6, 6), b=2, heads=2, seed=0):
    """A picture that was cut into crops of these heights and widths."""
    crops = (thumbnail, *((h, w) for h in heights for w in widths))
    n = sum(h * w for h, w in crops)
    g = torch.Generator().manual_seed(seed)
    rows = tuple(torch.rand(b, heads, n, generator=g, dtype=torch.float64).pow(3) for _ in range(2))
    features = torch.randn(b, n, 3, generator=g, dtype=torch.float64)
    return Evidence(features=features, cls_attention=rows, crops=crops, boxes=boxes(heights, widths))


def parts_of(seen, kept):
    """How many of the positions ``kept`` are in each part."""
    out, start = [], 0
    for h, w in seen.crops:
        out.append(sum(start <= place < start + h * w for place in kept))
        start += h * w
    return out


def plain(seen, picture, keep, alpha=0.5):
    """Positions that stay, by the sheet's steps in plain Python."""
    (h, w), sizes = seen.crops[0], [y * x for y, x in seen.crops]
    content, score = ([float(v) for v in row[picture].sum(0)] for row in seen.cls_attention)
    thumbnail = max(min(int(keep * alpha), h * w), keep - sum(sizes[1:]))
    marked = sorted(range(h * w), key=lambda i: -content[i])[: int(h * w * (1 - alpha))]
    counts = []
    for x0, y0, x1, y1 in seen.boxes[1:]:
        counts.append(sum(x0 <= (i % w + 0.5) / w < x1 and y0 <= (i // w + 0.5) / h < y1 for i in marked))
    budgets = [thumbnail, *oracle.hamilton(counts, keep - thumbnail, sizes[1:])]
    kept, start = [], 0
    for size, budget in zip(sizes, budgets, strict=True):
        kept += sorted(range(start, start + size), key=lambda i: -score[i])[:budget]
        start += size
    return sorted(kept)


@settings(max_examples=30)
@given(
    st.integers(0, 999),
    st.sampled_from([((6, 6), (6, 6)), ((6,), (6, 6)), ((6, 6, 6), (6,)), ((4, 4), (6, 6)), ((6, 6), (5, 6, 5))]),
    st.floats(0.01, 0.99),
    st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
)
def test_against_a_loop(seed, shape, share, alpha):
    seen = cut(*shape, seed=seed)
    keep = max(1, int(share * seen.num_tokens))
    found = HiRED(alpha=alpha).reduce(seen, keep).keep
    for picture, kept in enumerate(found.tolist()):
        assert kept == plain(seen, picture, keep, alpha)


@pytest.mark.parametrize("keep", [10, 50, 90, 170])
def test_exactly_the_budget_where_the_released_code_keeps_no_more(keep):
    for seed in range(5):
        seen = cut((4, 4), (6, 5), b=1, seed=seed)
        keep = min(keep, seen.num_tokens - 1)
        assert HiRED().reduce(seen, keep).keep.shape[1] == keep
        released = HiRED(parity="authors").reduce(seen, keep).keep
        assert released.shape[1] <= keep and HiRED(parity="authors").one_at_a_time
        assert all(count <= h * w for count, (h, w) in zip(parts_of(seen, released[0]), seen.crops, strict=True))


def with_content(seen, value):
    """``seen`` with the content map ``value`` (h, w) on its thumbnail."""
    content = seen.cls_attention[0].clone()
    content[:, :, : value.numel()] = value.flatten()
    return replace(seen, cls_attention=(content, seen.cls_attention[1]))


def test_a_crop_without_marks_gets_nothing_and_no_crop_more_than_it_has():
    seen = cut()
    value = torch.rand(6, 6) / 100
    value[:3] += 1  # the upper two crops hold all 18 marks
    counts = [HiRED().budgets(with_content(seen, value), keep)[0].tolist() for keep in (60, 100, 140, 170)]
    assert counts[0][3:] == [0, 0] and counts[0][0] == 30
    assert counts[2] == [36, 36, 36, 16, 16]  # all that the thumbnail and the upper crops have, then the others
    assert all(max(c) <= 36 for c in counts) and [sum(c) for c in counts] == [60, 100, 140, 170]


def test_an_even_content_map_gives_equal_shares():
    seen = with_content(cut(), torch.ones(6, 6))
    assert HiRED().budgets(seen, 80)[0].tolist() == [36, 11, 11, 11, 11]
    assert HiRED().budgets(seen, 60)[0].tolist() == [30, 8, 8, 7, 7]


def test_all_for_the_thumbnail():
    seen = cut()
    assert HiRED(alpha=1).budgets(seen, 30)[0].tolist() == [30, 0, 0, 0, 0]
    assert HiRED(alpha=1, parity="authors").budgets(seen, 60)[0].tolist() == [36, 0, 0, 0, 0]  # clamped


@pytest.mark.parametrize("quadrant", range(4))
def test_content_in_one_quadrant_moves_the_crops_budget_there(quadrant):
    value = torch.rand(6, 6) / 100
    y, x = 3 * (quadrant // 2), 3 * (quadrant % 2)
    value[y : y + 3, x : x + 3] += 1
    seen = with_content(cut(), value)
    assert HiRED(alpha=0.75).budgets(seen, 40)[0].tolist() == [30, *(10 * (i == quadrant) for i in range(4))]


def test_released_regions_are_bands_which_misses_a_vertical_split():
    value = torch.rand(6, 6) / 100
    value[:, :3] += 1  # all content on the left
    seen = with_content(cut((6,), (6, 6), b=1), value)
    assert HiRED().budgets(seen, 40)[0].tolist() == [20, 20, 0]
    assert HiRED(parity="authors").budgets(seen, 40)[0].tolist() == [20, 10, 10]
    stacked = with_content(cut((6, 6), (6,), b=1), value.T)  # a horizontal split is a band
    for parity in ("paper", "authors"):
        assert HiRED(parity=parity).budgets(stacked, 40)[0].tolist() == [20, 20, 0]


def test_released_rounding_loses_the_remainders():
    seen = with_content(cut(b=1), torch.ones(6, 6))
    assert HiRED(parity="authors").budgets(seen, 60).sum() == 58  # 30, and 7.5 for each of four crops
    assert HiRED(parity="authors").reduce(seen, 60).keep.shape[1] == 58


def test_crops_of_unknown_place_share_by_size():
    seen = replace(cut((6,), (6, 2)), boxes=((0.0, 0.0, 1.0, 1.0), None, None))
    assert HiRED().budgets(seen, 32)[0].tolist() == [16, 12, 4]
    assert HiRED().reduce(replace(seen, boxes=()), 32).keep.shape == (2, 32)


def test_a_picture_in_one_piece_is_ranked_by_the_late_layer():
    seen = cut()
    whole = replace(seen, crops=(), boxes=(), grid=(1, seen.num_tokens))
    best = seen.cls_attention[1].sum(1).topk(20).indices.sort(1).values
    assert torch.equal(HiRED().reduce(whole, 20).keep, best)


@given(st.integers(0, 999), st.integers(0, 12), st.integers(1, 4))
def test_marks_that_tie_are_shared(seed, count, levels):
    scores = torch.randint(levels, (2, 12), generator=torch.Generator().manual_seed(seed)).double()
    found = hired.top_share(scores, count)
    for row, marks in zip(scores.tolist(), found.tolist(), strict=True):
        assert sum(marks) == pytest.approx(count)
        for value in set(row):
            share = [m for v, m in zip(row, marks, strict=True) if v == value]
            left = count - sum(v > value for v in row)
            assert share == pytest.approx([min(max(left / len(share), 0), 1)] * len(share))


def test_where_crops_lie():
    seen = cut((4, 4), (6, 3), thumbnail=(4, 6))
    assert shown_by(seen).view(4, 6).tolist() == [[0, 0, 0, 0, 1, 1]] * 2 + [[2, 2, 2, 2, 3, 3]] * 2
    assert [axis.tolist() for axis in rows_and_columns(seen)] == [[0, 0, 1, 1], [0, 1, 0, 1]]
    assert shown_by(replace(seen, boxes=())) is None and rows_and_columns(replace(seen, boxes=())) is None


@torch.no_grad()
def test_a_host_says_where_crops_lie():
    """LLaVA-NeXT and a picture of 40 x 56 pixels: two by two crops without their padding."""

    @dataclass(frozen=True)
    class Look(Reducer):
        seen: list

        whole_picture = True

        def select(self, evidence, keep):
            self.seen.append(evidence)
            return torch.arange(keep).expand(len(evidence.features), keep)

    family, look = FAMILIES["llava-next"], Look([])
    with vistok.apply(family.model, look, keep=5):
        family.model(**prompt(family, [[1]]).inputs)
    (seen,) = look.seen
    assert seen.crops == ((4, 4), *[(3, 4)] * 4) and seen.boxes == boxes((3, 3), (4, 4))
    assert shown_by(seen).view(4, 4).tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2


@pytest.mark.parametrize(("name", "wrong"), [("alpha", 1.5), ("alpha", -0.1), ("parity", "both")])
def test_wrong_hyper_parameters_are_named(name, wrong):
    with pytest.raises(ValueError, match=name):
        HiRED(**{name: wrong})


def test_claim_is_accuracy_beside_prumerge_and_time():
    class Timed(Trial):
        def __init__(self, ms, **figures):
            super().__init__(**figures)
            self.ms = ms

        def ttft_ms(self, method, keep=1.0):
            return 100.0 if method is None else self.ms

    outcome = hired.claim(Timed(22.0, HiRED=0.7, PruMerge=0.6))
    assert outcome.holds and (outcome.baseline, outcome.value) == (0.6, 0.7) and "78% sooner" in outcome.note
    assert not hired.claim(Timed(23.0, HiRED=0.7, PruMerge=0.6)).holds
    assert not hired.claim(Timed(10.0, HiRED=0.6, PruMerge=0.6)).holds
