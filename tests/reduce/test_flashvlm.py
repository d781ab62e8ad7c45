"""FlashVLM against plain formulas, and what its sheet says must hold."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core import oracle
from tests.reduce.synthetic import Trial, evidence, rows
from vistok.host.reducer import Evidence
from vistok.reduce import flashvlm
from vistok.reduce.flashvlm import FlashVLM, log_fuse


def question(seed=0, b=2, n=40, tokens=5):
    """Texts of 5, 2, 3, ... tokens of different length; features so alike that relevance is not all in one token."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return Evidence(
        features=normal(b, 1, 6) + 0.05 * normal(b, n, 6),
        encoder_features=normal(b, n, 8),
        cls_attention=(2 * normal(b, 3, n)).softmax(2),
        text=normal(b, tokens, 6) * (3 * normal(b, tokens, 1)).exp(),
        text_mask=torch.arange(tokens) < torch.tensor([tokens, 2, 3])[torch.arange(b) % 3, None],
    )


def rescaled(values):
    low, high = min(values), max(values)
    return [(v - low) / (high - low + 1e-6) for v in values]


def plain_relevance(seen, i, gate=True):
    """The sheet's steps 1 and 2 for one picture."""
    text = [t for t, real in zip(seen.text[i].tolist(), seen.text_mask[i].tolist(), strict=True) if real]
    norms = [math.sqrt(oracle.dot(t, t)) for t in text]
    gates = [n / (max(norms) + 1e-6) if gate else 1.0 for n in norms]
    x = []
    for feature in seen.features[i].tolist():
        sims = [g * oracle.cosine(feature, t) for g, t in zip(gates, text, strict=True)]
        weights = [math.exp((s - max(sims)) / 0.05) for s in sims]
        x.append(sum(s * w for s, w in zip(sims, weights, strict=True)) / sum(weights))
    powers = [math.exp((v - max(x)) / 0.01) for v in x]
    x = rescaled([(p / sum(powers)) ** 2.5 for p in powers])
    at = 0.995 * (len(x) - 1)
    low = sorted(x)[int(at)]
    limit = low + (at - int(at)) * (sorted(x)[min(int(at) + 1, len(x) - 1)] - low)
    return rescaled([v if v >= limit else 0.1 * v for v in x])


@settings(max_examples=15)
@given(st.integers(0, 999), st.booleans())
def test_relevance(seed, gate):
    seen = question(seed, b=3)
    found = FlashVLM(parity="paper" if gate else "authors").relevance(seen)
    for i in range(3):
        torch.testing.assert_close(found[i], torch.tensor(plain_relevance(seen, i, gate), dtype=torch.float64))


@settings(max_examples=15)
@given(st.integers(0, 999), st.integers(1, 39), st.sampled_from([0.0, 0.5, 0.8, 1.0]), st.sampled_from([1, 3, 8, 50]))
def test_selection(seed, keep, important, step):
    """Any count of left-over tokens, odd ones too, and rounds that would drop more than there are even places."""
    seen, system = question(seed), FlashVLM(important=important, step=step)
    found, score = system.reduce(seen, keep).keep, system.scores(seen)
    assert found.shape == (2, keep)
    for i in range(2):
        order = sorted(range(40), key=lambda j: (-float(score[i, j]), j))
        best = order[: int(important * keep)]
        x = seen.encoder_features[i].tolist()
        others = oracle.even_odd([x[j] for j in order], list(range(len(best), 40)), keep - len(best), step, True)
        assert found[i].tolist() == sorted([*best, *(order[j] for j in others)])


def test_without_eta_the_ranking_is_that_of_attention():
    seen = question()
    system = FlashVLM(eta=0, important=1)
    best = seen.cls_attention.mean(1).topk(9).indices.sort(1).values
    assert torch.equal(system.reduce(seen, 9).keep, best)


def test_eta_of_one_ranks_by_the_question_alone():
    seen = question()
    system = FlashVLM(eta=1, important=1, temperature=0.2)  # so soft that none is below the floor
    best = system.relevance(seen).topk(9).indices.sort(1).values
    assert torch.equal(system.reduce(seen, 9).keep, best)
    blind = replace(seen, cls_attention=torch.rand_like(seen.cls_attention))
    assert torch.equal(system.reduce(blind, 9).keep, best)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_log_fuse_is_the_weighted_geometric_mean(attention, relevance, eta):
    a, x = (torch.tensor([[v]], dtype=torch.float64) for v in (attention, relevance))
    fused = float(log_fuse(a, x, eta))
    assert fused == pytest.approx(max(attention, 1e-6) ** (1 - eta) * max(relevance, 1e-6) ** eta)
    assert 0 <= fused <= 1 + 1e-12


