"""AIM and its merging alone: what the sheet says must hold, the counts of a schedule, and the stages in a model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vistok
from tests.host.families import FAMILIES, prompt
from tests.host.reference import language_inputs, one_row
from tests.reduce.synthetic import Trial, evidence
from vistok.core.merge import soft_matching_rounds
from vistok.core.score import pagerank
from vistok.host.reducer import Evidence
from vistok.reduce import aim, aim_merge
from vistok.reduce.aim import AIM, importance, linear_counts, linear_rates
from vistok.reduce.aim_merge import AIMMerge

BOTH = [AIM, AIMMerge]


# Merging ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", BOTH)
@pytest.mark.parametrize("keep", [1, 7, 15, 16, 32, 63])
def test_a_slot_is_the_mean_of_its_group_after_one_round(system, keep):
    """32 of 64: one full round, fewer: several. A slot of one round is the plain mean of the tokens in it."""
    seen = evidence(system(), (8, 8))
    reduction = system().reduce(seen, keep)
    assert reduction.tokens.shape == (3, keep, 12) and bool((reduction.source >= 0).all())
    anchor, tokens, source = soft_matching_rounds(seen.features, keep)
    assert torch.equal(reduction.keep, anchor) and torch.equal(reduction.tokens, tokens)
    assert torch.equal(reduction.source, source)
    if keep >= 32:
        for picture in range(3):
            for slot in range(keep):
                mean = seen.features[picture, reduction.source[picture] == slot].mean(0)
                torch.testing.assert_close(reduction.tokens[picture, slot], mean)


@pytest.mark.parametrize("system", BOTH)
def test_released_order_has_the_same_slots(system):
    seen = evidence(system(), (7, 7))
    ours, theirs = system().reduce(seen, 13), system(parity="authors").reduce(seen, 13)
    anchor, tokens, _ = soft_matching_rounds(seen.features, 13, "author")
    assert torch.equal(theirs.keep, ours.keep) and torch.equal(theirs.tokens, tokens)
    for picture in range(3):
        for slot, at in enumerate(anchor[picture].tolist()):
            place = ours.keep[picture].tolist().index(at)
            assert torch.equal(ours.tokens[picture, place], theirs.tokens[picture, slot])
            assert torch.equal(ours.source[picture] == place, theirs.source[picture] == slot)
    assert anchor.tolist() != ours.keep.tolist()


@pytest.mark.parametrize("system", BOTH)
def test_equal_tokens_stay_equal(system):
    x = torch.randn(1, 1, 5).expand(2, 20, 5)
    torch.testing.assert_close(system().reduce(Evidence(features=x), 6).tokens, x[:, :6])


# Pruning ------------------------------------------------------------------------------------------------------------


def test_importance_of_uniform_attention_is_equal_and_never_negative():
    uniform = torch.full((2, 3, 20, 20), 1 / 20)
    torch.testing.assert_close(importance(pagerank(uniform, 5)), torch.full((2, 20), 1 / 20).double())
    assert bool((importance(torch.rand(2, 3, 20)) >= 0).all())
    with_itself = torch.eye(20).expand(1, 3, 20, 20)  # one-hot: nothing moves
    torch.testing.assert_close(importance(pagerank(with_itself, 5)), torch.full((1, 20), 1 / 20).double())


def test_importance_is_the_root_mean_square_over_heads():
    rank = torch.tensor([[[0.3, 0.1, 1e-30], [0.4, 0.1, 2e-30]]])
    torch.testing.assert_close(
        importance(rank), torch.tensor([[0.125**0.5, 0.1, 2.5**0.5 * 1e-30]], dtype=torch.float64), atol=0, rtol=1e-6
    )


def test_a_stage_keeps_the_most_important():
    rank = torch.tensor([[[0.1, 0.5, 0.2, 0.2], [0.1, 0.0, 0.3, 0.6]]])  # squares: 0.02, 0.25, 0.13, 0.40
    seen = Evidence(features=torch.arange(8.0).view(1, 4, 2), llm_importance=rank)
    assert AIM().at_layer(seen, 2, 3).keep.tolist() == [[1, 3]]
    assert AIM().at_layer(seen, 0, 3).tokens.shape == (1, 0, 2)
    assert AIM().layer_needs == {"llm_importance": (0.1, 5)}
    assert AIM(temperature=0.5, iterations=2).layer_needs == {"llm_importance": (0.5, 2)}


def test_published_line():
    rates = linear_rates(28)
    assert rates[:15] == [1] * 15 and rates[22:] == [0] * 6
    assert rates[15:22] == pytest.approx([0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    schedule = AIM().schedule(576, 37, 28)  # 56 * 18.5 / 28 = 37
    assert schedule.input == 56
    assert schedule.layers == {15 + i: 49 - 7 * i for i in range(8)}


@settings(max_examples=40)
@given(st.sampled_from([1, 2, 3, 4, 5, 12, 28, 32]), st.integers(1, 700), st.data())
def test_counts_fall_and_have_the_mean_asked_for(layers, limit, data):
    mean = data.draw(st.integers(1, limit))
    start = data.draw(st.sampled_from([0.1, 0.5, 0.9]))
    rates = linear_rates(layers, start, start + data.draw(st.sampled_from([0.01, 0.3, 1.0])))
    counts = linear_counts(mean, limit, rates)
    assert sum(counts) == mean * layers and len(counts) == layers
    assert counts == sorted(counts, reverse=True) and counts[0] <= limit and counts[-1] >= 0
    if mean == limit:
        assert set(counts) == {limit}


def test_more_than_the_line_allows_for_is_pruned_less_and_not_merged():
    schedule = AIM().schedule(576, 500, 28)
    assert schedule.input == 576 and schedule.mean(28) == 500
    fall = [before - after for before, after in zip([576, *schedule.layers.values()], schedule.layers.values())]  # noqa: B905
    assert set(fall) == {28} and min(schedule.layers.values()) == 352  # still a straight line, of 8 steps


# In a model -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def masked(model, row, gone):
    """Last-token logits of a row whose tokens ``gone[layer]`` are hidden as keys from that layer on, none removed."""
    lm, hidden = model.model.language_model, row["embeds"]
    rotary, length = lm.rotary_emb(hidden, row["positions"]), hidden.shape[1]
    hide = torch.zeros(length, dtype=torch.bool)
    for number, layer in enumerate(lm.layers):
        hide[gone.get(number, torch.tensor([], dtype=torch.int64))] = True
        mask = torch.full((length, length), -torch.inf).triu(1).masked_fill(hide, -torch.inf)
        mask.fill_diagonal_(0)  # what is hidden sees itself, and nobody sees it
        hidden = layer(hidden, attention_mask=mask[None, None], position_embeddings=rotary, position_ids=None)
    return model.lm_head(lm.norm(hidden))[0, -1]


@torch.no_grad()
def test_removing_equals_masking_and_text_stays():
    family = FAMILIES["llava-clip"]
    batch = prompt(family, [[0], [0]])
    with vistok.apply(family.model, "aim", keep=14) as session:
        logits = family.model(**batch.inputs).logits[:, -1]
    given = language_inputs(family.model, **batch.inputs)
    for number, picture in enumerate(session.pictures):
        assert picture.tokens_kept == 16 and picture.layers == {3: 8}
        row = one_row(given, number, batch.inputs["attention_mask"])
        columns = torch.tensor(batch.columns[number][0]) - int(row["real"][0])
        out = torch.ones(16, dtype=torch.bool).index_fill(0, picture.layer_keep[3], False)
        torch.testing.assert_close(logits[number], masked(family.model, row, {3: columns[out]}), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_merging_composes_with_another_method():
    family = FAMILIES["llava-clip"]
    batch = prompt(family, [[0], [0, 0]])
    with vistok.apply(family.model, ["aim-merge", "random"], keep=[8, 4]) as session:
        family.model(**batch.inputs)
    assert [picture.tokens_kept for picture in session.pictures] == [4, 4, 4]


# The rest -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"start": 0.8, "stop": 0.8}, "start and stop: got 0.8 and 0.8"),
        ({"start": 0.0}, "start and stop: got 0.0"),
        ({"temperature": 0.0}, "temperature: got 0.0, must be greater than 0"),
        ({"iterations": -1}, "iterations: got -1, must be 0 or more"),
        ({"parity": "released"}, "parity: got 'released', must be 'paper' or 'authors'"),
    ],
)
def test_wrong_hyper_parameters_are_named(hyper, message):
    with pytest.raises(ValueError, match=message):
        AIM(**hyper)


def test_wrong_parity_of_the_merging_alone():
    with pytest.raises(ValueError, match="parity: got 'released', must be 'paper' or 'authors'"):
        AIMMerge(parity="released")


@pytest.mark.parametrize("module", [aim, aim_merge])
def test_claims(module):
    system = {aim: AIM, aim_merge: AIMMerge}[module].__name__
    assert module.claim(Trial(dense=0.8, **{system: 0.76})).holds
    outcome = module.claim(Trial(dense=0.8, **{system: 0.75}))
    assert not outcome.holds and (outcome.baseline, outcome.value) == (0.8, 0.75)
