"""Answers, tokens, recall and cost of a method, against the model by itself and against brute force."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import vistok
from vistok.bench import measure
from vistok.bench.measure import (
    Case,
    answer_all,
    cases_of,
    cost_all,
    evidence_recall,
    fit_of,
    mean_recall,
    method_name,
    resized,
)
from vistok.bench.trial import WorldTrial
from vistok.world import sample
from vistok.zoo.asking import ask, encode, is_right


@pytest.fixture(scope="module")
def cases():
    return cases_of(list(sample("all", 4, split="test", questions=2)))


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(16, 16), (21, 13)]), st.sampled_from([(4, 4), (3, 5)]))
def test_recall_is_the_share_of_pixels_in_kept_cells(seed, size, grid):
    rng = np.random.default_rng(seed)
    evidence = rng.random(size) < 0.2
    keep = rng.choice(grid[0] * grid[1], rng.integers(1, 9), replace=False)
    seen = total = 0
    for y, x in np.argwhere(evidence):
        cell = (y * grid[0] // size[0]) * grid[1] + x * grid[1] // size[1]
        seen, total = seen + (cell in keep), total + 1
    assert evidence_recall(evidence, grid, keep.tolist()) == pytest.approx(seen / total if total else 1.0)


def test_recall_counts_layers_as_tokens_are_counted():
    evidence = np.zeros((4, 4), bool)
    evidence[0] = True
    seen = SimpleNamespace(grid=(4, 4), keep=torch.arange(8), layer_keep={2: torch.tensor([0, 1])})
    assert mean_recall(evidence, seen, 4) == pytest.approx((1 + 1 + 0.5 + 0.5) / 4)
    assert mean_recall(evidence, SimpleNamespace(grid=None), 4) is None


def test_dense_answers_are_those_of_the_model_by_itself(model, processor, cases):
    alone = ask(model, processor, [c.picture for c in cases], [c.question for c in cases], batch_size=3)
    found = answer_all(model, processor, None, 1.0, cases, batch_size=3)
    assert [a.answer for a in found] == alone
    for answered, case in zip(found, cases, strict=True):
        assert (answered.tokens_in, answered.tokens_kept, answered.evidence_recall) == (196, 196, 1.0)
        assert answered.correct == is_right(case.truth, answered.answer)
        assert answered.overlay is None


def test_a_method_is_counted_by_case(model, processor, cases):
    told = []
    found = answer_all(model, processor, "uniform", 0.25, cases, batch_size=3, overlay_side=224, on_batch=told.append)
    assert told == [3, 3, 2]
    for answered, case in zip(found, cases, strict=True):
        assert (answered.tokens_in, answered.tokens_kept) == (196, 49)
        assert answered.overlay.size == (224, 224)
        drawn = np.asarray(answered.overlay, int)
        whole = np.asarray(resized(case.picture, 224), int)
        bright = (drawn == whole).all(axis=2).reshape(14, 16, 14, 16).all(axis=(1, 3))
        assert bright.sum() >= 49
        cells = case.truth.evidence.reshape(14, 8, 14, 8).transpose(0, 2, 1, 3).reshape(14, 14, 64)
        assert answered.evidence_recall <= cells[bright].sum() / cells.sum() + 1e-9


def test_staged_methods_are_counted_by_their_mean(model, processor, cases):
    class Staged(vistok.host.Reducer):
        def select(self, evidence, keep):
            return torch.arange(keep).expand(len(evidence.features), keep)

        def schedule(self, num_tokens, keep, num_layers):
            return vistok.host.Schedule(2 * keep - 10, {1: 10})

        def at_layer(self, evidence, keep, layer):
            rows = torch.arange(keep).expand(len(evidence.features), keep)
            return vistok.host.Reduction.select(evidence.features, rows)

    (answered,) = answer_all(model, processor, Staged(), 40, cases[:1])
    assert answered.tokens_kept == 40
    evidence = cases[0].truth.evidence
    by_layer = [evidence_recall(evidence, (14, 14), range(count)) for count in (70, 10)]
    assert answered.evidence_recall == pytest.approx(sum(by_layer) / 2)


def test_cost_takes_turns_and_leaves_out_the_warm_up(model, processor, cases, monkeypatch):
    ran, clock = [], [0.0]
    generate = type(model).generate

    def watched(self, *args, **kwargs):
        ran.append(1)
        clock[0] += 0.001 * len(ran)  # every call takes a millisecond more than the one before it
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "generate", watched)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    costs = cost_all(model, processor, [(None, 1.0), ("random", 49)], cases[0], repeats=3)
    assert len(ran) == 2 * (1 + 3)
    # Calls 1 and 2 warm up; dense is timed in calls 3, 5, 7 and random in 4, 6, 8.
    assert [cost.ttft_ms for cost in costs] == pytest.approx([5, 6])
    assert costs[1].flops < costs[0].flops
    assert costs[1].kv_bytes < costs[0].kv_bytes


def test_cost_counts_what_the_model_computes(model, processor, cases):
    from torch.utils.flop_counter import FlopCounterMode

    (cost,) = cost_all(model, processor, [(None, 1.0)], cases[0], repeats=1)
    inputs = encode(processor, [cases[0].picture], [cases[0].question])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = model(**inputs, logits_to_keep=1)
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=0.01)
    keys = output.past_key_values.layers
    assert cost.kv_bytes == sum(t.numel() * t.element_size() for layer in keys for t in (layer.keys, layer.values))


def test_names():
    names = [
        method_name(m) for m in (None, "dense", "pool", vistok.create("vtc-cls"), ["random", vistok.create("pool")])
    ]
    assert names == ["dense", "dense", "pool", "vtc-cls", "random+pool"]


@pytest.mark.parametrize(
    ("given", "side", "right"),
    [
        ((112, 112), 336, (336, 336)),
        ((100, 50), 336, (300, 150)),
        ((2000, 1000), 336, (336, 168)),
        ((336, 10), 336, (336, 10)),
        ((4000, 1), 336, (336, 1)),
    ],
)
def test_resized(given, side, right):
    assert resized(Image.new("RGB", given), side).size == right


def test_fit(processor):
    seen = SimpleNamespace(crops=())
    assert fit_of(processor, seen) == "stretch"
    llava = SimpleNamespace(image_processor=SimpleNamespace(do_center_crop=True, size={"shortest_edge": 336}))
    assert fit_of(llava, seen) == "crop"
    assert fit_of(llava, SimpleNamespace(crops=((24, 24),))) == "stretch"


def test_a_trial_asks_each_thing_once(model, processor, folder, monkeypatch):
    trial = WorldTrial(str(folder), pictures=4)
    calls = []
    monkeypatch.setattr("vistok.bench.trial.answer_all", lambda *a: calls.append(a) or answer_all(*a))
    assert 0 <= trial.accuracy(None) <= 1
    assert trial.accuracy(None) == trial.accuracy(None, 1.0)
    assert trial.evidence_recall("uniform", 0.25, ("existence",)) > 0
    assert len(calls) == 2
    assert all(c.truth.family == "existence" for c in calls[1][-1])
    assert trial.ttft_ms(None) > 0
    with pytest.raises(ValueError, match="tasks: got"):
        trial.accuracy(None, tasks=("nope",))


def test_a_case_without_truth_is_not_judged(model, processor):
    case = Case(Image.new("RGB", (50, 30)), "is there a star?")
    (answered,) = answer_all(model, processor, "random", 5, [case])
    assert (answered.correct, answered.evidence_recall) == (None, None)
