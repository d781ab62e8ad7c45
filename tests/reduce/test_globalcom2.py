"""GlobalCom2 against plain loops over parts, and what its sheet says must hold."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from tests.core import oracle
from tests.reduce.synthetic import Trial
from tests.reduce.test_hired import boxes, parts_of
from vistok.host.reducer import Evidence
from vistok.reduce import globalcom2
from vistok.reduce.globalcom2 import GlobalCom2

LOGITS = GlobalCom2(score="logits")


def cut(heights=(6, 6), widths=(6, 6), thumbnail=(6, 6), b=2, heads=2, seed=0):
    """A picture that was cut into crops of these heights and widths; attention and logits that agree."""
    crops = (thumbnail, *((h, w) for h in heights for w in widths))
    sizes = [h * w for h, w in crops]
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(b, heads, sum(sizes), generator=g, dtype=torch.float64) + 1
    parts = [
        torch.cat([part, torch.ones_like(part[..., :1])], 2).softmax(2)[..., :-1] for part in logits.split(sizes, 2)
    ]
    return Evidence(
        features=torch.randn(b, sum(sizes), 3, generator=g, dtype=torch.float64),
        cls_logits=logits,
        cls_attention=torch.cat(parts, 2),
        crops=crops,
        boxes=boxes(heights, widths),
    )


def with_thumbnail(seen, value):
    """``seen`` with the logits ``value`` (h, w) on its thumbnail."""
    logits = seen.cls_logits.clone()
    logits[:, :, : value.numel()] = value.flatten()
    return replace(seen, cls_logits=logits)


def region_sums(seen, g):
    (h, w), out = seen.crops[0], []
    for x0, y0, x1, y1 in seen.boxes[1:]:
        mine = [i for i in range(h * w) if x0 <= (i % w + 0.5) / w < x1 and y0 <= (i // w + 0.5) / h < y1]
        out.append(sum(g[i] for i in mine))
    return out


def plain_weights(seen, g, temperature=10.0):
    sums = region_sums(seen, g)
    powers = [math.exp((s - max(sums)) / temperature) for s in sums]
    return [1 + p / sum(powers) - 1 / len(sums) for p in powers]


def plain_scores(seen, i, heights, widths):
    """Of every token, by the sheet's steps 1 and 3 from the logits."""
    means = seen.cls_logits[i].mean(0)
    h, w = seen.crops[0]
    g = means[: h * w]
    full = interpolate(g.view(1, 1, h, w), (sum(heights), sum(widths)), mode="bilinear")[0, 0]
    out, start = [g], h * w
    for r, rows in enumerate(heights):
        for c, columns in enumerate(widths):
            own = means[start : start + rows * columns]
            start += rows * columns
            top, left = sum(heights[:r]), sum(widths[:c])
            seen_from_above = full[top : top + rows, left : left + columns].flatten()
            out.append(own / own.norm() + seen_from_above / seen_from_above.norm())
    return torch.cat(out)


SHAPES = [((6, 6), (6, 6)), ((6,), (6, 6)), ((4, 4), (6, 6)), ((6, 6, 6), (3, 3)), ((5, 6, 5), (6,))]


@settings(max_examples=30)
@given(st.integers(0, 999), st.sampled_from(SHAPES), st.floats(0.01, 0.99))
def test_against_a_loop(seed, shape, share):
    seen = cut(*shape, seed=seed)
    keep = max(1, int(share * seen.num_tokens))
    found, sizes = LOGITS.reduce(seen, keep).keep, [h * w for h, w in seen.crops]
    for i in range(2):
        scores = plain_scores(seen, i, *shape)
        torch.testing.assert_close(LOGITS.scores(seen)[i], scores)
        weights = plain_weights(seen, scores[: sizes[0]].tolist())
        quotas = [round(w * n * 10**9) for w, n in zip([1.0, *weights], sizes, strict=True)]
        budgets, kept, start = oracle.hamilton(quotas, keep, sizes), [], 0
        for size, budget in zip(sizes, budgets, strict=True):
            kept += sorted(range(start, start + size), key=lambda j: -float(scores[j]))[:budget]
            start += size
        assert found[i].tolist() == sorted(kept)


