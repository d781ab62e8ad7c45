"""AgilePruner: its diagnostics, its walk against a plain one, and what its sheet says must hold."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from tests.reduce.synthetic import Trial
from vistok.core.score import cosine
from vistok.host.reducer import Evidence
from vistok.reduce import agilepruner
from vistok.reduce.agilepruner import AgilePruner, attention_entropy, erank, hybrid_ratio
from vistok.reduce.fastervlm import FasterVLM


def evidence(seed=0, b=2, n=24, d=6, **more):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(b, n, d, generator=g, dtype=torch.float64)
    attention = torch.rand(b, 3, n, generator=g, dtype=torch.float64)
    return Evidence(**({"features": x, "encoder_features": x, "cls_attention": attention} | more))


# Effective rank ---------------------------------------------------------------------------------------------------


@given(st.integers(0, 9999), st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_erank_is_the_entropy_of_singular_values(seed, n, d, center):
    x = torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for rows, found in zip(x - x.mean(1, keepdim=True) if center else x, erank(x, center), strict=True):
        s = torch.linalg.svdvals(rows)
        p = s[s > 1e-9] / s[s > 1e-9].sum()
        torch.testing.assert_close(found, (-(p * p.log()).sum()).exp(), rtol=1e-6, atol=1e-6)
        assert 1 - 1e-9 <= float(found) <= min(n, d) + 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("k", [1, 3, 20])
def test_erank_of_orthonormal_rows_and_of_one_line(k, dtype):
    basis = torch.linalg.qr(torch.randn(1, 40, 40, generator=torch.Generator().manual_seed(k)))[0]
    tolerance = 1e-2 if dtype == torch.float16 else 1e-4
    rows = (0.7 * basis[:, :k]).to(dtype)
    assert float(erank(rows)) == pytest.approx(k, rel=tolerance)
    assert float(erank(torch.cat([rows, 0 * rows], 1))) == pytest.approx(k, rel=tolerance)
    line = torch.linspace(-1, 2, 300)[None, :, None] * basis[:, :1]
    assert float(erank(line.double() if dtype == torch.float64 else line)) == pytest.approx(1, abs=1e-6)


def test_erank_does_not_change_with_scale_and_rotation():
    x = evidence().features
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64))[0]
    torch.testing.assert_close(erank(37 * x @ turn), erank(x))


def test_erank_of_equal_and_of_zero_tokens_is_one():
    assert erank(torch.ones(1, 9, 4)).tolist() == [1] and erank(torch.zeros(1, 9, 4)).tolist() == [1]
    assert erank(torch.ones(1, 9, 4), center=True).tolist() == [1]
    offset = evidence().features + 100
    assert (erank(offset) < 1.5).all() and (erank(offset, center=True) > 4).all()


def test_attention_entropy():
    even = torch.full((1, 2, 10), 0.05)
    one = torch.zeros(1, 2, 10)
    one[..., 3] = 0.4
    torch.testing.assert_close(attention_entropy(even), torch.tensor([10.0]).log())
    assert attention_entropy(one).tolist() == [0]


def test_hybrid_ratio_is_linear_between_its_ends():
    rank = torch.tensor([10.0, 40.0, 70.0, 100.0, 130.0])
    torch.testing.assert_close(hybrid_ratio(rank, 40, 100, 0.8, 0.2), torch.tensor([0.8, 0.8, 0.5, 0.2, 0.2]))
    for low, high, a, b, name in ((3, 3, 0, 1, "low"), (1, 2, -0.1, 1, "share_low"), (1, 2, 0, 1.1, "share_high")):
        with pytest.raises(ValueError, match=name):
            hybrid_ratio(rank, low, high, a, b)


# The walk -----------------------------------------------------------------------------------------------------------


def plain(score, x, keep, tau):
    """One picture: accept the best candidate, remove those near it; at the end the best of the removed."""
    candidates = sorted(range(len(x)), key=lambda i: (-float(score[i]), i))
    removed, accepted = [], []
    while candidates and len(accepted) < keep:
        now = candidates.pop(0)
        limit = tau(len(accepted) + 1)
        near = [j for j in candidates if float(1 - cosine_similarity(x[now], x[j], dim=0)) < limit]
        removed += near
        candidates = [j for j in candidates if j not in near]
        accepted.append(now)
    removed.sort(key=lambda i: (-float(score[i]), i))
    return accepted, removed[: keep - len(accepted)]


@settings(max_examples=30)
@given(st.integers(0, 9999), st.integers(1, 23), st.sampled_from([0.02, 0.1, 0.5]), st.sampled_from([0.3, 0.9, 2.0]))
def test_same_tokens_as_a_plain_walk(seed, keep, coefficient, tau_max):
    seen = evidence(seed)
    system = AgilePruner(erank_average=4.0, coefficient=coefficient, tau_max=tau_max)
    kept, rank = system.reduce(seen, keep).keep, erank(seen.encoder_features).tolist()
    for i in range(2):
        tau = lambda order: min(tau_max, coefficient * order * rank[i] / 4)  # noqa: B023, E731
        accepted, filled = plain(seen.cls_attention[i].mean(0), seen.encoder_features[i], keep, tau)
        assert kept[i].tolist() == sorted(accepted + filled)
        for order, token in enumerate(accepted):
            for later in accepted[order + 1 :]:
                x = seen.encoder_features[i]
                assert float(1 - cosine_similarity(x[token], x[later], dim=0)) >= tau(order + 1)


@pytest.mark.parametrize("off", [{"coefficient": 0.0}, {"tau_max": 0.0}])
def test_without_thresholds_it_is_attention_alone(off):
    seen = evidence(n=12)
    doubled = Evidence(
        features=seen.features.repeat(1, 2, 1),
        encoder_features=seen.features.repeat(1, 2, 1),
        cls_attention=seen.cls_attention.repeat(1, 1, 2),
    )
    for keep in (1, 5, 20):
        found = AgilePruner(**off).reduce(doubled, keep)
        assert torch.equal(found.keep, FasterVLM().reduce(doubled, keep).keep)  # duplicates stay side by side


@given(st.floats(1, 500), st.floats(1, 500), st.integers(1, 64))
def test_thresholds_grow_with_rank_and_order_up_to_their_limit(a, b, keep):
    system = AgilePruner(erank_average=40.0, tau_max=0.3)
    low, high = system.thresholds(torch.tensor([min(a, b), max(a, b)]), keep)
    assert bool((low <= high).all()) and bool((high <= 0.3).all())
    assert all(x <= y for x, y in pairwise(low.tolist()))
    assert float(low[0]) == pytest.approx(min(0.3, 0.01 * min(a, b) / 40), rel=1e-5)


def test_pictures_far_from_the_average_rank_differ_in_suppression():
    """The same attention; of the simple picture (one direction and a little noise) more look-alikes stay."""
    seen = evidence(n=40, b=1, d=16)
    direction = torch.randn(16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    simple = direction + 0.3 * seen.features
    average = float(erank(torch.cat([simple, seen.features], 0)).mean())
    rank = [float(erank(x)) for x in (simple, seen.features)]
    assert rank[0] < average < rank[1]
    tau = AgilePruner(erank_average=average, tau_max=2.0).thresholds(torch.tensor(rank), 10)
    assert bool((tau[0] < tau[1]).all())


def test_more_suppression_spreads_the_selection():
    """On 12 clusters, attention on four of them: mean pairwise distance of what is kept, mean over 20 pictures."""
    g = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(20, 12, 32, generator=g)
    x = centres.repeat_interleave(20, 1) + 2 * torch.randn(20, 240, 32, generator=g)
    attention = torch.rand(20, 1, 240, generator=g) + 2 * (torch.arange(240) < 80)
    seen, average = Evidence(features=x, encoder_features=x, cls_attention=attention), float(erank(x).mean())
    spread = []
    for coefficient in (0.0, 0.01, 0.02, 0.03, 0.05, 0.1):
        system = AgilePruner(erank_average=average, tau_max=0.4, coefficient=coefficient)
        spread.append(float((1 - cosine(system.reduce(seen, 24).tokens)).mean()))
    assert all(a <= b for a, b in pairwise(spread)) and spread[-1] > spread[0] + 0.05


@pytest.mark.parametrize(
    ("name", "wrong"), [("erank_average", 0.0), ("tau_max", 2.1), ("tau_max", -0.1), ("coefficient", -1.0)]
)
def test_wrong_hyper_parameters_are_named(name, wrong):
    with pytest.raises(ValueError, match=name):
        AgilePruner(**{name: wrong})


@pytest.mark.parametrize(("adaptive", "holds"), [(0.7, True), (0.65, False)])
def test_claim(adaptive, holds):
    trial = Trial(FasterVLM=0.6, DivPrune=0.7, AgilePruner=adaptive)
    outcome = agilepruner.claim(trial)
    assert (outcome.baseline, outcome.value, outcome.holds) == (0.7, adaptive, holds)
    assert {keep for _, _, keep, _ in trial.calls} == {1 / 9}
