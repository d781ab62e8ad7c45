"""VFlowOpt against plain loops, the shipped strategies, and what its sheet says must hold."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vistok
from tests.host.families import FAMILIES, prompt
from tests.reduce.synthetic import Trial
from vistok.host.reducer import Evidence
from vistok.reduce import vflowopt
from vistok.reduce.vflowopt import VFlowOpt, patch_entropy

LAYOUTS = [((6, 6), ()), ((5, 7), ()), ((1, 13), ()), ((4, 4), ((4, 4), (2, 3), (3, 3)))]


def made(seed=0, grid=(6, 6), b=2, crops=()):
    g = torch.Generator().manual_seed(seed)
    n = sum(h * w for h, w in crops) if crops else grid[0] * grid[1]
    return Evidence(
        features=torch.randn(b, n, 4, generator=g, dtype=torch.float64),
        encoder_attention=(2 * torch.randn(b, 3, n, n, generator=g, dtype=torch.float64)).softmax(3),
        patch_pixels=torch.randn(b, n, 20, generator=g),
        grid=None if crops else grid,
        crops=crops,
    )


def plain_map(seen, picture, threshold):
    """The importance of one picture, entropy off."""
    out, first = [], 0
    for size in [h * w for h, w in seen.crops] or [seen.num_tokens]:
        a = seen.encoder_attention[picture].mean(0)[first : first + size, first : first + size].tolist()
        got = [sum(a[i][j] for i in range(size)) / size for j in range(size)]
        asked = [i for i in range(size) if got[i] > threshold * sum(got) / size] or list(range(size))
        out += [sum(a[i][j] for i in asked) / len(asked) for j in range(size)]
        first += size
    return out


def plain_cells(seen, cell):
    out = []
    for part, (h, w) in enumerate(seen.crops or [seen.grid]):
        out += [(part, math.floor(i // w / cell), math.floor(i % w / cell)) for i in range(h * w)]
    return out


def plain_recycling(score, cells, leave, keep):
    """{place: its tokens} of one picture when the ``leave`` least important go; at most ``keep`` of the best."""
    order = sorted(range(len(score)), key=lambda i: (-score[i], i))
    stay, gone = order[: len(order) - leave], order[len(order) - leave :]
    groups = {}
    for i in gone:  # the best of a group comes first
        groups.setdefault(cells[i], []).append(i)
    slots = {i: [i] for i in stay} | {tokens[0]: tokens for tokens in groups.values()}
    best = sorted(slots, key=lambda i: (-score[i], i))[:keep]
    return {place: slots[place] for place in sorted(best)}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9999), st.sampled_from(LAYOUTS), st.sampled_from([0.0, 0.5, 1.1, 1.6, 50.0]))
def test_map_against_a_loop(seed, layout, threshold):
    seen = made(seed, layout[0], crops=layout[1])
    found = VFlowOpt(threshold=threshold).importance(seen)
    for i in range(2):
        assert found[i].tolist() == pytest.approx(plain_map(seen, i, threshold))


def test_threshold_0_is_the_received_attention_and_one_that_none_exceeds_too():
    seen = made(1)
    received = seen.encoder_attention.mean((1, 2))
    torch.testing.assert_close(VFlowOpt(threshold=0.0).importance(seen), received)
    torch.testing.assert_close(VFlowOpt(threshold=1e9).importance(seen), received)
    assert not torch.allclose(VFlowOpt(threshold=1.2).importance(seen), received)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 9999),
    st.sampled_from(LAYOUTS),
    st.sampled_from([1.0, 1.5, 2.0, 2.7, 4.0, 15.58]),
    st.floats(0.01, 0.99),
)
def test_prune_with_recycling_against_a_loop(seed, layout, cell, share):
    seen = made(seed, layout[0], crops=layout[1])
    n = seen.num_tokens
    keep = max(1, min(n - 1, round(share * n)))
    system = VFlowOpt(threshold=1.1, cell=cell)
    reduction = system.reduce(seen, keep)
    score, cells = system.importance(seen).tolist(), plain_cells(seen, cell)
    for i in range(2):
        fits = [plain_recycling(score[i], cells, leave, keep) for leave in range(1, n + 1)]
        whole = [len(plain_recycling(score[i], cells, leave, n)) for leave in range(1, n + 1)]
        slots = fits[whole.index(keep)] if keep in whole else fits[-1]
        assert reduction.keep[i].tolist() == list(slots)
        for slot, (place, tokens) in enumerate(slots.items()):
            weights = torch.tensor([score[i][j] for j in tokens], dtype=torch.float64)
            mean = weights / weights.sum() @ seen.features[i, tokens]
            torch.testing.assert_close(reduction.tokens[i, slot], mean)
            assert float(reduction.carry[i, slot]) == max(score[i][j] for j in tokens) == score[i][place]
        ended = {j: slot for slot, tokens in enumerate(slots.values()) for j in tokens}
        assert reduction.source[i].tolist() == [ended.get(j, -1) for j in range(n)]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9999), st.sampled_from(LAYOUTS), st.sampled_from([1.5, 2.0, 3.3]), st.integers(1, 12))
def test_released_count_is_approximate(seed, layout, cell, keep):
    seen = made(seed, layout[0], b=1, crops=layout[1])
    n = seen.num_tokens
    system = VFlowOpt(threshold=1.1, cell=cell, parity="authors")
    slots = plain_recycling(
        system.importance(seen)[0].tolist(), plain_cells(seen, cell), min(n, n - keep + int(n / cell**2)), n
    )
    assert system.reduce(seen, keep).keep[0].tolist() == list(slots)
    assert system.one_at_a_time and not VFlowOpt().one_at_a_time


def test_recycled_token_is_a_convex_combination_also_where_weights_are_not_positive():
    """Entropy with a negative weight makes the whole map negative; then the mean is a plain one."""
    seen = made(2)
    seen = replace(seen, encoder_attention=seen.encoder_attention * 1e-6)
    system = VFlowOpt(entropy=-1.0, cell=3.0)
    assert bool((system.importance(seen) < 0).all())
    reduction = system.reduce(seen, 9)
    for i in range(2):
        for slot in range(9):
            members = (reduction.source[i] == slot).nonzero()[:, 0]
            torch.testing.assert_close(reduction.tokens[i, slot], seen.features[i, members].mean(0))


def test_a_lone_token_of_weight_0_keeps_its_value():
    seen = made(3, b=1)
    attention = seen.encoder_attention.clone()
    attention[..., ::2] = 0
    seen = replace(seen, encoder_attention=attention)
    reduction = VFlowOpt(cell=1.0).reduce(seen, 30)
    assert torch.equal(reduction.tokens, seen.features.gather(1, reduction.keep[..., None].expand(-1, -1, 4)))


def test_without_recycling_it_is_a_ranking():
    seen = made(4)
    system = VFlowOpt(threshold=1.1, recycle=False)
    reduction = system.reduce(seen, 10)
    best = system.importance(seen).argsort(dim=1, descending=True)[:, :10].sort(1).values
    assert torch.equal(reduction.keep, best) and bool(((reduction.source >= 0).sum(1) == 10).all())
    assert torch.equal(reduction.carry, system.importance(seen).gather(1, best))


def test_entropy_of_known_patches():
    levels = torch.arange(256.0).expand(1, 1, 256)
    constant = torch.full((1, 1, 256), 7.0)
    halves = torch.cat([torch.zeros(128), torch.full((128,), 255.0)]).expand(1, 1, 256)
    found = patch_entropy(torch.cat([levels, constant, halves], 1))[0]
    assert found.tolist() == pytest.approx([8, 0, 1], abs=1e-5)
    assert float(patch_entropy(torch.arange(196.0).view(1, 1, 196))) == pytest.approx(math.log2(196), abs=1e-5)
    assert patch_entropy(torch.full((1, 4, 9), 0.3)).tolist() == [[0, 0, 0, 0]]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 9999), st.floats(0.1, 5), st.floats(-3, 3))
def test_entropy_against_a_loop_on_any_linear_scale(seed, scale, shift):
    g = torch.Generator().manual_seed(seed)
    grey = torch.randint(256, (2, 5, 16), generator=g)
    grey[:, 0, 0], grey[:, 0, 1] = 0, 255
    found = patch_entropy(grey.double() * scale + shift)
    for i in range(2):
        for j in range(5):
            counts = [v for v in torch.bincount(grey[i, j]).tolist() if v]
            assert float(found[i, j]) == pytest.approx(-sum(c / 16 * math.log2(c / 16) for c in counts), abs=1e-5)


def test_entropy_joins_the_map_only_with_a_weight():
    seen = made(5)
    plain = VFlowOpt(threshold=1.1).importance(seen)
    joined = VFlowOpt(threshold=1.1, entropy=0.5).importance(seen)
    torch.testing.assert_close(joined, plain + 0.5 * patch_entropy(seen.patch_pixels).softmax(1))
    assert "patch_pixels" not in VFlowOpt().needs and "patch_pixels" in VFlowOpt(entropy=-0.5).needs
    other = replace(seen, patch_pixels=seen.patch_pixels.flip(1))
    assert torch.equal(VFlowOpt().reduce(seen, 9).keep, VFlowOpt().reduce(other, 9).keep)


def test_later_stages_rank_by_the_carried_map():
    seen = made(6)
    first = VFlowOpt(threshold=1.1, cell=2.0).reduce(seen, 20)
    left = replace(seen.take(first.keep), features=first.tokens, carry=first.carry)
    second = VFlowOpt(threshold=1.1).at_layer(left, 11, 3)
    for i in range(2):
        best = sorted(range(20), key=lambda j: -float(first.carry[i, j]))[:11]
        assert second.keep[i].tolist() == sorted(best)
    assert torch.equal(second.carry, first.carry.gather(1, second.keep))
    # Where nothing was reduced before, the map is made there.
    whole = VFlowOpt(threshold=1.1).at_layer(seen, 11, 3)
    assert torch.equal(whole.keep, VFlowOpt(threshold=1.1, recycle=False).reduce(seen, 11).keep)


@pytest.mark.parametrize(("ratios", "share"), [((0.7487, 0.487), 0.5), ((0.9833, 0.8773), 0.25), ((1.0, 0.6011), 0.1)])
def test_shipped_strategies(ratios, share):
    """Their first ratio, .7233, .2651 and .1166, is what the other two and the share solve to."""
    first = {0.5: 0.7233, 0.25: 0.2651, 0.1: 0.1166}[share]
    schedule = VFlowOpt(ratio_1=ratios[0], ratio_2=ratios[1]).schedule(7290, round(share * 7290), 28)
    counts = [schedule.input, *schedule.layers.values()]
    expected = [first, first * ratios[0], first * ratios[0] * ratios[1]]
    assert list(schedule.layers) == [9, 18]
    assert [c / 7290 for c in counts] == pytest.approx(expected, rel=5e-3)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.1, 1), st.floats(0.1, 1), st.integers(1, 196), st.integers(1, 40))
def test_solved_schedule_meets_the_mean(ratio_1, ratio_2, keep, layers):
    schedule = VFlowOpt(ratio_1=ratio_1, ratio_2=ratio_2).schedule(196, keep, layers)
    counts = [schedule.input, *schedule.layers.values()]
    assert schedule.mean(layers) == keep and counts == sorted(counts, reverse=True) and counts[0] <= 196
    assert all(0 < layer < layers for layer in schedule.layers)


@torch.no_grad()
def test_inside_a_model_later_stages_see_the_first_map_and_all_tokens_change_nothing():
    family = FAMILIES["onevision"]
    inputs = prompt(family, [[0], [1]]).inputs
    plain = family.model(**inputs).logits
    with vistok.apply(family.model, VFlowOpt(entropy=0.3, ratio_1=0.7, ratio_2=0.6), keep=0.4) as session:
        family.model(**inputs)
    for picture in session.pictures:
        assert list(picture.layer_keep) == [2, 3]
        assert {*picture.layer_keep[3].tolist()} < {*picture.layer_keep[2].tolist()} < {*picture.keep.tolist()}
    with vistok.apply(family.model, VFlowOpt(), keep=1.0):
        assert torch.equal(family.model(**inputs).logits, plain)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *(("threshold", -1.0), ("cell", 0.5), ("ratio_1", 0.0), ("ratio_2", 1.1)),
        *(("depths", (0.7, 0.3)), ("depths", (0.0, 0.3)), ("parity", "both")),
    ],
)
def test_wrong_hyper_parameters_are_named(name, wrong):
    with pytest.raises(ValueError, match=f"^{name}"):
        VFlowOpt(**{name: wrong})


def test_search_space_is_of_hyper_parameters_within_their_bounds():
    for name, (low, high) in VFlowOpt.search_space.items():
        VFlowOpt(**{name: low}), VFlowOpt(**{name: high})
        assert low <= getattr(VFlowOpt(), name) <= high


def test_claim_is_nine_tenths_of_dense_at_a_tenth():
    assert vflowopt.claim(trial := Trial(dense=0.8, VFlowOpt=0.721)).holds
    assert not vflowopt.claim(Trial(dense=0.8, VFlowOpt=0.719)).holds
    assert [call[2] for call in trial.calls if call[1] is not None] == [0.1]
