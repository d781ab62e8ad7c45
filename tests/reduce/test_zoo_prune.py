"""ZOO-Prune: its estimate against derivatives, its choice against a plain search, and what its sheet says must hold."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity, gelu, normalize

import vistok
from tests.host.families import FAMILIES, prompt
from tests.reduce.synthetic import Trial
from vistok.core.select import farthest_points
from vistok.host.reducer import Evidence
from vistok.reduce import zoo_prune
from vistok.reduce.zoo_prune import ZOOPrune, zo_sensitivity

D, WIDE = 9, 14
FIRST, LAST = (torch.randn(WIDE, WIDE, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (1, 2))


def mlp(x):
    return gelu(x @ FIRST[:D].to(x)) @ LAST[:, :D].to(x)


def linear(x):
    return x @ FIRST[:D, :D].to(x)


def evidence(seed=0, b=2, n=12, project=mlp, dtype=torch.float64, **more):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(b, n, D, generator=g, dtype=torch.float64).to(dtype)
    return Evidence(**({"encoder_features": x, "features": project(x), "project": project} | more))


def directions(count, seed=0):
    return normalize(torch.randn(count, D, generator=torch.Generator().manual_seed(seed)), dim=1).double()


def by_autograd(x, u):
    """(N,): mean over the rows u of |J(x_i) u|."""
    each = [torch.autograd.functional.jvp(mlp, (x,), (row.expand_as(x),))[1].norm(dim=1) for row in u]
    return torch.stack(each).mean(0)


def test_linear_projector_is_equally_sensitive_everywhere():
    x = evidence().encoder_features
    wanted = linear(directions(10)).norm(dim=1).mean()
    torch.testing.assert_close(zo_sensitivity(linear, x, 10), wanted.expand(2, 12))


def test_error_falls_with_the_square_of_the_step():
    x = evidence().encoder_features
    exact = torch.stack([by_autograd(row, directions(8)) for row in x])
    errors = [float((zo_sensitivity(mlp, x, 8, h) - exact).abs().max()) for h in (0.2, 0.1, 0.05, 0.025)]
    assert all(3.5 < a / b < 4.5 for a, b in pairwise(errors))
    torch.testing.assert_close(zo_sensitivity(mlp, x, 8, 1e-4), exact, rtol=1e-6, atol=1e-6)


def test_single_precision_finds_the_same():
    x = evidence().encoder_features
    torch.testing.assert_close(zo_sensitivity(mlp, x.float()).double(), zo_sensitivity(mlp, x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 24, 100, 10**6])
def test_rows_at_a_time_do_not_matter(chunk):
    x, given = evidence().encoder_features, []

    def watched(rows):
        given.append(rows.shape[1])
        return mlp(rows)

    found = zo_sensitivity(watched, x, 7, chunk=chunk)
    torch.testing.assert_close(found, zo_sensitivity(mlp, x, 7))
    assert sum(given) == 2 * 7 * 12 and max(given) <= max(chunk, 2 * 12)


def test_seed_draws_the_directions():
    x = evidence().encoder_features
    assert torch.equal(zo_sensitivity(mlp, x, seed=3), zo_sensitivity(mlp, x, seed=3))
    assert not torch.equal(zo_sensitivity(mlp, x, seed=3), zo_sensitivity(mlp, x, seed=4))


def plain(score, z, keep):
    """All cosines of all pairs recomputed at every step."""
    chosen = [int(score.argmax())]
    while len(chosen) < keep:
        free = [j for j in range(len(z)) if j not in chosen]
        gain = {j: float(score[j] * (1 - max(cosine_similarity(z[j], z[c], dim=0) for c in chosen))) for j in free}
        chosen.append(max(free, key=lambda j: (gain[j], -j)))
    return chosen


@settings(max_examples=15)
@given(st.integers(0, 9999), st.integers(1, 10), st.sampled_from(["sensitivity", "norm"]))
def test_same_picks_as_a_plain_search(seed, keep, score):
    seen, system = evidence(seed), ZOOPrune(directions=8, score=score)
    raw = zo_sensitivity(mlp, seen.encoder_features, 8) if score == "sensitivity" else seen.features.norm(dim=2)
    low, high = raw.amin(1, keepdim=True), raw.amax(1, keepdim=True)
    picks = system.select(seen, keep)
    for i in range(2):
        assert picks[i].tolist() == plain(((raw - low) / (high - low))[i], seen.features[i], keep)
    assert torch.equal(picks[:, 0], raw.argmax(1))
    assert torch.equal(system.reduce(seen, keep).keep, picks.sort(1).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_sensitivities_leave_plain_diversity(dtype):
    """Rounding makes those of a linear projector differ a little; that must not be blown up to [0, 1]."""
    for seed in range(5):
        seen = evidence(seed, project=linear, dtype=dtype)
        assert torch.equal(ZOOPrune().weights(seen), torch.ones(2, 12, dtype=dtype))
        start = torch.zeros(2, dtype=torch.int64)
        assert torch.equal(ZOOPrune().select(seen, 5), farthest_points(seen.features, 5, start, "cosine"))


def test_weights_span_zero_to_one():
    weights = ZOOPrune().weights(evidence())
    assert torch.equal(weights.amin(1), torch.zeros(2)) and torch.equal(weights.amax(1), torch.ones(2))


def test_duplicates_come_last():
    seen = evidence(n=6, dtype=torch.float32)
    x = seen.encoder_features.repeat(1, 3, 1)
    picks = ZOOPrune().select(Evidence(encoder_features=x, features=mlp(x), project=mlp), 18)
    for row in picks.tolist():  # the least sensitive token scores 0, as duplicates do
        assert len({p % 6 for p in row[:5]}) == 5


def test_half_precision_is_estimated_in_single():
    given = []

    def watched(rows):
        given.append(rows.dtype)
        return mlp(rows)

    half = evidence(dtype=torch.bfloat16)
    seen = Evidence(encoder_features=half.encoder_features, features=half.features, project=watched)
    picks = ZOOPrune().select(seen, 5)
    assert set(given) == {torch.float32}
    single = Evidence(encoder_features=half.encoder_features.float(), features=half.features.float(), project=mlp)
    assert torch.equal(picks, ZOOPrune().select(single, 5))


def test_length_needs_no_projector():
    assert set(ZOOPrune().needs) == {"encoder_features", "project"} and not ZOOPrune(score="norm").needs
    seen = evidence()
    assert torch.equal(
        ZOOPrune(score="norm").select(seen, 4), ZOOPrune(score="norm").select(Evidence(features=seen.features), 4)
    )


def test_a_cut_picture_is_one_set():
    seen = evidence(n=20)
    cut = evidence(n=20, crops=((2, 4), (3, 4)))
    assert torch.equal(ZOOPrune().reduce(seen, 6).keep, ZOOPrune().reduce(cut, 6).keep)


@torch.no_grad()
def test_in_a_model_it_is_the_models_projector():
    family = FAMILIES["llava-clip"]
    inputs = prompt(family, [[0], [0]]).inputs
    with vistok.apply(family.model, "zoo-prune", keep=5) as session:
        family.model(**inputs)
    base = family.model.model
    x = base.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    project = base.multi_modal_projector
    seen = Evidence(encoder_features=x, features=project(x), project=project)
    assert [p.keep.tolist() for p in session.pictures] == ZOOPrune().reduce(seen, 5).keep.tolist()


@pytest.mark.parametrize(("name", "wrong"), [("directions", 0), ("step", 0.0), ("score", "length")])
def test_wrong_hyper_parameters_are_named(name, wrong):
    with pytest.raises(ValueError, match=name):
        ZOOPrune(**{name: wrong})


@pytest.mark.parametrize(("pruned", "holds"), [(0.77, True), (0.76, False)])
def test_claim(pruned, holds):
    trial = Trial(dense=0.8, ZOOPrune=pruned)
    outcome = zoo_prune.claim(trial)
    assert (outcome.baseline, outcome.value, outcome.holds) == (0.8, pruned, holds)
    assert [m.score for _, m, keep, _ in trial.calls if m and keep == 1 / 18] == ["sensitivity", "norm"]
