"""Agreement, answer probabilities, calibration and chrF, against values by hand and models run by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BatchFeature

from tests.host.families import FAMILIES, prompt
from vistok.bench.measure import cases_of
from vistok.bench.metrics import (
    agreement,
    answer_probability,
    calibration,
    chrf,
    exact_match,
)
from vistok.bench.statistics import wilson
from vistok.host import Evidence, Reducer, apply
from vistok.world import sample
from vistok.zoo.asking import encode

SAID = ["yes", "KITE", "a red star , a blue ring .", "3", "left", "no", "purple", "white"]


@dataclass(frozen=True)
class Hears(Reducer):
    """Keeps a run of tokens that begins where the question says, and the questions it was shown."""

    seen: list = field(default_factory=list, compare=False)
    whole_picture = True

    @property
    def needs(self):
        return {"text_ids": None}

    def select(self, evidence: Evidence, keep: int) -> torch.Tensor:
        ids = torch.where(evidence.text_mask, evidence.text_ids, 0)
        self.seen.extend([row[row > 0].tolist() for row in ids])
        start = ids.sum(1) % evidence.num_tokens
        return (start[:, None] + torch.arange(keep)) % evidence.num_tokens


@pytest.fixture(scope="module")
def cases():
    found = cases_of(list(sample("all", 4, split="test", questions=2)))
    assert len({len(case.question.split()) for case in found}) > 1  # so that rows are padded
    return found


def by_hand(model, processor, case, answer, method=None):
    """Probabilities of the answer's tokens, one forward a token, no batch and no cache."""
    inputs = encode(processor, [case.picture], [case.question])
    ids = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
    found = []
    for number, token in enumerate(ids):
        so_far = torch.tensor([ids[:number]], dtype=torch.long)
        whole = {
            **inputs,
            "input_ids": torch.cat([inputs["input_ids"], so_far], 1),
            "attention_mask": torch.ones(1, inputs["input_ids"].shape[1] + number, dtype=torch.long),
        }
        with torch.no_grad():
            logits = model(**whole).logits[0, -1]
        found.append(float(logits.softmax(-1)[token]))
    return found


# What was said ---------------------------------------------------------------------------------------------------


def test_exact_match_and_agreement():
    assert exact_match(["Yes ", "no", "KITE"], ["yes", "yes", " kite"]).tolist() == [True, False, True]
    found = agreement(["a", "b", "c", "d"], ["a", "b", "c", "x"])
    assert (found.value, found.low, found.high) == (0.75, *wilson(3, 4))
    with pytest.raises(ValueError, match="right: got 2 for 1"):
        exact_match(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="answers: got none"):
        agreement([], [])


# Probabilities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_probabilities_are_those_of_the_answer_token_by_token(model, processor, cases, batch_size):
    pictures, questions = [c.picture for c in cases], [c.question for c in cases]
    found = answer_probability(model, processor, pictures, questions, SAID, batch_size=batch_size)
    right = [by_hand(model, processor, case, said) for case, said in zip(cases, SAID, strict=True)]
    assert max(map(len, right)) > 4 and min(map(len, right)) == 1
    np.testing.assert_allclose(found.mean, [np.mean(p) for p in right], rtol=1e-4)
    np.testing.assert_allclose(found.product, [np.prod(p) for p in right], rtol=1e-4)


@pytest.mark.parametrize("method", ["uniform", "fastv"])
def test_probabilities_inside_apply(model, processor, cases, method):
    """Against prompts of one row inside, where the last token before the answer is the prompt's."""
    pictures, questions = [c.picture for c in cases], [c.question for c in cases]
    with apply(model, method, keep=0.25) as session:
        found = answer_probability(model, processor, pictures, questions, SAID)
        assert {picture.tokens_in for picture in session.pictures} == {196}
        alone = [
            answer_probability(model, processor, [c.picture], [c.question], [a]).product[0]
            for c, a in zip(cases, SAID, strict=True)
        ]
        first = [by_hand(model, processor, case, said.split()[0])[0] for case, said in zip(cases, SAID, strict=True)]
    np.testing.assert_allclose(found.product, alone, rtol=1e-4)
    single = [number for number, said in enumerate(SAID) if len(processor.tokenizer.tokenize(said)) == 1]
    assert len(single) > 3
    np.testing.assert_allclose(found.mean[single], np.array(first)[single], rtol=1e-4)
    dense = answer_probability(model, processor, pictures, questions, SAID)
    assert np.abs(found.product / dense.product - 1).max() > 1e-3