def test_the_best_are_always_there():
    seen, system = question(), FlashVLM()
    for keep in (2, 9, 24):
        kept = system.reduce(seen, keep).keep
        for i, best in enumerate(system.scores(seen).topk(keep // 2).indices.tolist()):
            assert set(best) <= set(kept[i].tolist())


def test_background_without_duplicates():
    """Of a pair of twins at an even and an odd place of the ranking, the even one goes first."""
    seen = question(b=1)
    system = FlashVLM(important=0, step=1)
    order = system.scores(seen)[0].argsort(descending=True, stable=True)
    encoded = seen.encoder_features.clone()
    encoded[0, order[10]] = encoded[0, order[17]]
    kept = system.reduce(replace(seen, encoder_features=encoded), 39).keep[0].tolist()
    assert sorted({*range(40)} - {*kept}) == [int(order[10])]


@pytest.mark.parametrize("none", ["masked", "empty"])
def test_without_a_question_the_ranking_is_that_of_attention(none):
    seen = question()
    if none == "masked":
        mute = replace(seen, text_mask=torch.zeros_like(seen.text_mask))
    else:
        mute = replace(seen, text=seen.text[:, :0], text_mask=None)
    system = FlashVLM()
    assert bool((system.relevance(mute) == 0).all())
    assert torch.equal(system.reduce(mute, 12).keep, FlashVLM(eta=0).reduce(seen, 12).keep)


def test_one_picture_without_a_question_does_not_disturb_the_other():
    seen = question()
    mask = seen.text_mask.clone()
    mask[1] = False
    some = FlashVLM().reduce(replace(seen, text_mask=mask), 12)
    assert torch.equal(some.keep[0], FlashVLM().reduce(seen, 12).keep[0])
    assert torch.equal(some.keep[1], FlashVLM(eta=0).reduce(seen, 12).keep[1])


def test_order_of_the_words_and_padding_do_not_matter():
    seen = question(b=1)
    wanted = FlashVLM().relevance(seen)
    torch.testing.assert_close(FlashVLM().relevance(replace(seen, text=seen.text[:, [3, 0, 4, 2, 1]])), wanted)
    longer = torch.cat([seen.text, 100 * torch.ones(1, 2, 6, dtype=torch.float64)], 1)
    mask = torch.arange(7)[None] < 5
    torch.testing.assert_close(FlashVLM().relevance(replace(seen, text=longer, text_mask=mask)), wanted)


def test_released_gate_gives_every_word_the_same_weight():
    seen = question(b=1)
    longer = replace(seen, text=seen.text * torch.tensor([1.0, 5, 1, 1, 0.01])[None, :, None])
    released = FlashVLM(parity="authors")
    torch.testing.assert_close(released.relevance(longer), released.relevance(seen))
    assert not torch.allclose(FlashVLM().relevance(longer), FlashVLM().relevance(seen))


def test_half_precision_does_not_underflow():
    seen = evidence(FlashVLM(), (8, 8), 2)
    half = replace(seen, features=seen.features.half(), text=seen.text.half())
    relevance = FlashVLM().relevance(half)
    assert relevance.dtype == torch.float32 and bool((relevance.amax(1) > 0.5).all())


def test_pictures_of_a_batch_do_not_see_each_other():
    seen = question(b=3)
    whole = FlashVLM().reduce(seen, 11).keep
    for i in range(3):
        assert torch.equal(FlashVLM().reduce(rows(seen, slice(i, i + 1)), 11).keep[0], whole[i])


@pytest.mark.parametrize(
    ("name", "wrong"), [("eta", 1.5), ("top_p", -1.0), ("temperature", 0.0), ("step", 0), ("parity", "both")]
)
def test_wrong_hyper_parameters_are_named(name, wrong):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        FlashVLM(**{name: wrong})


def test_claim_is_92_8_percent_at_5_6():
    assert flashvlm.claim(Trial(dense=0.8, FlashVLM=0.743)).holds
    outcome = flashvlm.claim(trial := Trial(dense=0.8, FlashVLM=0.742))
    assert not outcome.holds and (outcome.baseline, outcome.value) == (0.8, 0.742)
    assert [call[2] for call in trial.calls if call[1] is not None] == [0.056]
