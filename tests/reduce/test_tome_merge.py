"""ToMe's matching in rounds against plain Python, and what a merge by size must hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reduce.synthetic import Trial, evidence
from vistok.host.reducer import Evidence
from vistok.reduce import tome_merge
from vistok.reduce.tome_merge import ToMeMerge, cuts


def plain(keys, rounds):
    """Members of each slot, in raster order of where the slots stand."""
    slots = [([i], i) for i in range(len(keys))]
    for cut in rounds:
        means = [keys[members].mean(0) for members, _ in slots]
        best = {}
        for i in range(0, len(slots), 2):
            like = [float(torch.cosine_similarity(means[i], means[j], 0)) for j in range(1, len(slots), 2)]
            best[i] = (max(like), 2 * like.index(max(like)) + 1)
        goes = sorted(best, key=lambda i: -best[i][0])[:cut]
        for i in goes:
            slots[best[i][1]][0].extend(slots[i][0])
        slots = [slot for i, slot in enumerate(slots) if i not in goes]
    return slots


@settings(max_examples=25)
@given(st.integers(0, 9999), st.integers(2, 24), st.data())
def test_equals_a_loop(seed, n, data):
    keep, rounds = data.draw(st.integers(1, n - 1)), data.draw(st.integers(1, 5))
    g = torch.Generator().manual_seed(seed)
    keys, x = (torch.randn(2, n, 4, generator=g, dtype=torch.float64) for _ in range(2))
    seen = Evidence(features=x, encoder_features=x, encoder_mean_keys=keys)
    reduction = ToMeMerge(rounds=rounds).reduce(seen, keep)
    for i in range(2):
        slots = plain(keys[i], cuts(n, keep, rounds))
        assert reduction.keep[i].tolist() == [anchor for _, anchor in slots]
        for slot, (members, _) in enumerate(slots):
            assert (reduction.source[i] == slot).nonzero()[:, 0].tolist() == sorted(members)
            torch.testing.assert_close(reduction.tokens[i, slot], x[i, members].mean(0))


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 30))
def test_cuts_are_even_and_never_more_than_half(n, keep, rounds):
    found = cuts(n, keep, rounds)
    assert sum(found) == max(n - keep, 0)
    left = n
    for cut in found:
        assert 1 <= cut <= left // 2
        left -= cut
    if n - keep <= keep:  # no round has to merge over half
        assert len(found) <= rounds and (not found or max(found) - min(found) <= rounds)


def test_nothing_is_lost_and_sizes_are_told_by_source():
    seen = evidence(ToMeMerge(), (8, 8), 2)
    for keep in (1, 5, 33, 63):
        reduction = ToMeMerge().reduce(seen, keep)
        assert bool((reduction.source >= 0).all())
        size = torch.nn.functional.one_hot(reduction.source, keep).sum(1)
        total = (reduction.tokens * size[..., None]).sum(1)
        torch.testing.assert_close(total, seen.encoder_features.sum(1), rtol=1e-4, atol=1e-4)


def test_twins_are_merged_first_and_keep_their_value():
    seen = evidence(ToMeMerge(), (4, 8), 1)
    twins = [t - t % 2 for t in range(32)]  # every odd token is the one before it
    seen = replace(
        seen, encoder_mean_keys=seen.encoder_mean_keys[:, twins], encoder_features=seen.encoder_features[:, twins]
    )
    reduction = ToMeMerge(rounds=1).reduce(seen, 16)
    assert reduction.keep[0].tolist() == list(range(1, 32, 2))
    torch.testing.assert_close(reduction.tokens, seen.encoder_features[:, ::2])


def test_the_scale_of_keys_does_not_matter():
    seen = evidence(ToMeMerge(), (6, 6), 2)
    other = ToMeMerge().reduce(replace(seen, encoder_mean_keys=8 * seen.encoder_mean_keys), 9)
    assert torch.equal(ToMeMerge().reduce(seen, 9).source, other.source)


def test_wrong_hyper_parameters_are_named():
    with pytest.raises(ValueError, match="rounds: got 0"):
        ToMeMerge(rounds=0)


def test_claim_is_three_tenths_of_a_point_at_half():
    assert tome_merge.claim(Trial(dense=0.8, ToMeMerge=0.798)).holds
    outcome = tome_merge.claim(trial := Trial(dense=0.8, ToMeMerge=0.796))
    assert not outcome.holds and (outcome.baseline, outcome.value) == (0.8, 0.796)
    assert [call[2] for call in trial.calls if call[1] is not None] == [0.5]