def test_whole_answers_inside_apply(model, processor, cases):
    """A choice that depends on no text: then prompt and answer may as well be one prompt."""
    with apply(model, "uniform", keep=0.25):
        found = answer_probability(model, processor, [cases[2].picture], [cases[2].question], [SAID[2]])
        right = by_hand(model, processor, cases[2], SAID[2])
    assert found.product[0] == pytest.approx(np.prod(right), rel=1e-4)
    assert found.mean[0] == pytest.approx(np.mean(right), rel=1e-4)


def test_a_method_does_not_hear_the_answer(model, processor, cases):
    pictures, questions = [c.picture for c in cases], [c.question for c in cases]
    method = Hears()
    with apply(model, method, keep=0.25):
        answer_probability(model, processor, pictures, questions, SAID)
        said = list(method.seen)
        method.seen.clear()
        model.generate(**encode(processor, pictures, questions), max_new_tokens=1, do_sample=False)
    assert len(said) == len(cases)
    assert said == method.seen


@pytest.mark.parametrize("name", ["qwen2.5-vl", "internvl"])
def test_probabilities_of_other_families(name):
    """Families that count positions in their own ways; a padded batch with and without a method."""
    family = FAMILIES[name]
    model, rows = family.model, [[0], [0], [0]]
    said = torch.tensor([[30, 31, 33], [0, 34, 35], [0, 0, 36]])

    class Tokens:
        padding_side = "right"

        def __call__(self, texts, **how):
            return BatchFeature({"input_ids": said, "attention_mask": (said > 0).long()})

    class Words:
        tokenizer = Tokens()

        def apply_chat_template(self, messages, **how):
            return ""

        def __call__(self, **how):
            return BatchFeature(dict(prompt(family, rows).inputs))

    whole = prompt(family, rows)
    for use in (None, "uniform"):
        scope = apply(model, use, keep=0.5) if use else torch.no_grad()
        with scope, torch.no_grad():
            found = answer_probability(model, Words(), [None] * 3, [""] * 3, ["x"] * 3)
            right = []
            for number in range(3):
                inputs = prompt(family, rows).inputs
                mine = said[number][said[number] > 0].repeat(3, 1)
                ids = torch.cat([whole.inputs["input_ids"], mine], 1)
                mask = torch.cat([whole.inputs["attention_mask"], torch.ones_like(mine)], 1)
                inputs = {**inputs, "input_ids": ids, "attention_mask": mask}
                if "mm_token_type_ids" in inputs:
                    inputs["mm_token_type_ids"] = torch.nn.functional.pad(
                        inputs["mm_token_type_ids"], (0, mine.shape[1])
                    )
                logits = model(**inputs).logits[:, -mine.shape[1] - 1 : -1].softmax(-1)
                right.append(float(logits.gather(-1, mine[..., None])[number].prod()))
        np.testing.assert_allclose(found.product, right, rtol=2e-3)


def test_what_cannot_be_asked(model, processor, cases):
    picture, question = cases[0].picture, cases[0].question
    with pytest.raises(ValueError, match="answers: got '', must have"):
        answer_probability(model, processor, [picture] * 3, [question] * 3, ["yes", "", "no"])
    with pytest.raises(ValueError, match="answers: got 2 for 1"):
        answer_probability(model, processor, [picture], [question], ["yes", "no"])
    with pytest.raises(ValueError, match="questions: got 0 for 1"):
        answer_probability(model, processor, [picture], [], ["yes"])
    assert answer_probability(model, processor, [], [], []).mean.shape == (0,)
    diffusion = SimpleNamespace(config=SimpleNamespace(mask_token_id=3))
    with pytest.raises(ValueError, match="model: got a masked-diffusion model"):
        answer_probability(diffusion, processor, [picture], [question], ["yes"])


# Calibration -----------------------------------------------------------------------------------------------------


