"""PruMerge against a plain loop over one picture, its counts against the released formulas, and PruMerge+."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reduce.synthetic import Trial
from vistok.host.reducer import Evidence
from vistok.reduce import prumerge
from vistok.reduce.prumerge import PruMerge, outliers


def picture(seed=0, b=1, n=40, scale=2.0):
    """Attention with outliers: exponentials of normal numbers."""
    g = torch.Generator().manual_seed(seed)
    x, keys = (torch.randn(b, n, width, generator=g, dtype=torch.float64) for width in (6, 5))
    attention = (scale * torch.randn(b, n, generator=g, dtype=torch.float64)).exp() / n
    return Evidence(features=x[..., :3], encoder_features=x, encoder_keys=keys, wide_cls_attention=attention)


def plain(seen, i, kept, neighbours=32, extra=True):
    """Values by position: kept tokens with what they took in, and the extra one at its most attended token's place."""
    x, a, keys = seen.encoder_features[i], seen.wide_cls_attention[i].tolist(), seen.encoder_keys[i]
    out, joined = {}, {}
    for p in kept:
        like = {j: float(torch.cosine_similarity(keys[p], keys[j], 0)) for j in range(len(x)) if j != p}
        near = sorted(like, key=lambda j: -like[j])[:neighbours]
        out[p] = x[p] + sum(a[j] * x[j] for j in near)
        for j in near:
            joined.setdefault(j, []).append((like[j], p))
    rest = [j for j in range(len(x)) if j not in kept]
    behind = max(rest, key=lambda j: a[j]) if extra else None
    if extra:
        out[behind] = sum(a[j] * x[j] for j in rest)
    ended = {j: max(joined[j])[1] if j in joined else behind for j in rest} | {p: p for p in kept}
    return out, ended | ({behind: behind} if extra else {})


def check(seen, reduction, i, kept, **how):
    values, ended = plain(seen, i, kept, **how)
    assert reduction.keep[i].tolist() == sorted(values)
    for slot, place in enumerate(reduction.keep[i].tolist()):
        torch.testing.assert_close(reduction.tokens[i, slot], values[place])
    found = {j: int(reduction.keep[i, s]) for j, s in enumerate(reduction.source[i].tolist()) if s >= 0}
    assert found == {j: p for j, p in ended.items() if p is not None}


def best(seen, i, count):
    a = seen.wide_cls_attention[i].tolist()
    return sorted(sorted(range(len(a)), key=lambda j: -a[j])[:count])


@settings(max_examples=12)
@given(st.integers(0, 999), st.integers(2, 39), st.sampled_from([0, 1, 4, 32, 60]))
def test_equals_a_loop(seed, keep, neighbours):
    seen = picture(seed, b=2)
    reduction = PruMerge(neighbours=neighbours).reduce(seen, keep)
    for i in range(2):
        check(seen, reduction, i, best(seen, i, keep - 1), neighbours=neighbours)


def test_one_token_is_a_kept_one():
    seen = picture()
    check(seen, PruMerge().reduce(seen, 1), 0, best(seen, 0, 1), extra=False)


def released_plus(attention):
    """The released positions of PruMerge+: outliers, and every so-manieth token that is none."""
    n, values = len(attention), sorted(attention)

    def percentile(q):
        at = q * (n - 1)
        low = int(at)
        return values[low] + (at - low) * (values[min(low + 1, n - 1)] - values[low])

    limit = percentile(0.75) + 1.5 * (percentile(0.75) - percentile(0.25))
    stand_out = [j for j, a in enumerate(attention) if a > limit]
    if not stand_out:
        return [], []
    stride = max(1, int(int(n / len(stand_out)) / 3))
    return stand_out, sorted({*stand_out, *range(0, n - 1, stride)})


@settings(max_examples=12)
@given(st.integers(0, 999))
def test_counts_of_the_data(seed):
    seen = picture(seed)
    stand_out, spaced = released_plus(seen.wide_cls_attention[0].tolist())
    assert outliers(seen.wide_cls_attention).tolist() == [len(stand_out)]
    for plus, kept in ((False, stand_out), (True, spaced)):
        system = PruMerge(counts="data", plus=plus)
        assert system.one_at_a_time and not PruMerge().one_at_a_time
        for keep in (1, 30):  # whatever is asked for
            check(seen, system.reduce(seen, keep), 0, kept)


def test_no_outliers_leave_the_extra_token_alone():
    seen = picture(scale=0.0)
    for plus in (False, True):
        reduction = PruMerge(counts="data", plus=plus).reduce(seen, 9)
        assert reduction.keep.tolist() == [[0]]
        torch.testing.assert_close(reduction.tokens[:, 0], seen.encoder_features.mean(1))


def test_data_counts_of_a_batch_are_refused():
    seen = picture(b=4)
    assert len(set(outliers(seen.wide_cls_attention).tolist())) > 1
    with pytest.raises(ValueError, match=r"counts: 'data' finds .* one picture at a time"):
        PruMerge(counts="data").reduce(seen, 9)


@pytest.mark.parametrize("keep", [1, 2, 3, 9, 21, 38, 39])
def test_plus_is_one_in_four_by_attention_and_the_others_evenly_spaced(keep):
    seen = picture(b=3)
    kept = PruMerge(plus=True).kept(seen.wide_cls_attention, keep)
    count = max(keep - 1, 1)
    for i, row in enumerate(kept.tolist()):
        mine = [j for j, stays in enumerate(row) if stays]
        top = best(seen, i, -(-count // 4))
        assert len(mine) == count and set(top) <= set(mine)
        others = [j for j in range(40) if j not in top]
        ranks = [others.index(j) for j in mine if j not in top]
        gaps = {b - a for a, b in pairwise(ranks)}
        assert not gaps or max(gaps) - min(gaps) <= 1
        assert not ranks or ranks[0] == 0


def test_shuffled_tokens_give_the_same_values():
    seen, order = picture(), torch.randperm(40, generator=torch.Generator().manual_seed(0))
    names = ("features", "encoder_features", "encoder_keys", "wide_cls_attention")
    turned = replace(seen, **{name: getattr(seen, name)[:, order] for name in names})
    plain_, shuffled = PruMerge().reduce(seen, 9), PruMerge().reduce(turned, 9)
    places = order[shuffled.keep[0]]
    assert places.sort().values.tolist() == plain_.keep[0].tolist()
    torch.testing.assert_close(shuffled.tokens[0, places.argsort()], plain_.tokens[0])


@pytest.mark.parametrize(("name", "wrong"), [("counts", "all"), ("neighbours", -1)])
def test_wrong_hyper_parameters_are_named(name, wrong):
    with pytest.raises(ValueError, match=name):
        PruMerge(**{name: wrong})


def test_claim_is_95_percent_at_a_fourteenth():
    assert prumerge.claim(Trial(dense=0.8, PruMerge=0.761)).holds
    outcome = prumerge.claim(trial := Trial(dense=0.8, PruMerge=0.759))
    assert not outcome.holds and (outcome.baseline, outcome.value) == (0.8, 0.759)
    assert [call[2] for call in trial.calls if call[1] is not None] == [1 / 14]
