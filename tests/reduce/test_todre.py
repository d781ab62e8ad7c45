"""ToDRE against plain greedy searches, its stage inside a language model, and what its sheet says must hold."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

import vistok
from tests.host.families import FAMILIES, prompt
from tests.host.reference import language_inputs, one_row, run
from vistok.core.attention import attention_rows
from vistok.host.reducer import Evidence
from vistok.reduce import todre
from vistok.reduce.todre import ToDRE, text_mass


def evidence(seed=0, b=2, n=20, **more):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(b, n, 6, generator=g, dtype=torch.float64)
    return Evidence(**({"features": features, "cls_attention": torch.rand(b, 3, n, generator=g)} | more))


def plain(x, pivot, keep, worst):
    """Greedy with sums or maxima recomputed from scratch: ``worst`` of the cosines to the chosen tokens."""
    unit, chosen = normalize(x, dim=1), [pivot]
    while len(chosen) < keep:
        free = [j for j in range(len(x)) if j not in chosen]
        chosen.append(min(free, key=lambda j: (worst([float(unit[j] @ unit[c]) for c in chosen]), j)))
    return chosen


@settings(max_examples=30)
@given(st.integers(0, 9999), st.integers(1, 19), st.sampled_from(["max-sum", "k-center"]))
def test_against_recomputation(seed, keep, criterion):
    seen, system = evidence(seed), ToDRE(criterion=criterion)
    picks, pivot = system.select(seen, keep), seen.cls_attention.mean(1).argmax(1)
    for i in range(2):
        wanted = plain(seen.features[i], int(pivot[i]), keep, sum if criterion == "max-sum" else max)
        assert picks[i].tolist() == wanted
    assert torch.equal(system.reduce(seen, keep).keep, picks.sort(1).values)


@pytest.mark.parametrize("criterion", ["max-sum", "k-center"])
def test_all_tokens_are_a_permutation_that_starts_at_the_pivot(criterion):
    seen = evidence()
    picks = ToDRE(criterion=criterion).select(seen, 20)
    assert torch.equal(picks.sort(1).values, torch.arange(20).expand(2, 20))
    assert torch.equal(picks[:, 0], seen.cls_attention.mean(1).argmax(1))


@pytest.mark.parametrize("criterion", ["max-sum", "k-center"])
def test_second_pick_comes_from_the_other_cluster(criterion):
    g = torch.Generator().manual_seed(3)
    centres = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).repeat_interleave(8, 0)
    x = (centres + 0.01 * torch.randn(16, 3, generator=g))[None]
    for best in (2, 12):
        attention = torch.zeros(1, 1, 16)
        attention[..., best] = 1
        picks = ToDRE(criterion=criterion).select(Evidence(features=x, cls_attention=attention), 2)
        assert (picks[0, 0] < 8) != (picks[0, 1] < 8)


def test_k_center_radius_is_within_twice_the_optimum():
    seen = evidence(b=1, n=10)
    unit = normalize(seen.features[0], dim=1)
    distance = torch.cdist(unit, unit)

    def radius(chosen):
        return float(distance[:, list(chosen)].amin(1).max())

    for keep in (2, 3, 4):
        picks = ToDRE(criterion="k-center").select(seen, keep)[0].tolist()
        best = min(radius(s) for s in combinations(range(10), keep) if picks[0] in s)
        assert radius(picks) <= 2 * best + 1e-9


def test_pivot_of_a_cut_picture_is_in_the_thumbnail():
    attention = torch.zeros(1, 1, 20)
    attention[..., 3], attention[..., 15] = 0.5, 1.0
    cut = evidence(b=1, cls_attention=attention, crops=((2, 4), (3, 4)))
    assert int(ToDRE().select(cut, 4)[0, 0]) == 3
    whole = evidence(b=1, cls_attention=attention)
    assert int(ToDRE().select(whole, 4)[0, 0]) == 15
    assert ToDRE().reduce(cut, 4).keep.shape == (1, 4)  # one choice over all parts


# Stage 2 ----------------------------------------------------------------------------------------------------------


def causal(seed=0, b=1, system=3, visual=5, text=4, heads=2):
    """Queries, keys and the attention rows of the text of a prompt: system, picture, text."""
    g = torch.Generator().manual_seed(seed)
    m = system + visual + text
    q, k = (torch.randn(b, heads, m, 4, generator=g, dtype=torch.float64) for _ in range(2))
    places = torch.arange(system + visual, m).expand(b, -1)
    rows = attention_rows(q[:, :, system + visual :], k, places=places)
    return rows, slice(system, system + visual)


def test_mass_is_the_share_of_the_rows():
    rows, visual = causal(b=3)
    before, picture, after = rows[..., : visual.start], rows[..., visual], rows[..., visual.stop :]
    masses = [text_mass(part) for part in (before, picture, after)]
    torch.testing.assert_close(sum(masses), torch.ones(3, dtype=torch.float64))
    assert all(bool(((mass >= 0) & (mass <= 1)).all()) for mass in masses)
    plain_share = picture.sum((1, 2, 3)) / rows.sum((1, 2, 3))  # the paper's fraction
    torch.testing.assert_close(masses[1], plain_share)


def test_padded_questions_do_not_count():
    rows, visual = causal(b=2)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    mass = text_mass(rows[..., visual], mask)
    torch.testing.assert_close(mass[1], text_mass(rows[1:, :, :2, visual])[0])
    assert float(text_mass(rows[..., visual], torch.zeros(2, 4, dtype=torch.bool)).sum()) == 0


@pytest.mark.parametrize(("tau", "left"), [(0.0, 5), (0.2, 5), (0.3, 0), (1.1, 0)])
def test_all_or_nothing(tau, left):
    """A question of mass 0.25 for its picture."""
    attention = torch.full((1, 2, 4, 5), 0.05)
    seen = evidence(b=1, n=5, llm_attention=attention)
    reduction = ToDRE(tau=tau).at_layer(seen, 0, 28)
    assert reduction.keep.shape == (1, left) and reduction.tokens.shape == (1, left, 6)
    assert torch.equal(reduction.tokens, seen.features[:, :left])
    assert (reduction.source == (torch.arange(5) if left else -1)).all()


def test_a_question_in_front_of_the_picture_keeps_it():
    unseen = evidence(b=1, n=5, llm_attention=torch.zeros(1, 2, 4, 5))
    assert ToDRE().at_layer(unseen, 0, 28).keep.shape == (1, 5)
    assert ToDRE(tau=1.1).at_layer(unseen, 0, 28).keep.shape == (1, 0)


def test_pictures_that_differ_must_come_alone():
    attention = torch.full((2, 2, 4, 5), 0.05)
    attention[1] = 0.001
    with pytest.raises(ValueError, match="one picture at a time"):
        ToDRE(tau=0.2).at_layer(evidence(n=5, llm_attention=attention), 0, 28)
    assert ToDRE.one_at_a_time and ToDRE.whole_picture


@pytest.mark.parametrize(("layers", "at"), [(32, 28), (28, 24), (12, 10), (6, 5), (2, 1)])
def test_schedule(layers, at):
    schedule = ToDRE().schedule(576, 58, layers)
    assert schedule.input == 58 and dict(schedule.layers) == {at: 0}
    assert 58 * at / layers == schedule.mean(layers)


@pytest.mark.parametrize("tau", [0.0, 1.1])
@torch.no_grad()
def test_in_a_model_late_layers_have_visual_keys_or_none(tau):
    """A random LLaVA of 4 layers, run by hand on what is left: 5 tokens, and before layer 3 all or none of them."""
    family = FAMILIES["llava-clip"]
    model, batch = family.model, prompt(family, [[0], [0]])
    with vistok.apply(model, ToDRE(tau=tau), keep=5) as session:
        got = model(**batch.inputs).logits
    picks = [picture.keep.tolist() for picture in session.pictures]
    assert [len(p) for p in picks] == [5, 5]
    given = language_inputs(model, **batch.inputs)
    for row in range(2):
        by_hand = one_row(given, row, batch.inputs["attention_mask"])
        places = {int(column): place for place, column in enumerate(by_hand["real"])}
        visual = [places[column] for column in batch.columns[row][0]]
        words = set(range(len(places))) - set(visual)
        left = sorted(words | {visual[i] for i in picks[row]})
        late = left if tau == 0 else sorted(words)
        wanted = run(model, by_hand, torch.tensor(left), {3: torch.tensor(late)})
        torch.testing.assert_close(got[row, -len(late) :], wanted, rtol=1e-4, atol=1e-4)


def test_nothing_is_dropped_where_all_is_kept():
    assert not ToDRE().schedule(576, 576, 32).layers
    assert not ToDRE().schedule(576, 58, 1).layers


@pytest.mark.parametrize(("name", "wrong"), [("criterion", "min"), ("tau", -0.1), ("depth", 1.0)])
def test_wrong_hyper_parameters_are_named(name, wrong):
    with pytest.raises(ValueError, match=name):
        ToDRE(**{name: wrong})


@pytest.mark.parametrize(("pruned", "holds"), [(0.77, True), (0.76, False)])
def test_claim(pruned, holds):
    class Trial:
        def accuracy(self, method, keep=1.0, tasks=()):
            assert method is None or (method == ToDRE() and keep == 0.1)
            return 0.8 if method is None else pruned

    outcome = todre.claim(Trial())
    assert (outcome.baseline, outcome.value, outcome.holds) == (0.8, pruned, holds)