def test_ratios_average_to_the_common_one():
    for seed in range(4):
        seen = cut(*SHAPES[seed], seed=seed)
        weights = LOGITS.weights(seen, LOGITS.own_scores(seen)[0])
        torch.testing.assert_close(weights.mean(1), torch.ones(2, dtype=torch.float64))


def ratios(seen, system=LOGITS):
    return system.weights(seen, system.own_scores(seen)[0])[0]


def test_equal_regions_get_equal_ratios_and_a_richer_one_more():
    value = torch.ones(6, 6)
    assert torch.equal(ratios(with_thumbnail(cut(), value)), torch.ones(4, dtype=torch.float64))
    value[3:, :3] += 1
    richer = ratios(with_thumbnail(cut(), value))
    assert richer[2] > 1 and bool((richer[[0, 1, 3]] < 1).all())
    torch.testing.assert_close(richer[[1, 3]], richer[[0, 0]])


def test_high_temperature_and_a_constant_make_no_difference():
    seen = cut()
    hot = ratios(seen, GlobalCom2(score="logits", temperature=1e9))
    torch.testing.assert_close(hot, torch.ones_like(hot))
    risen = with_thumbnail(cut(b=1), cut(b=1).cls_logits[0, :, :36].mean(0).view(6, 6) + 5)
    torch.testing.assert_close(ratios(risen), ratios(cut(b=1)))


def test_a_constant_thumbnail_leaves_the_choice_in_a_crop_to_its_own_scores():
    seen = with_thumbnail(cut(), torch.full((6, 6), 0.7))
    counts, kept = LOGITS.budgets(seen, 70), LOGITS.reduce(seen, 70).keep
    own = seen.cls_logits.mean(1)
    for i in range(2):
        assert parts_of(seen, kept[i].tolist()) == counts[i].tolist()
        for part in range(1, 5):
            mine = range(36 * part, 36 * part + 36)
            best = sorted(mine, key=lambda j: -float(own[i, j]))[: counts[i, part]]
            assert set(best) == set(mine) & set(kept[i].tolist())


def test_default_is_the_logits_up_to_a_number_for_each_part():
    """Logarithms of attention, centred: the choice is that of centred logits, whatever their offsets."""
    seen = cut()
    sizes = [h * w for h, w in seen.crops]
    centred = [part - part.mean(2, keepdim=True) for part in seen.cls_logits.split(sizes, 2)]
    wanted = replace(seen, cls_logits=torch.cat(centred, 2))
    torch.testing.assert_close(GlobalCom2().scores(seen), LOGITS.scores(wanted))
    for keep in (9, 60, 150):
        assert torch.equal(GlobalCom2().reduce(seen, keep).keep, LOGITS.reduce(wanted, keep).keep)
    assert GlobalCom2().needs == {"cls_attention": -1} and LOGITS.needs == {"cls_logits": -1}


def test_attention_that_underflows_is_finite():
    seen = cut()
    attention = seen.cls_attention.float()
    attention[:, :, 40:60] = 0
    assert bool(GlobalCom2().scores(replace(seen, cls_attention=attention)).isfinite().all())


def test_crops_of_unknown_place_share_by_size_and_rank_themselves():
    seen = replace(cut((6,), (6, 2)), boxes=((0.0, 0.0, 1.0, 1.0), None, None))
    assert LOGITS.budgets(seen, 42)[0].tolist() == [18, 18, 6]
    torch.testing.assert_close(LOGITS.scores(seen), seen.cls_logits.mean(1))


