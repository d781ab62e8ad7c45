"""CDPruner against determinants written out, and what its kernel promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity, normalize

from tests.reduce.synthetic import Trial
from vistok.core.select import greedy_dpp_features
from vistok.host.reducer import Evidence
from vistok.reduce import cdpruner
from vistok.reduce.cdpruner import CDPruner


def evidence(seed=0, b=2, n=12, t=3, d=16, **more):
    g = torch.Generator().manual_seed(seed)
    fields = {
        "features": torch.randn(b, n, d, generator=g, dtype=torch.float64),
        "text": torch.randn(b, t, d, generator=g, dtype=torch.float64),
        "text_mask": torch.ones(b, t, dtype=torch.bool),
    }
    return Evidence(**(fields | more))


def kernel(x, text, theta=None, sign=1):
    """Of one picture, entry by entry from the formula of the paper."""
    score = torch.stack([sign * cosine_similarity(text, row[None]).mean() for row in x])
    r = (score - score.min() + 1e-6) / (score.max() - score.min())
    r = r if theta is None else torch.exp(theta / (2 * (1 - theta)) * r)
    return r[:, None] * (normalize(x, dim=1) @ normalize(x, dim=1).T) * r


def plain(k, keep):
    chosen = []
    for _ in range(keep):
        free = [j for j in range(len(k)) if j not in chosen]
        volume = {j: float(torch.linalg.det(k[[*chosen, j]][:, [*chosen, j]])) for j in free}
        chosen.append(max(free, key=lambda j: (volume[j], -j)))
    return chosen


@settings(max_examples=20)
@given(st.integers(0, 9999), st.integers(1, 8), st.sampled_from([None, 0.5, 0.9]), st.booleans())
def test_each_pick_raises_the_determinant_most(seed, keep, theta, negative):
    seen = evidence(seed)
    picks = CDPruner(theta=theta, negative=negative).select(seen, keep)
    for i in range(2):
        k = kernel(seen.features[i], seen.text[i], theta, -1 if negative else 1)
        assert picks[i].tolist() == plain(k, keep)


def test_first_pick_is_the_most_relevant():
    seen = evidence()
    relevance = CDPruner().relevance(seen)
    assert torch.equal(CDPruner().select(seen, 1)[:, 0], relevance.argmax(1))
    assert float(relevance.min()) > 0 and float(relevance.max()) == pytest.approx(1, abs=1e-4)
    assert torch.equal(CDPruner(negative=True).select(seen, 1)[:, 0], relevance.argmin(1))


def test_relevance_rules_where_theta_is_large_and_not_where_it_is_zero():
    seen = evidence()
    most = CDPruner().relevance(seen).topk(4).indices.sort(1).values
    assert torch.equal(CDPruner(theta=0.99).reduce(seen, 4).keep, most)
    assert torch.equal(CDPruner(theta=0.0).select(seen, 4), greedy_dpp_features(seen.features, 4))


@pytest.mark.parametrize("how", ["empty", "padded", "zero"])
def test_without_a_question_diversity_decides(how):
    seen = evidence()
    text = {"empty": seen.text[:, :0], "padded": seen.text, "zero": 0 * seen.text}[how]
    mask = torch.full(text.shape[:2], how == "zero")
    without = evidence(text=text, text_mask=mask)
    assert torch.equal(CDPruner().select(without, 5), greedy_dpp_features(seen.features, 5))


def test_equal_tokens_are_equally_relevant_in_single_precision_too():
    x = torch.randn(1, 1, 300).expand(1, 40, 300)
    seen = Evidence(features=x, text=torch.randn(1, 6, 300))
    assert torch.equal(CDPruner().relevance(seen), torch.ones(1, 40))
    assert CDPruner().reduce(seen, 7).keep.shape == (1, 7)


def test_a_duplicate_waits_until_nothing_else_adds_volume():
    seen = evidence(n=6)
    twice = evidence(features=seen.features.repeat(1, 2, 1))
    kept = CDPruner().reduce(twice, 6).keep % 6
    assert torch.equal(kept.sort(1).values, torch.arange(6).expand(2, 6))


def test_padding_of_the_question_and_the_batch_do_not_matter():
    seen = evidence(t=5, text_mask=torch.tensor([[True] * 5, [True, True, False, False, False]]))
    kept = CDPruner().reduce(seen, 4).keep
    for i, count in enumerate((5, 2)):
        alone = Evidence(features=seen.features[i : i + 1], text=seen.text[i : i + 1, :count])
        assert torch.equal(CDPruner().reduce(alone, 4).keep[0], kept[i])


def test_another_question_keeps_other_tokens():
    seen, other = evidence(), evidence(text=evidence(1).text)
    assert not torch.equal(CDPruner().reduce(seen, 4).keep, CDPruner().reduce(other, 4).keep)


@pytest.mark.parametrize("theta", [-0.1, 1.0])
def test_wrong_theta_is_named(theta):
    with pytest.raises(ValueError, match="theta"):
        CDPruner(theta=theta)


@pytest.mark.parametrize(("pruned", "holds"), [(0.76, True), (0.75, False)])
def test_claim(pruned, holds):
    trial = Trial(dense=0.8, CDPruner=pruned)
    outcome = cdpruner.claim(trial)
    assert (outcome.baseline, outcome.value, outcome.holds) == (0.8, pruned, holds)
    assert [keep for _, method, keep, _ in trial.calls if method] == [1 / 18]
