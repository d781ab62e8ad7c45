"""MustDrop against plain loops, its filters in a row, and what its sheet says must hold."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vistok
from tests.host.families import FAMILIES, prompt
from tests.reduce.synthetic import Trial
from vistok.host.reducer import Evidence
from vistok.reduce import mustdrop
from vistok.reduce.mustdrop import MustDrop


def made(seed=0, grid=(6, 6), b=2, crops=(), spread=1.0):
    """``spread``: how far the states of a window are from one another."""
    g = torch.Generator().manual_seed(seed)
    n = sum(h * w for h, w in crops) if crops else grid[0] * grid[1]
    states = torch.randn(b, 1, 5, generator=g, dtype=torch.float64)
    states = states + spread * torch.rand(b, n, 1, generator=g) * torch.randn(b, n, 5, generator=g)
    x = torch.randn(b, n, 4, generator=g, dtype=torch.float64)
    return Evidence(
        features=x[..., :2],
        encoder_features=x,
        encoder_states=states,
        cls_attention=torch.randn(b, 3, n, generator=g, dtype=torch.float64).softmax(2),
        grid=None if crops else grid,
        crops=crops,
    )


def text_rows(seed, n, b=1, queries=4):
    g = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(b, 2, queries, n + 3, generator=g, dtype=torch.float64)).softmax(3)[..., :n]


def windows_of(grid, side, first=0):
    """Lists of tokens, the middle one first."""
    (h, w), found = grid, {}
    rows, columns = math.ceil(h / side), math.ceil(w / side)
    for i in range(h * w):
        found.setdefault((i // w * rows // h, i % w * columns // w), []).append(i)
    out = []
    for tokens in found.values():
        ys, xs = sorted({i // w for i in tokens}), sorted({i % w for i in tokens})
        middle = ys[(len(ys) - 1) // 2] * w + xs[(len(xs) - 1) // 2]
        out.append([first + middle] + [first + i for i in tokens if i != middle])
    return out


def cosine(a, b):
    return float(torch.cosine_similarity(a, b, 0))


def plain(given, picture, side, keep):
    """Slots {place: tokens} of one picture with fixed counts."""
    states, n, windows = given.encoder_states[picture], given.num_tokens, []
    for grid in given.crops or (given.grid,):
        windows += windows_of(grid, side, sum(map(len, windows)))
    alike = lambda tokens: sum(cosine(states[i], states[j]) for i in tokens for j in tokens if i != j)  # noqa: E731
    score = {t[0]: alike(t) / (len(t) * (len(t) - 1)) if len(t) > 1 else -math.inf for t in windows}
    slots, want = {i: [i] for i in range(n)}, n - keep
    for tokens in sorted(windows, key=lambda t: -score[t[0]]):
        total = sum(states[i] / states[i].norm() for i in tokens)
        typical = sorted(sorted(tokens[1:]), key=lambda i: -cosine(states[i], total))
        for i in typical[: max(want, 0)]:
            slots[tokens[0]].append(i)
            del slots[i]
            want -= 1
    paid = given.cls_attention[picture].mean(0)
    best = sorted(slots, key=lambda p: -float(paid[slots[p]].mean()))[:keep]
    return {p: slots[p] for p in sorted(best)}, best


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 9999),
    st.sampled_from([((6, 6), ()), ((5, 7), ()), ((1, 13), ()), ((4, 4), ((4, 4), (2, 3), (3, 3)))]),
    st.sampled_from([1, 2, 3]),
    st.floats(0.01, 0.99),
)
def test_encoder_stage_with_fixed_counts_against_a_loop(seed, layout, side, share):
    grid, crops = layout
    seen = made(seed, grid, crops=crops)
    keep = max(1, min(seen.num_tokens - 1, round(share * seen.num_tokens)))
    reduction = MustDrop(window=side).reduce(seen, keep)
    for i in range(2):
        slots, best = plain(seen, i, side, keep)
        assert reduction.keep[i].tolist() == list(slots)
        for place, value in zip(slots, reduction.tokens[i], strict=True):
            torch.testing.assert_close(value, seen.encoder_features[i, slots[place]].mean(0))
        ended = {j: slot for slot, tokens in enumerate(slots.values()) for j in tokens}
        assert reduction.source[i].tolist() == [ended.get(j, -1) for j in range(seen.num_tokens)]
        key = reduction.keep[i, reduction.carry[i] >= 0].tolist()
        assert key == sorted(best[: math.ceil(0.08 * keep)])


def likeness(seen, picture, side):
    """Mean cosine of the ordered pairs of each window, by its tokens."""
    states = seen.encoder_states[picture]
    pairs = lambda tokens: [cosine(states[a], states[b]) for a in tokens for b in tokens if a != b]  # noqa: E731
    return {tuple(t): sum(pairs(t)) / (len(t) * (len(t) - 1)) for t in windows_of(seen.grid, side)}


def test_encoder_stage_by_similarity_against_a_loop():
    """Released: the batch merges as many windows as its least uniform picture, each picture its most similar ones."""
    seen = made(3, (6, 6), spread=0.7)
    found = [likeness(seen, i, 2) for i in range(2)]
    limit = sorted([*found[0].values(), *found[1].values()])[7] + 1e-9
    number = min(sum(s >= limit for s in score.values()) for score in found)
    assert number not in (0, 9) and number != max(sum(s >= limit for s in score.values()) for score in found)
    reduction = MustDrop(window=2, threshold=0.0, similarity=limit).reduce(seen, 30)
    assert reduction.keep.shape[1] == 36 - 3 * number
    for i in range(2):
        merged = sorted(found[i], key=lambda t: -found[i][t])[:number]
        for tokens in found[i]:
            assert len({int(reduction.source[i, j]) for j in tokens}) == (1 if tokens in merged else 4)


def test_similarity_above_1_merges_nothing():
    seen = made(1)
    reduction = MustDrop(threshold=0.0, similarity=1.01).reduce(seen, 5)
    assert torch.equal(reduction.tokens, seen.encoder_features)
    assert torch.equal(reduction.source, torch.arange(36).expand(2, 36))


@pytest.mark.parametrize("system", [MustDrop(), MustDrop(threshold=0.0)], ids=["count", "threshold"])
def test_equal_tokens_become_one_a_window_each_of_the_common_value(system):
    seen = made(1)
    common = seen.encoder_features[:, :1]
    seen = replace(seen, encoder_states=torch.ones(2, 36, 5), encoder_features=common.expand(-1, 36, -1))
    reduction = system.reduce(seen, 4)
    assert reduction.keep.tolist() == [[7, 10, 25, 28]] * 2
    torch.testing.assert_close(reduction.tokens, common.expand(-1, 4, -1))
    assert bool((reduction.source.reshape(2, 6, 6)[:, :3, :3] == 0).all())


@pytest.mark.parametrize("keep", [4, 11, 20, 35])
def test_merge_conserves_the_weighted_sum(keep):
    seen = made(2)
    reduction = MustDrop().reduce(seen, keep)
    size = torch.zeros(2, keep, dtype=torch.float64).scatter_add(1, reduction.source, torch.ones(2, 36).double())
    torch.testing.assert_close((reduction.tokens * size[..., None]).sum(1), seen.encoder_features.sum(1))


def test_released_order_puts_merged_windows_in_front():
    seen = made(4, b=1)
    found = likeness(seen, 0, 3)
    best = sorted(found, key=lambda t: -found[t])[:2]
    limit = found[best[1]] - 1e-9
    ours, released = (
        MustDrop(threshold=0.0, similarity=limit, parity=p).reduce(seen, 30) for p in ("paper", "authors")
    )
    assert torch.equal(ours.keep, released.keep) and ours.keep.shape == (1, 20)
    singles = [i for i in range(36) if not any(i in tokens for tokens in best)]
    for slot, tokens in enumerate([*best, *([i] for i in singles)]):
        assert (released.source[0] == slot).nonzero()[:, 0].tolist() == sorted(tokens)
        torch.testing.assert_close(released.tokens[0, slot], seen.encoder_features[0, list(tokens)].mean(0))
        assert released.carry[0, slot] == ours.carry[0, ours.source[0, tokens[0]]]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9999), st.floats(0, 0.3), st.floats(0, 4))
def test_filter_is_the_published_one(seed, g, individual):
    rows = text_rows(seed, 12)
    seen = Evidence(features=torch.randn(1, 12, 2), llm_attention=rows, carry=torch.full((1, 12), -1.0))
    found = MustDrop(threshold=g, individual=individual).at_layer(seen, 0, 2).keep[0].tolist()
    mean, i = rows[0].mean(0), individual * g
    goes = [float(mean[:, v].sum()) < g * float(mean.sum()) and float(mean[:, v].max()) < i for v in range(12)]
    assert found == [v for v in range(12) if not goes[v]]


def test_a_count_is_the_filter_at_the_threshold_that_leaves_so_many():
    seen = Evidence(features=torch.randn(1, 20, 2), llm_attention=text_rows(5, 20), carry=torch.full((1, 20), -1.0))
    for individual in (0.5, 1.0, 3.0):
        score = MustDrop(individual=individual).relevance(seen.llm_attention)[0].sort(descending=True).values
        for keep in range(1, 20):
            threshold = float((score[keep - 1] + score[keep]) / 2) / individual
            by_count = MustDrop(individual=individual).at_layer(seen, keep, 2)
            by_threshold = MustDrop(individual=individual, threshold=threshold).at_layer(seen, 0, 2)
            assert torch.equal(by_count.keep, by_threshold.keep)


def test_thresholds_of_0_drop_nothing_and_larger_ones_never_keep_more():
    seen = replace(made(6, b=1), llm_attention=text_rows(6, 36))
    count = lambda g, individual: MustDrop(threshold=g, individual=individual).at_layer(seen, 0, 2).keep.shape[1]  # noqa: E731
    assert count(0.0, 1.0) == count(0.5, 0.0) == 36
    assert count(1.01, 1.0) == math.ceil(0.08 * 36)
    limits = [0.0, 0.01, 0.02, 0.03, 0.05, 0.1, 0.3]
    assert all(a >= b for a, b in pairwise([count(g, 1.0) for g in limits]))
    assert all(a >= b for a, b in pairwise([count(0.05, x) for x in (0.0, 0.2, 0.5, 1.0, 3.0)]))
    assert len({count(g, 1.0) for g in limits}) > 3


def test_padding_is_no_query_and_without_a_question_nothing_is_told_apart():
    rows = text_rows(7, 36)
    mask = torch.tensor([[True, False, True, False]])
    seen = replace(made(7, b=1), llm_attention=rows, text_mask=mask)
    alone = replace(seen, llm_attention=rows[:, :, ::2], text_mask=None)
    assert torch.equal(MustDrop().at_layer(seen, 9, 2).keep, MustDrop().at_layer(alone, 9, 2).keep)
    assert MustDrop(threshold=0.5).at_layer(replace(seen, text_mask=~mask & mask), 0, 2).keep.shape[1] == 36


@pytest.mark.parametrize("system", [MustDrop(), MustDrop(threshold=0.06)], ids=["count", "threshold"])
def test_key_set_survives_every_filter(system):
    seen = made(8, (9, 9), b=1)
    reduction = system.reduce(seen, 40)
    slots = reduction.keep.shape[1]
    places = reduction.keep
    key = {*places[0, reduction.carry[0] >= 0].tolist()}
    assert len(key) == math.ceil(0.08 * slots)
    for stage, keep in enumerate((24, 12, 7, 5)):
        n = places.shape[1]
        # The question looks away from the key set.
        rows = text_rows(stage, n) * torch.where(reduction.carry >= 0, 1e-6, 1.0)[:, None, None]
        left = replace(seen.take(places), features=reduction.tokens, carry=reduction.carry, llm_attention=rows)
        reduction = system.at_layer(left, keep, stage)
        places = places.gather(1, reduction.keep)
        assert {*places[0, reduction.carry[0] >= 0].tolist()} == key
    assert places.shape[1] == 5 or system.threshold


def test_a_budget_below_the_key_set_takes_its_best():
    seen = replace(made(9, b=1), llm_attention=text_rows(9, 36))
    paid = seen.cls_attention[0].mean(0)
    assert MustDrop(key_share=0.5).at_layer(seen, 4, 2).keep[0].tolist() == sorted(
        paid.argsort(descending=True)[:4].tolist()
    )


@pytest.mark.parametrize("layers", [1, 2, 6, 12, 28, 32])
@pytest.mark.parametrize("keep", [1, 5, 16, 45, 150, 195, 196])
def test_schedule_of_counts(layers, keep):
    schedule = MustDrop().schedule(196, keep, layers)
    counts = [schedule.input, *schedule.layers.values()]
    assert schedule.mean(layers) == keep and counts == sorted(counts, reverse=True)


def test_schedule_of_the_paper_has_room_for_the_key_set():
    schedule = MustDrop().schedule(576, 64, 32)
    assert list(schedule.layers) == [2, 6, 10, 14]
    assert math.ceil(0.08 * schedule.input) <= min(schedule.layers.values())


def test_schedule_with_a_threshold_is_asked_at_every_filter():
    assert MustDrop(threshold=0.01).schedule(576, 64, 32).layers == {2: 0, 6: 0, 10: 0, 14: 0}
    assert MustDrop(threshold=0.01).schedule(576, 576, 32).mean(32) == 576
    assert MustDrop(threshold=0.01).one_at_a_time and not MustDrop().one_at_a_time


def test_a_threshold_in_a_batch_is_refused():
    seen = Evidence(
        features=torch.zeros(2, 12, 2), llm_attention=text_rows(0, 12, b=2), carry=torch.full((2, 12), -1.0)
    )
    with pytest.raises(ValueError, match=r"^threshold: leaves \[.*one picture at a time"):
        MustDrop(threshold=0.08).at_layer(seen, 0, 2)


@torch.no_grad()
def test_inside_a_model_each_picture_has_its_own_counts():
    family = FAMILIES["llava-clip"]
    system = MustDrop(threshold=0.07, similarity=0.4, window=2)
    with vistok.apply(family.model, system, keep=0.5) as session:
        logits = family.model(**prompt(family, [[0], [0, 0]]).inputs).logits
    assert bool(logits.isfinite().all())
    for picture in session.pictures:
        kept = [picture.keep, *picture.layer_keep.values()]
        assert list(picture.layer_keep) == [1, 2]
        assert all({*b.tolist()} <= {*a.tolist()} for a, b in pairwise(kept)) and 1 <= len(kept[-1]) < 16


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *(("window", 0), ("key_share", 1.5), ("individual", -1.0), ("threshold", -0.1), ("fall", 0.0)),
        *(("depths", (0.5, 0.25)), ("depths", (0.0, 0.5)), ("parity", "both")),
    ],
)
def test_wrong_hyper_parameters_are_named(name, wrong):
    with pytest.raises(ValueError, match=f"^{name}"):
        MustDrop(**{name: wrong})


def test_claim_is_nine_tenths_of_dense_at_7_8_percent():
    assert mustdrop.claim(trial := Trial(dense=0.8, MustDrop=0.721)).holds
    assert not mustdrop.claim(Trial(dense=0.8, MustDrop=0.719)).holds
    assert [call[2] for call in trial.calls if call[1] is not None] == [0.078]
