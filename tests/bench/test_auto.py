"""The choice by brute force, the drop by hand, and a run that goes on where it was stopped."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedConfig

from vistok.bench import auto
from vistok.bench.auto import Bound, choose, measure_settings, setting_of
from vistok.bench.measure import Answered, Cost, cases_of
from vistok.world import sample

number = st.integers(-5, 20).map(lambda x: x / 100)
rows_ = st.lists(
    st.fixed_dictionaries(
        {"drop": number, "drop_high": number, "ttft_ms": st.integers(1, 9), "flops": st.integers(1, 5)}
    ),
    max_size=8,
)


@given(rows_, number.filter(lambda x: x >= 0), st.booleans())
def test_cheapest_within_the_drop(rows, most, sure):
    found = choose(rows, Bound(max_drop=most, sure=sure))
    good = [row for row in rows if row["drop_high" if sure else "drop"] <= most]
    assert (found is None) == (not good)
    if found is not None:
        assert found in good and found["flops"] == min(row["flops"] for row in good)


@given(rows_, st.integers(1, 9))
def test_most_accurate_within_the_time(rows, most):
    found = choose(rows, Bound(ttft_ms=most))
    good = [row for row in rows if row["ttft_ms"] <= most]
    assert (found is None) == (not good)
    if found is not None:
        assert found in good and found["drop"] == min(row["drop"] for row in good)


@given(rows_, number.filter(lambda x: x >= 0), st.integers(1, 9))
def test_both_bounds_hold(rows, drop, time):
    found = choose(rows, Bound(drop, time))
    assert found is None or (found["drop"] <= drop and found["ttft_ms"] <= time)


@pytest.mark.parametrize(
    ("given", "message"),
    [({}, "bound: "), ({"max_drop": 2}, "max_drop: got 2"), ({"max_drop": -0.1}, "max_drop"), ({"ttft_ms": 0}, "ttft")],
)
def test_a_bound_must_make_sense(given, message):
    with pytest.raises(ValueError, match=message):
        Bound(**given)


CASES = cases_of(list(sample("scenes", 2, split="test", questions=2)))


@pytest.fixture
def answers(monkeypatch):
    """``answers[method] = [...]`` stands in for the model; a missing one cannot work. Counts the calls."""
    given, calls = {}, []

    def answer_all(model, processor, method, keep, cases, on_batch):
        name = "dense" if method is None else method
        calls.append((name, keep))
        if name not in given:
            raise ValueError(f"{name}: not for this model")
        on_batch(len(cases))
        return [Answered(text, None, 16, 8, 8.0, None) for text in given[name]]

    monkeypatch.setattr(auto, "answer_all", answer_all)
    monkeypatch.setattr(auto, "cost_all", lambda m, p, settings, case, repeats: [Cost(1.0, 2.0, 3)] * len(settings))
    given["calls"] = calls
    return given


class Model(torch.nn.Linear):
    """What a journal looks at."""

    def __init__(self, name="a"):
        super().__init__(2, 2)
        torch.nn.init.ones_(self.weight)
        self.config = PreTrainedConfig(name_or_path=name)


def measured(settings, known, model=None, cases=CASES, **how):
    return measure_settings(model or Model(), None, settings, cases, known, **how)


def test_drop_against_known_answers_and_against_dense(answers):
    answers.update(dense=["a", "b", "c", "x"], one=["A ", "b", "x", "x"])
    known, _ = measured([(None, 1.0), ("one", 0.5)], ["a", "b", "c", "d"])
    assert [(row["method"], row["accuracy"], row["drop"]) for row in known] == [
        ("dense", 0.75, 0.0),
        ("one", 0.5, 0.25),
    ]
    assert (known[0]["drop_low"], known[0]["drop_high"]) == (0, 0)
    assert known[1]["drop_low"] == 0 and known[1]["drop_high"] == 0.75
    agreement, _ = measured([(None, 1.0), ("one", 0.5)], [None] * 4)
    assert [(row["accuracy"], row["drop"]) for row in agreement] == [(1.0, 0.0), (0.75, 0.25)]


def test_a_method_that_cannot_work(answers):
    answers.update(dense=["a"] * 4)
    rows, skipped = measured([(None, 1.0), ("one", 0.5)], [None] * 4, tolerant=True)
    assert [row["method"] for row in rows] == ["dense"]
    assert skipped == {"one": "one: not for this model"}
    with pytest.raises(ValueError, match="not for this model"):
        measured([(None, 1.0), ("one", 0.5)], [None] * 4)


def test_goes_on_where_it_was_stopped(answers, tmp_path):
    answers.update(dense=["a"] * 4, one=["b"] * 4)
    journal, settings = tmp_path / "j.jsonl", [(None, 1.0), ("one", 0.5)]
    counted = []
    first, _ = measured(settings, [None] * 4, journal=journal, on_step=counted.append)
    with journal.open("a") as file:
        file.write('{"setting": "cut o')
    again, _ = measured(settings, [None] * 4, journal=journal, on_step=counted.append)
    assert first == again and answers["calls"] == [("dense", 1.0), ("one", 0.5)]
    assert sum(counted) == 2 * 2 * len(CASES)
    other = cases_of(list(sample("words", 1, split="test", questions=4)))
    measured(settings, [None] * 4, cases=other, journal=journal)
    assert len(answers["calls"]) == 4, "the answers to other questions must not be taken"
    trained = Model()
    torch.nn.init.zeros_(trained.weight)
    measured(settings, [None] * 4, trained, journal=journal)
    assert len(answers["calls"]) == 6, "nor those of another model"


def test_setting_of_a_row():
    row = {"method": "fastervlm+holov", "keep": 0.25, "flops": 1}
    setting = setting_of(row, {"model": "m"})
    assert (setting.methods, setting.keep) == (("fastervlm", "holov"), 0.25)
    assert json.loads(json.dumps(setting.measured)) == {**row, "model": "m"}
    assert setting_of({"method": "dense", "keep": 1.0}, {}).keep == 1.0
