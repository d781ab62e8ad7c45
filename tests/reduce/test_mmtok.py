"""MMTok against exhaustive search and a plain greedy, and what its sheet says must hold."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vistok.host.reducer import Evidence
from vistok.reduce import mmtok
from vistok.reduce.mmtok import MMTok, cover


def evidence(seed=0, b=2, n=12, t=3, d=8, **more):
    g = torch.Generator().manual_seed(seed)
    fields = {
        "features": torch.randn(b, n, d, generator=g, dtype=torch.float64),
        "encoder_features": torch.randn(b, n, 5, generator=g, dtype=torch.float64),
        "text": torch.randn(b, t, d, generator=g, dtype=torch.float64),
        "text_mask": torch.ones(b, t, dtype=torch.bool),
    }
    return Evidence(**(fields | more))


def value(rows, chosen):
    """f(S): sum over rows of the best member."""
    return float(rows[:, list(chosen)].amax(1).sum()) if chosen else 0.0


def stacked(system, seen):
    text, vision = system.coverage(seen)
    return torch.cat([text, system.alpha * vision], 1)


def plain_greedy(rows, k):
    chosen, best = [], rows.new_zeros(len(rows))
    for _ in range(k):
        gains = (rows - best[:, None]).clamp_min(0).sum(0).tolist()
        chosen.append(max((j for j in range(rows.shape[1]) if j not in chosen), key=lambda j: (gains[j], -j)))
        best = torch.maximum(best, rows[:, chosen[-1]])
    return chosen


@settings(max_examples=20)
@given(st.integers(0, 9999), st.integers(1, 10), st.floats(0.1, 2), st.floats(0.01, 1))
def test_same_picks_as_plain_greedy(seed, keep, alpha, tau):
    seen, system = evidence(seed), MMTok(alpha=alpha, tau_text=tau)
    rows, reduction = stacked(system, seen), system.reduce(seen, keep)
    for i in range(2):
        assert reduction.keep[i].tolist() == sorted(plain_greedy(rows[i], keep))
        assert torch.equal(reduction.tokens[i], seen.features[i, reduction.keep[i]])


def test_gains_never_grow_and_never_are_negative():
    rows = stacked(MMTok(), evidence())[0]
    chosen = plain_greedy(rows, 12)
    values = [value(rows, chosen[:k]) for k in range(13)]
    gains = [b - a for a, b in pairwise(values)]
    assert all(g >= 0 for g in gains)
    assert all(a >= b - 1e-12 for a, b in pairwise(gains))
    assert values[-1] == pytest.approx(float(rows.amax(1).sum()))


@pytest.mark.parametrize("keep", [1, 2, 3, 4])
def test_within_the_bound_of_the_optimum(keep):
    seen, system = evidence(), MMTok()
    rows, kept = stacked(system, seen), system.reduce(seen, keep).keep
    for i in range(2):
        best = max(value(rows[i], s) for s in combinations(range(12), keep))
        assert value(rows[i], kept[i].tolist()) >= (1 - 1 / torch.e) * best


def test_rows_sum_as_they_should():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    text, vision = MMTok().coverage(evidence(text_mask=mask))
    torch.testing.assert_close(text.sum(2), mask.double() / mask.sum(1, keepdim=True))
    torch.testing.assert_close(vision.sum(2), torch.full((2, 12), 1 / 12, dtype=torch.float64))


def test_without_alpha_only_the_question_counts():
    seen = evidence()
    other = evidence(encoder_features=evidence(1).encoder_features)
    for keep in (1, 2, 3):
        rows = MMTok().coverage(seen)[0]
        useful = [plain_greedy(rows[i], keep) for i in range(2)]
        kept = [MMTok(alpha=0).reduce(e, keep).keep.tolist() for e in (seen, other)]
        for i in range(2):
            gains = [value(rows[i], useful[i][: k + 1]) - value(rows[i], useful[i][:k]) for k in range(keep)]
            certain = {j for j, gain in zip(useful[i], gains, strict=True) if gain > 0}
            assert certain <= set(kept[0][i]) and certain <= set(kept[1][i])


def test_saturated_coverage_goes_on_by_mass():
    """alpha = 0: three question tokens are covered after at most three picks; the rest are those of largest mass."""
    seen = evidence()
    text, vision = MMTok().coverage(seen)
    kept = MMTok(alpha=0).reduce(seen, 7).keep
    for i in range(2):
        covering = plain_greedy(text[i], 7)
        values = [value(text[i], covering[:k]) for k in range(8)]
        useful = {j for k, j in enumerate(covering) if values[k + 1] > values[k]}
        assert 1 <= len(useful) <= 3
        mass = vision[i].sum(0)
        others = sorted(set(range(12)) - useful, key=lambda j: -float(mass[j]))[: 7 - len(useful)]
        assert set(kept[i].tolist()) == useful | set(others)


@pytest.mark.parametrize("alpha", [0.5, 0.0])
def test_without_a_question_vision_coverage_decides(alpha):
    seen = evidence()
    empty = evidence(text=seen.text[:, :0], text_mask=seen.text_mask[:, :0])
    padded = evidence(text_mask=torch.zeros(2, 3, dtype=torch.bool))
    system = MMTok(alpha=alpha)
    kept = [system.reduce(e, 5).keep for e in (empty, padded)]
    assert torch.equal(*kept)
    vision = system.coverage(empty)[1]
    for i in range(2):
        wanted = plain_greedy(vision[i], 5) if alpha else vision[i].sum(0).topk(5).indices.tolist()
        assert kept[0][i].tolist() == sorted(wanted)


def test_scale_and_order_of_text_do_not_matter():
    seen = evidence()
    kept = MMTok().reduce(seen, 5).keep
    scaled = evidence(features=seen.features * 9, encoder_features=seen.encoder_features * 0.3, text=seen.text * 4)
    assert torch.equal(MMTok().reduce(scaled, 5).keep, kept)
    assert torch.equal(MMTok().reduce(evidence(text=seen.text.flip(1)), 5).keep, kept)


def test_padding_of_the_question_and_the_batch_do_not_matter():
    seen = evidence(t=5, text_mask=torch.tensor([[True] * 5, [True, True, False, False, False]]))
    kept = MMTok().reduce(seen, 4).keep
    for i, length in enumerate((5, 2)):
        one = slice(i, i + 1)
        alone = Evidence(
            features=seen.features[one], encoder_features=seen.encoder_features[one], text=seen.text[one, :length]
        )
        assert torch.equal(MMTok().reduce(alone, 4).keep[0], kept[i])


def test_stop_words_need_no_cover():
    ids = torch.tensor([[7, 8, 9], [7, 7, 8]])
    seen, system = evidence(text_ids=ids), MMTok(ignore_ids=(7, 8))
    assert set(system.needs) == {"encoder_features", "text", "text_ids"}
    assert set(MMTok().needs) == {"encoder_features", "text"}
    # The second question has nothing else: all of it counts.
    assert system.question(seen).tolist() == [[False, False, True], [True, True, True]]
    alone = evidence(text_mask=torch.tensor([[False, False, True], [True, True, True]]))
    assert torch.equal(system.reduce(seen, 5).keep, MMTok().reduce(alone, 5).keep)


def test_excluded_tokens_are_never_picked():
    text, vision = MMTok().coverage(evidence())
    exclude = torch.zeros(2, 12, dtype=torch.bool)
    exclude[0, :6], exclude[1, 3:] = True, True
    for alpha in (0.5, 0.0):  # 0: most picks add nothing
        picks = cover(text, vision, alpha, 3, exclude)
        assert not exclude.gather(1, picks).any()
        assert all(len(set(row)) == 3 for row in picks.tolist())


@pytest.mark.parametrize(("name", "wrong"), [("tau_text", 0.0), ("tau_vision", -1.0), ("alpha", -0.1)])
def test_wrong_hyper_parameters_are_named(name, wrong):
    with pytest.raises(ValueError, match=name):
        MMTok(**{name: wrong})


@pytest.mark.parametrize(("pruned", "holds"), [(0.80, True), (0.78, False)])
def test_claim(pruned, holds):
    class Trial:
        def accuracy(self, method, keep=1.0, tasks=()):
            assert tasks == ("existence",)
            assert method is None or (method == MMTok() and keep == 4 and isinstance(keep, int))
            return 0.9 if method is None else pruned

    outcome = mmtok.claim(Trial())
    assert (outcome.baseline, outcome.value, outcome.holds) == (0.9, pruned, holds)