def test_a_picture_in_one_piece():
    seen = replace(cut(), crops=(), boxes=())
    best = seen.cls_logits.mean(1).topk(20).indices.sort(1).values
    for parity in ("paper", "authors"):
        assert torch.equal(GlobalCom2(score="logits", parity=parity).reduce(seen, 20).keep, best)


# The released behaviour -------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(st.integers(0, 999), st.sampled_from(SHAPES), st.floats(0.05, 0.9))
def test_released_counts_are_rounded_down(seed, shape, rate):
    seen, system = cut(*shape, b=1, seed=seed), GlobalCom2(score="logits", parity="authors")
    kept = system.released(seen, rate).keep[0].tolist()
    sizes = [h * w for h, w in seen.crops]
    wanted = [int(n * min(1, rate * float(w))) for n, w in zip(sizes[1:], ratios(seen, system), strict=True)]
    assert parts_of(seen, kept) == [int(sizes[0] * rate), *wanted]
    assert system.one_at_a_time and not LOGITS.one_at_a_time


def test_released_regions_leave_the_remainder_to_the_last():
    value = torch.zeros(6, 7)
    value[:, 2] = 1  # of 7 columns in three: two, two and three; by the picture the third is half in the first crop
    seen = with_thumbnail(cut((6,), (6, 6, 6), thumbnail=(6, 7), b=1), value)
    assert int(ratios(seen, GlobalCom2(score="logits", parity="authors")).argmax()) == 1
    value = torch.zeros(6, 7)
    value[:, 4] = 1  # the fifth column is in the middle crop, but in the last of the released regions
    seen = with_thumbnail(seen, value)
    assert int(ratios(seen).argmax()) == 1
    assert int(ratios(seen, GlobalCom2(score="logits", parity="authors")).argmax()) == 2


def test_released_order():
    """Side by side, each crop without its outer columns: the released code reads a crop's tokens row by padded row."""
    seen = cut((6,), (4, 4), b=1)
    ours = LOGITS.reduce(seen, 42)
    released = GlobalCom2(score="logits", parity="authors").released(seen, 0.5)
    values = seen.features[0].tolist()
    emitted = [values.index(row) for row in released.tokens[0].tolist()]
    assert sorted(emitted) == released.keep[0].tolist()
    for token, slot in enumerate(released.source[0].tolist()):
        assert slot < 0 or emitted[slot] == token
    score = seen.cls_logits[0].mean(0).tolist()
    assert emitted[:18] == sorted(range(36), key=lambda j: -score[j])[:18]  # the thumbnail by score
    assert released.keep[0, :18].tolist() == sorted(emitted[:18]) and ours.keep.shape[1] == 42

    def read(place):  # in the prompt: rows of both crops together
        crop, rank = divmod(place - 36, 24)
        return rank // 4, crop, rank % 4

    def put(place):  # the released place: as if the crop were 6 wide
        crop, rank = divmod(place - 36, 24)
        return rank // 6, crop, rank % 6

    slots = sorted(range(18, len(emitted)), key=lambda s: read(int(released.keep[0, s])))
    assert [emitted[s] for s in slots] == sorted((e for e in emitted[18:]), key=put)
    assert [emitted[s] for s in slots] != sorted((e for e in emitted[18:]), key=read)


@pytest.mark.parametrize(("name", "wrong"), [("temperature", 0.0), ("score", "softmax"), ("parity", "both")])
def test_wrong_hyper_parameters_are_named(name, wrong):
    with pytest.raises(ValueError, match=name):
        GlobalCom2(**{name: wrong})


def test_claim_is_nine_tenths_at_a_tenth():
    assert globalcom2.claim(Trial(dense=0.8, GlobalCom2=0.721)).holds
    outcome = globalcom2.claim(trial := Trial(dense=0.8, GlobalCom2=0.719))
    assert not outcome.holds and (outcome.baseline, outcome.value) == (0.8, 0.719)
    assert [call[2] for call in trial.calls if call[1] is not None] == [0.1]