def test_calibration_by_hand():
    sure = [0.95, 0.85, 0.9, 0.3, 0.2, 0.0]
    right = [1, 0, 1, 0, 1, 0]
    found = calibration(sure, right, bins=2)
    # (0, 0.5]: mean 1/6, right 1/3; (0.5, 1]: mean 0.9, right 2/3
    assert found.error == pytest.approx(0.5 * (1 / 3 - 1 / 6) + 0.5 * (0.9 - 2 / 3))
    assert [row["n"] for row in found.table] == [3, 3]
    assert found.table[1] == pytest.approx({"low": 0.5, "high": 1, "n": 3, "confidence": 0.9, "accuracy": 2 / 3})
    found = calibration(sure, right, bins=3, by="mass")
    assert [(row["low"], row["high"], row["n"]) for row in found.table] == [(0, 0.2, 2), (0.3, 0.85, 2), (0.9, 0.95, 2)]
    assert found.error == pytest.approx((0.4 + 0.575 + 0.075) / 3)


def test_edges_belong_to_the_bin_below_and_empty_bins_are_left_out():
    found = calibration([0.2, 0.4, 1.0], [0, 1, 1], bins=5)
    assert [(row["low"], row["high"]) for row in found.table] == [(0, 0.2), (0.2, 0.4), (0.8, 1.0)]
    assert len(calibration([0.5], [1]).table) == 1


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60), st.integers(1, 20))
def test_calibration_bin_by_bin(pairs, bins):
    sure, right = map(np.array, zip(*pairs, strict=True))
    error = 0.0
    for number in range(bins):
        inside = (sure > number / bins) & (sure <= (number + 1) / bins) | ((sure == 0) & (number == 0))
        if inside.any():
            error += abs(right[inside].sum() - sure[inside].sum()) / len(sure)
    found = calibration(sure, right, bins)
    assert found.error == pytest.approx(error)
    assert sum(row["n"] for row in found.table) == len(sure)
    mass = calibration(sure, right, bins, "mass")
    counts = [row["n"] for row in mass.table]
    assert sum(counts) == len(sure) and max(counts) - min(counts) <= 1
    # both are at least the gap of all answers together
    assert min(found.error, mass.error) >= abs(right.mean() - sure.mean()) - 1e-9


def test_a_calibrated_model_has_a_small_error():
    rng = np.random.default_rng(0)
    sure = rng.random(20_000)
    right = rng.random(20_000) < sure
    for by in ("width", "mass"):
        assert calibration(sure, right, by=by).error < 0.02
        assert calibration(sure**0.25, right, by=by).error > 0.2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (([], []), "right: got shape"),
        (([0.5], [1, 0]), "right: got shape"),
        (([1.5], [1]), "confidence: got"),
        (([0.5], [1], 0), "bins: got"),
        (([0.5], [1], 3, "size"), "by: got"),
    ],
)
def test_wrong_arguments_of_calibration(arguments, named):
    with pytest.raises(ValueError, match=named):
        calibration(*arguments)


# chrF ------------------------------------------------------------------------------------------------------------


def test_chrf_by_hand():
    assert chrf("a red star", "a red star") == pytest.approx(100)
    assert chrf("a  redstar", "ared star ") == pytest.approx(100)
    assert chrf("xyz", "abc") == 0
    assert chrf("", "abc") == chrf("abc", "") == chrf("", "") == 0
    # "ab" in "abc": orders 1 and 2; precision 1 and 1, recall 2/3 and 1/2
    recall = (2 / 3 + 1 / 2) / 2
    assert chrf("ab", "abc") == pytest.approx(100 * 5 * recall / (4 + recall))
    # orders 1, 2, 3; "aab": a a b, aa ab, aab; "abb": a b b, ab bb, abb
    share = (2 / 3 + 1 / 2 + 0) / 3
    assert chrf("aab", "abb") == pytest.approx(100 * share)
    assert chrf("ab", "abc", order=1, beta=1) == pytest.approx(100 * 2 * (2 / 3) / (1 + 2 / 3))
    assert chrf("Ab", "ab") < 100


@given(st.text("ab c", max_size=12), st.text("ab c", max_size=12))
def test_chrf_is_a_score(a, b):
    assert 0 <= chrf(a, b) <= 100 + 1e-9
    assert chrf(a, b, beta=1) == pytest.approx(chrf(b, a, beta=1))
    if a.strip():
        assert chrf(a, a) == pytest.approx(100)


@given(st.text("abc de", max_size=20), st.text("abc de", max_size=20))
def test_chrf_equals_sacrebleu(a, b):
    metric = pytest.importorskip("sacrebleu.metrics").CHRF(word_order=0)
    assert chrf(a, b) == pytest.approx(metric.sentence_score(a, [b]).score)
