"""Information horizon as a reducer: its counts, its uniform and seeded choice, what it leaves to the base method."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vistok
from tests.host.families import FAMILIES, prompt
from tests.reduce.synthetic import Trial, evidence
from vistok.reduce import information_horizon
from vistok.reduce.information_horizon import InformationHorizon

ON_FASTERVLM = InformationHorizon("fastervlm")
LATER = InformationHorizon("fastervlm", stages=((1 / 2, 1 / 2),), horizon=3 / 4)


def test_counts_of_the_released_runs():
    schedule = InformationHorizon("fastervlm", horizon=1).schedule(576, 192, 32)
    assert (schedule.input, dict(schedule.layers)) == (284, {20: 38})


def test_none_is_left_past_the_horizon():
    assert LATER.schedule(576, 100, 32).layers == {16: 80, 24: 0}
    assert LATER.schedule(576, 100, 32).input == 160
    assert ON_FASTERVLM.schedule(576, 192, 32).layers[28] == 0


shares = st.floats(0.01, 1)
depths = st.lists(st.floats(0.01, 0.99), max_size=3, unique=True).map(sorted)


@given(depths, st.lists(shares, min_size=3, max_size=3), shares, st.integers(1, 40), st.integers(1, 70), st.data())
def test_schedule_spends_the_budget_and_no_more(depths, falls, horizon, num_layers, n, data):
    """At most ``keep`` on average, and one token more in any stage would be too many or more than the stage before."""
    keep = data.draw(st.integers(1, n))
    falls = sorted(falls, reverse=True)
    system = InformationHorizon("fastervlm", tuple(zip(depths, falls, strict=False)), horizon)
    schedule = system.schedule(n, keep, num_layers)
    layers = sorted(schedule.layers)
    counts = [schedule.input, *(schedule.layers[layer] for layer in layers)]
    assert counts == sorted(counts, reverse=True)
    spent = schedule.mean(num_layers) * num_layers
    assert spent <= keep * num_layers + 1e-6
    assert spent > keep * num_layers - 2 * num_layers or n == keep
    if keep == n:
        assert set(counts) == {n}
    if counts[0] < n and layers and layers[-1] >= horizon * num_layers:
        assert counts[-1] == 0


def test_survivors_are_uniform_over_seeds():
    """Each token is kept in keep / N of the seeds, within five standard deviations; so is each pair of stages."""
    given_, seeds = evidence(ON_FASTERVLM, (1, 20), batch=1), 1000
    once, twice = Counter(), Counter()
    for seed in range(seeds):
        system = InformationHorizon("fastervlm", seed=seed)
        first = system.at_layer(given_, 8, 5)
        once.update(first.keep[0].tolist())
        second = system.at_layer(given_.take(first.keep), 3, 9)
        twice.update(first.keep[0][second.keep[0]].tolist())
    for counter, share in ((once, 8 / 20), (twice, 3 / 20)):
        margin = 5 * (seeds * share * (1 - share)) ** 0.5
        assert all(abs(counter[i] - seeds * share) < margin for i in range(20))


def test_a_seed_says_all():
    given_ = evidence(ON_FASTERVLM, (4, 5))
    first = ON_FASTERVLM.at_layer(given_, 7, 5)
    assert torch.equal(first.keep, InformationHorizon("fastervlm").at_layer(given_, 7, 5).keep)
    assert not torch.equal(first.keep, ON_FASTERVLM.at_layer(given_, 7, 6).keep)
    assert not torch.equal(first.keep, InformationHorizon("fastervlm", seed=1).at_layer(given_, 7, 5).keep)
    assert ON_FASTERVLM.at_layer(given_, 0, 9).tokens.shape == (3, 0, 12)


@pytest.mark.parametrize("base", ["fastervlm", "hiprune", "recoverable-compression", "random"])
def test_the_base_chooses_first(base):
    """Also a base that merges, that works in encoder space, or on a picture in parts."""
    system, seeded = InformationHorizon(base, seed=3), {"seed": 3} if base == "random" else {}
    alone = vistok.create(base, **seeded)
    assert (system.needs, system.space, system.position) == (alone.needs, alone.space, alone.position)
    for how in ({}, {"crops": ((4, 4), (2, 3))}):
        given_ = evidence(alone, batch=1, **how)
        found, expected = system.reduce(given_, 9), alone.reduce(given_, 9)
        assert torch.equal(found.keep, expected.keep) and torch.equal(found.tokens, expected.tokens)


@torch.no_grad()
def test_inside_a_model():
    family = FAMILIES["llava-clip"]
    batch = prompt(family, [[0]])
    with vistok.apply(family.model, LATER, keep=6) as session:
        family.model(**batch.inputs)
    (picture,) = session.pictures
    assert (picture.tokens_kept, picture.layers) == (9, {2: 6, 3: 0})
    with vistok.apply(family.model, "fastervlm", keep=9) as alone:
        family.model(**batch.inputs)
    assert torch.equal(picture.keep, alone.pictures[0].keep)
    assert {*picture.layer_keep[2].tolist()} < {*picture.keep.tolist()}


MISTAKES = {
    "stages: got ((0.7, 0.5), (0.5, 0.2))": {"stages": ((0.7, 0.5), (0.5, 0.2))},
    "stages: got ((0.0, 0.5),)": {"stages": ((0.0, 0.5),)},
    "stages: got ((0.5, 0.0),)": {"stages": ((0.5, 0.0),)},
    "stages: got ((0.5, 0.1), (0.7, 0.2)), their shares": {"stages": ((0.5, 0.1), (0.7, 0.2))},
    "horizon: got 0": {"horizon": 0},
    "method: got 'information-horizon', must be another": {"method": "information_horizon"},
    "method: got 'todre', must be a reducer without stages": {"method": "todre"},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(message):
    with pytest.raises(ValueError) as error:
        InformationHorizon(**{"method": "fastervlm", **MISTAKES[message]})
    assert str(error.value).replace("information_horizon", "information-horizon").startswith(message)


def test_unknown_base_is_named():
    with pytest.raises(LookupError, match="fastervlm"):
        InformationHorizon("fastervml")


def test_claim_is_the_abstracts(monkeypatch):
    monkeypatch.setattr(information_horizon, "InformationHorizon", lambda: ON_FASTERVLM)
    outcome = information_horizon.claim(trial := Trial(dense=0.8, InformationHorizon=0.776, FasterVLM=0.7))
    assert outcome.holds and "70.0% with fastervlm alone" in outcome.note
    assert {call[2] for call in trial.calls if call[1] is not None} == {0.5}
    assert not information_horizon.claim(Trial(dense=0.8, InformationHorizon=0.774)).holds
