"""The search: on functions whose best point is known, and on a small model, where it must do what it says it did."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity

import vistok
from vistok.bench import search as module
from vistok.bench.measure import cases_of
from vistok.bench.search import Evaluation, Found, check_space, evaluate, final_states, propose, read_space, search
from vistok.host.setting import read_setting
from vistok.world import sample
from vistok.zoo.asking import encode

SPACE = {"ratio_1": (0.5, 1.0), "cell": (3.0, 24.0), "recycle": [True, False]}


@pytest.fixture(scope="module")
def cases():
    return cases_of(list(sample("all", 3, split="test", questions=1)))


@pytest.fixture(scope="module")
def batch(processor, cases):
    return encode(processor, [c.picture for c in cases], [c.question for c in cases])


def climb(space, value, tokens=lambda hyper: 1.0, *, calls, starts, seed=0):
    """A search without a model."""
    done = []
    for _ in range(calls):
        hyper = propose(space, done, starts=starts, seed=seed)
        done.append(Evaluation(hyper, value(hyper), tokens(hyper), 1.0, 0.0))
    return Found("none", 1, {}, done)


def stand_in(monkeypatch, value=lambda hyper: -abs(hyper["cell"] - 9.0)):
    """``evaluate`` without a model; what it was asked for is in the list."""
    asked = []

    def fake(model, method, batches, plain, keep, fixed, hyper):
        asked.append(hyper)
        return Evaluation(hyper, value(hyper), 49.0, 49.0, 0.5)

    monkeypatch.setattr(module, "evaluate", fake)
    return asked


# The optimiser ------------------------------------------------------------------------------------------------------


def test_finds_the_top_of_a_hill_better_than_its_random_points():
    value = lambda h: -((h["x"] - 0.7) ** 2) - 0.1 * (h["kind"] == "b")  # noqa: E731
    found = climb({"x": (0.0, 1.0), "kind": ["a", "b"]}, value, calls=12, starts=6)
    assert found.best.cosine > max(e.cosine for e in found.evaluations[:6])
    assert abs(found.best.hyper["x"] - 0.7) < 0.05 and found.best.hyper["kind"] == "a"


def test_a_limit_holds_the_best_back_and_is_approached():
    """The more tokens the better, and half of them are allowed."""
    found = climb({"x": (0.0, 1.0)}, lambda h: h["x"], lambda h: 2 * h["x"], calls=9, starts=5)
    assert not all(e.allowed for e in found.evaluations)
    assert 0.47 < found.best.hyper["x"] <= 0.5


def test_best_is_never_worse_than_an_initial_point():
    found = climb({"x": (0.0, 1.0)}, lambda h: float(hash(h["x"]) % 97), calls=6, starts=5)
    assert found.best.cosine == max(e.cosine for e in found.evaluations)
    first = replace(found.evaluations[0], cosine=found.best.cosine)
    assert Found("none", 1, {}, [first, *found.evaluations]).best is first


def test_proposals_depend_on_the_seed_and_on_what_is_done_only():
    space = {"x": (0.0, 1.0), "n": (1, 3), "kind": [None, True, (1, 2)]}
    value = lambda h: float(h["x"])  # noqa: E731
    one, two = (climb(space, value, calls=5, starts=4) for _ in range(2))
    assert one == two and one.evaluations[:4] != climb(space, value, calls=4, starts=4, seed=1).evaluations
    assert propose(space, one.evaluations[:2], starts=4, seed=0) == one.evaluations[2].hyper
    assert len({e.hyper["x"] for e in one.evaluations}) == 5 and all(0 <= e.hyper["x"] <= 1 for e in one.evaluations)
    assert all(type(e.hyper["n"]) is int and 1 <= e.hyper["n"] <= 3 for e in one.evaluations)
    assert all(e.hyper["kind"] in space["kind"] for e in one.evaluations)
    assert propose(space, [], starts=4, seed=0, first={"x": 0.25}) == {"x": 0.25}


def test_nothing_within_the_limit_is_said():
    found = climb({"x": (0.5, 1.0)}, lambda h: 1.0, lambda h: 4 * h["x"], calls=3, starts=3)
    with pytest.raises(ValueError, match=r"^keep: .* none of the 3 settings .* so few tokens \(1.0\); the least was"):
        found.best  # noqa: B018


def test_optuna_is_asked_for_by_name_only_where_it_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert propose({"x": (0.0, 1.0)}, [], starts=1, seed=0, first={"x": 0.5}) == {"x": 0.5}
    with pytest.raises(ImportError, match=r"vistok\[bench\]"):
        propose({"x": (0.0, 1.0)}, [], starts=1, seed=0)


# What is measured ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_cosine_is_of_the_last_tokens_final_hidden_states(model, batch):
    plain = final_states(model, batch)
    before = model(**batch, output_hidden_states=True).hidden_states[-1][:, -1]
    with vistok.apply(model, "vflowopt", keep=0.2, cell=5.0):
        after = model(**batch, output_hidden_states=True).hidden_states[-1][:, -1]
    found = evaluate(model, "vflowopt", [batch], [plain], 0.2, {"cell": 5.0}, {"ratio_1": 0.9833})
    expected = cosine_similarity(before.double(), after.double()).mean()
    assert found.cosine == pytest.approx(float(expected), abs=1e-5) and found.cosine < 1
    assert found.tokens == found.limit == 39 and found.allowed and found.hyper == {"ratio_1": 0.9833}


def test_all_tokens_are_a_cosine_of_exactly_1(model, batch):
    hyper = {"ratio_1": 1.0, "ratio_2": 1.0, "keep": 1.0}
    found = evaluate(model, "vflowopt", [batch], [final_states(model, batch)], 0.25, {}, hyper)
    assert found.cosine == 1 and found.tokens == 196 and not found.allowed


# The search ---------------------------------------------------------------------------------------------------------


def test_search_of_the_systems_own_space_begins_with_its_defaults(model, processor, cases, tmp_path):
    seen = []
    found = search(model, processor, "vflowopt", cases, fixed={"entropy": 0.0}, calls=3, starts=2, on_call=seen.append)
    assert seen == found.evaluations and len(seen) == 3
    space = {"threshold", "cell", "ratio_1", "ratio_2"}
    assert all({*e.hyper} == space and e.tokens == e.limit == 49 for e in seen)
    assert seen[0].hyper == {name: vistok.card("vflowopt").hyper[name] for name in space}
    assert found.best.cosine == max(e.cosine for e in seen) >= seen[0].cosine

    path = found.setting().write(tmp_path / "found.json")
    (reducer,) = read_setting(path).create()
    assert reducer == vistok.create("vflowopt", **found.best.hyper)
    assert read_setting(path).keep == 0.25 and read_setting(path).measured["cosine"] == found.best.cosine


def test_search_over_keep_holds_the_limit(model, processor, cases):
    found = search(model, processor, "fastervlm", cases[:1], keep=40, space={"keep": [20, 40, 60]}, calls=5, starts=5)
    assert found.evaluations[0].hyper == {"keep": 40} and {e.limit for e in found.evaluations} == {40.0}
    assert found.best.tokens <= 40 and found.setting().keep == found.best.hyper["keep"]
    tried = [e.hyper["keep"] for e in found.evaluations]
    assert all((e.seconds == 0) == (e.hyper["keep"] in tried[:i]) for i, e in enumerate(found.evaluations))


def test_a_search_that_was_interrupted_goes_on(model, processor, cases, tmp_path, monkeypatch):
    asked = stand_in(monkeypatch)
    run = lambda calls, journal: search(  # noqa: E731
        model, processor, "vflowopt", cases, space=SPACE, calls=calls, starts=3, journal=journal
    )
    whole = run(5, None)
    journal = tmp_path / "search.jsonl"
    run(4, journal)
    with journal.open("a") as file:  # stopped in the middle of a line
        file.write('{"search": "')
    asked.clear()
    assert run(5, journal) == whole and asked == [e.hyper for e in whole.evaluations[4:]]
    asked.clear()
    assert run(5, journal) == whole and not asked
    lines = [json.loads(line) for line in journal.read_text().splitlines() if line.endswith("}")]
    assert [line["key"] for line in lines] == ["0", "1", "2", "3", "4"]
    # Another search in the same file is another search.
    search(model, processor, "vflowopt", cases[:1], space=SPACE, calls=2, starts=3, journal=journal)
    assert len(asked) == 2


def test_a_journal_gives_choices_back_as_the_space_has_them(model, processor, cases, tmp_path, monkeypatch):
    asked = stand_in(monkeypatch, lambda hyper: hyper["depths"][0])
    space = {"depths": [(0.25, 0.5), (0.5, 0.75)]}
    how = {"space": space, "starts": 2, "journal": tmp_path / "search.jsonl"}
    first = search(model, processor, "vflowopt", cases, calls=3, **how)
    again = search(model, processor, "vflowopt", cases, calls=4, **how)
    assert again.evaluations[:3] == first.evaluations and all(
        e.hyper["depths"] in space["depths"] for e in again.evaluations
    )
    assert len(asked) <= 2


# The space ----------------------------------------------------------------------------------------------------------


def test_space_on_a_command_line():
    texts = [
        "cell=3:24",
        "ratio_1=0.5:1",
        "entropy=-1.0:1",
        "parity=paper|authors",
        "recycle=true|false",
        "layer=-2|-1",
    ]
    assert read_space(texts) == {
        "cell": (3, 24),
        "ratio_1": (0.5, 1),
        "entropy": (-1.0, 1),
        "parity": ["paper", "authors"],
        "recycle": [True, False],
        "layer": [-2, -1],
    }
    for wrong in ("cell", "cell=", "cell=3:a", "cell=1:2:3"):
        with pytest.raises(ValueError, match=f"^space: got '{wrong}'"):
            read_space([wrong])


def test_space_is_made_even():
    checked = check_space("vflowopt", {"cell": (3, 9.5), "ratio_1": (0, 1), "parity": ["paper"]}, {})
    assert checked == {"cell": (3.0, 9.5), "ratio_1": (0, 1), "parity": ["paper"]}
    assert {*check_space("vflowopt", None, {"cell": 3.0})} == {"threshold", "entropy", "ratio_1", "ratio_2"}


@pytest.mark.parametrize(
    ("space", "what"),
    [
        ({"cells": (1.0, 2.0)}, "cells is no hyper-parameter of vflowopt"),
        ({"cell": (2.0, 1.0)}, "two numbers"),
        ({"cell": (1.0, 2.0, 3.0)}, "two numbers"),
        ({"parity": ("paper", "authors")}, "list of choices"),
        ({"parity": "paper"}, "list of choices"),
        ({"parity": []}, "list of choices"),
        ({}, "nothing to tune"),
    ],
)
def test_wrong_spaces_are_named(space, what):
    with pytest.raises(ValueError, match=f"^space: .*{what}"):
        check_space("vflowopt", space, {})


def test_a_system_without_a_space_of_its_own_needs_one():
    with pytest.raises(ValueError, match=r"^space: fastervlm has no search_space"):
        check_space("fastervlm", None, {})


def test_wrong_arguments_are_named(model, processor, cases):
    with pytest.raises(ValueError, match=r"^cases"):
        search(model, processor, "vflowopt", [])
    with pytest.raises(ValueError, match=r"^calls, starts"):
        search(model, processor, "vflowopt", cases, calls=0)
    with pytest.raises(ValueError, match=r"^keep"):
        search(model, processor, "vflowopt", cases, keep=1.5)
