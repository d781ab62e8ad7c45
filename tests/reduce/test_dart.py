"""DART against a plain search, its place in the decoder, and what happens with little or no question."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

import vistok
from tests.host.families import FAMILIES, prompt
from tests.reduce.synthetic import Trial
from vistok.host.reducer import Evidence
from vistok.reduce import dart
from vistok.reduce.dart import DART


def evidence(seed=0, b=2, n=30, t=6, d=7, **more):
    g = torch.Generator().manual_seed(seed)
    fields = {
        "features": torch.randn(b, n, d, generator=g, dtype=torch.float64),
        "llm_keys": torch.randn(b, n, 4, generator=g, dtype=torch.float64),
        "text": torch.randn(b, t, d, generator=g, dtype=torch.float64),
        "text_mask": torch.ones(b, t, dtype=torch.bool),
    }
    return Evidence(**(fields | more))


def longest(rows, count):
    return sorted(range(len(rows)), key=lambda i: (-float(rows[i].abs().sum()), i))[:count]


def plain(system, x, keys, text, keep):
    """One picture: every pivot in turn takes its share of the tokens least like it."""
    chosen = longest(keys, min(system.visual_pivots, keep))
    pivots = [x[i] for i in chosen] + [text[i] for i in longest(text, system.text_pivots)]
    share, more = divmod(keep - len(chosen), len(pivots))
    for number, pivot in enumerate(pivots):
        free = [j for j in range(len(x)) if j not in chosen]
        likeness = cosine_similarity(pivot[None], x)
        chosen += sorted(free, key=lambda j: (float(likeness[j]), j))[: share + (number < more)]
    return sorted(chosen)


@settings(max_examples=30)
@given(st.integers(0, 9999), st.integers(1, 29), st.integers(1, 5), st.integers(0, 5), st.integers(0, 6))
def test_same_tokens_as_a_plain_search(seed, keep, visual, text, words):
    """The second question has ``words`` of six tokens, the others are padding."""
    mask = torch.arange(6) < torch.tensor([6, words])[:, None]
    seen, system = evidence(seed, text_mask=mask), DART(visual_pivots=visual, text_pivots=text)
    found = system.at_layer(seen, keep, 2)
    for i, count in enumerate((6, words)):
        wanted = plain(system, seen.features[i], seen.llm_keys[i], seen.text[i, :count], keep)
        assert found.keep[i].tolist() == wanted
        assert torch.equal(found.tokens[i], seen.features[i, wanted])


def test_a_pivot_stays_and_its_duplicates_go():
    seen = evidence(b=1, n=20)
    pivot = longest(seen.llm_keys[0], 1)[0]
    x = seen.features.clone()
    copies = [j for j in range(20) if j != pivot][:4]
    x[:, copies] = 3 * x[:, [pivot]]
    kept = DART(visual_pivots=1, text_pivots=0).at_layer(evidence(b=1, n=20, features=x), 16, 2).keep[0]
    assert kept.tolist() == [j for j in range(20) if j not in copies]


def test_only_the_first_question_tokens_by_length_count():
    seen = evidence()
    best = torch.tensor([longest(seen.text[i], 2) for i in range(2)])
    only = seen.text.gather(1, best[:, :, None].expand(-1, -1, 7))
    system = DART(text_pivots=2)
    short = evidence(text=only, text_mask=None)
    assert torch.equal(system.at_layer(seen, 12, 2).keep, system.at_layer(short, 12, 2).keep)
    shorter = evidence(text=0.1 * seen.text)  # cosines do not change with length
    assert torch.equal(system.at_layer(seen, 12, 2).keep, system.at_layer(shorter, 12, 2).keep)


@pytest.mark.parametrize("keep", [0, 30])
def test_none_and_all(keep):
    for mask in (True, False):
        seen = evidence(text_mask=torch.full((2, 6), mask))
        assert DART().at_layer(seen, keep, 2).keep.tolist() == [list(range(keep))] * 2


def test_needs_the_question_only_for_pivots_from_it():
    assert set(DART().needs) == {"text"} and not DART(text_pivots=0).needs
    assert set(DART().layer_needs) == {"llm_keys"}


def test_schedule():
    assert DART().schedule(576, 192, 32).layers == {2: 166}  # (32 * 192 - 2 * 576) / 30
    assert DART().schedule(576, 64, 32).layers == {2: 30}
    assert DART().schedule(576, 29, 32).layers == {1: 11}  # two full layers would take more than the budget
    assert DART().schedule(576, 16, 32).layers == {0: 16}
    assert DART(layer=40).schedule(64, 60, 4).layers == {2: 56}
    assert DART().schedule(64, 32, 1).layers == {0: 32}
    assert DART().schedule(576, 576, 32).layers == {}
    assert all(DART().schedule(576, keep, 32).input == 576 for keep in (1, 64, 576))


@torch.no_grad()
def test_in_a_model_tokens_go_before_the_layer():
    family = FAMILIES["llava-clip"]
    batch = prompt(family, [[0], [0]])
    with vistok.apply(family.model, DART(), keep=12) as session:
        family.model(**batch.inputs)
    for picture in session.pictures:
        assert picture.tokens_kept == 16 and picture.layers == {2: 8}
        assert len(picture.layer_keep[2]) == 8


@pytest.mark.parametrize(("name", "wrong"), [("visual_pivots", 0), ("text_pivots", -1), ("layer", -1)])
def test_wrong_hyper_parameters_are_named(name, wrong):
    with pytest.raises(ValueError, match=name):
        DART(**{name: wrong})


@pytest.mark.parametrize(("pruned", "holds"), [(0.73, True), (0.71, False)])
def test_claim(pruned, holds):
    trial = Trial(dense=0.8, DART=pruned)
    outcome = dart.claim(trial)
    assert (outcome.baseline, outcome.value, outcome.holds) == (0.8, pruned, holds)
    assert {keep for _, method, keep, _ in trial.calls if method} == {1 / 9}
