"""Measuring the cells of a sweep: a worker loads a model once and answers, counts and times what it is given."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vistok import catalogue
from vistok.host import Reducer, apply
from vistok.host.effort import Effort
from vistok.host.recipe import swap
from vistok.world import sample
from vistok.zoo import load, load_processor
from vistok.zoo.asking import encode

from . import rows
from .compare import case_of
from .compression import cached, weight_bytes
from .corruptions import CORRUPTIONS
from .data import Source
from .measure import DENSE, Answered, Case, answer_all, applied, synchronise
from .metrics import answer_probability, chrf
from .protocols import detail, long_answer, multi_turn, robustness, two_pictures
from .report import surroundings
from .resources import joules, peak_bytes
from .sweep import IDENTITY, Cell, parts_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

REPEATS = 7
SHORT, LONG = 16, 128
"""Tokens that an answer may have."""
DECODED = 8
"""Tokens after the first over which the time of one is taken."""


class Worker:
    """What measures cells in one process; it holds the model that it used last."""

    def __init__(self, folder: Path, device: str | None = None) -> None:
        self.folder, self.device = folder, device
        self._held: tuple[tuple[str, str, str], PreTrainedModel, ProcessorMixin] | None = None

    def model(self, name: str, precision: str, weights: str = "none") -> tuple[PreTrainedModel, ProcessorMixin]:
        """The model in evaluation mode, and its processor."""
        if self._held is None or self._held[0] != (name, precision, weights):
            self._held = None
            bits = None if weights == "none" else weights
            model = load(name, dtype=precision, device=self.device, weights=bits)
            self._held = ((name, precision, weights), model, load_processor(name))
        return self._held[1:]

    def __call__(self, cell: Cell) -> int:
        """Measure ``cell`` and write its rows; how many they are."""
        model, processor = self.model(cell.model, cell.precision, cell.weights)
        with cached(model, cell.cache):
            found = (same if cell.protocol == IDENTITY else asked)(model, processor, cell)
        facts = surroundings()
        about = {
            "machine": facts["machine"],
            "versions": ", ".join(facts[name] for name in ("versions", "commit") if name in facts),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        rows.write(self.folder, cell, [{**row, **about} for row in found])
        return len(found)


def measure(worker: Worker, cell: Cell) -> int:
    """What an engine calls; its ``setup`` makes the worker."""
    return worker(cell)


def method_of(cell: Cell) -> list[Reducer] | None:
    """The reducers of a cell; None for the dense model. What draws, draws with the cell's seed."""
    if cell.method == DENSE:
        return None
    made = []
    for name, steps in parts_of(cell.method):
        reducer = catalogue.create_seeded(name, cell.seed, **dict(cell.hyper))
        made.append(swap(reducer, seed=cell.seed, **steps) if steps else reducer)
    return made


def cases_of(cell: Cell) -> list[Case]:
    """The questions of a cell: at most one a picture, of the user's or on pictures that no model of the zoo was trained
    on."""
    if cell.source is not None:
        return _of_the_user(cell, cell.source)
    whole = cell.protocol in ("detail", "reuse-first", "reselect")
    pictures = list(sample(cell.task, cell.n, seed=cell.seed, split="test", **({} if whole else {"questions": 1})))
    if cell.protocol == "detail":
        return [case for picture in pictures for case in detail([picture])[:1]]
    if cell.protocol == "long-answer":
        return long_answer(pictures)
    if whole:
        return multi_turn(pictures)
    return _posed(cell, [case_of(picture, picture.questions[0]) for picture in pictures])


def _of_the_user(cell: Cell, source: Source) -> list[Case]:
    if source.digest() != cell.data:
        raise ValueError(f"data: {cell.task} has changed since the sweep began, it must stay as it was")
    cases = source.cases(None if cell.protocol in ("reuse-first", "reselect") else cell.n, cell.seed)
    if cell.protocol == "detail":
        return detail(cases)
    if cell.protocol == "long-answer":
        return long_answer(cases)
    if cell.protocol in ("reuse-first", "reselect"):
        return multi_turn(cases)[: cell.n]
    return _posed(cell, cases)


def _posed(cell: Cell, cases: list[Case]) -> list[Case]:
    """Those protocols that take any case."""
    if cell.protocol == "two-pictures":
        return two_pictures(cases)
    kind, _, level = cell.protocol.rpartition("-")
    return robustness(cases, kind, int(level), cell.seed) if kind in CORRUPTIONS else cases


def asked(model: PreTrainedModel, processor: ProcessorMixin, cell: Cell) -> list[dict[str, Any]]:
    """Every question of a cell, answered, counted and timed."""
    cases, method = cases_of(cell), method_of(cell)
    if not cases:
        raise ValueError(f"protocol: {cell.protocol} finds no question in {cell.n} pictures of {cell.task}")
    cost = clock(model, processor, method, cell.keep, cases[0])
    cost["weight_bytes"] = weight_bytes(model, cell.weights)
    long, reselect = cell.protocol == "long-answer", cell.protocol == "reselect"
    tokens = LONG if long else SHORT
    found = answer_all(model, processor, method, cell.keep, cases, max_new_tokens=tokens, reselect=reselect)
    measured = cell.probabilities and not long and cases[0].first is None
    sure: Sequence[Any] = [{}] * len(cases)
    if measured:
        sure = probabilities(model, processor, method, cell.keep, cases, found)
    return [
        {
            **_asked(cell, number, case),
            "answer": one.answer,
            "correct": one.correct,
            "chrf": chrf(one.answer, case.truth.answer) if case.truth and long else None,
            "tokens_in": one.tokens_in,
            "tokens_input": one.tokens_input,
            "tokens_mean": one.tokens_kept,
            "evidence_recall": one.evidence_recall,
            "kept": list(one.kept),
            "grid_height": one.grid[0] if one.grid else None,
            "grid_width": one.grid[1] if one.grid else None,
            **known,
            **cost,
        }
        for number, (case, one, known) in enumerate(zip(cases, found, sure, strict=True))
    ]


def probabilities(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    method: Any,
    keep: float | int,
    cases: Sequence[Case],
    found: Sequence[Answered],
) -> list[dict[str, float | None]]:
    """Of each case: {"confidence": of the answer that was given, "probability": of the right one}, None where there is
    no such answer."""

    def of(numbers: Sequence[int], answers: Sequence[str]) -> dict[int, float]:
        pictures, questions = [cases[i].pictures for i in numbers], [cases[i].question for i in numbers]
        with applied(model, method, keep):
            likely = answer_probability(model, processor, pictures, questions, answers)
        return dict(zip(numbers, likely.product.tolist(), strict=True))

    said = [number for number, one in enumerate(found) if one.answer]
    confidence = of(said, [found[number].answer for number in said])
    # An answer that is right as it stands was measured already.
    right = {number: case.truth.answer for number, case in enumerate(cases) if case.truth}
    other = [number for number, answer in right.items() if found[number].answer != answer]
    probability = confidence | of(other, [right[number] for number in other])
    return [
        {"confidence": confidence.get(number), "probability": probability[number] if number in right else None}
        for number in range(len(cases))
    ]


@torch.inference_mode()
def same(model: PreTrainedModel, processor: ProcessorMixin, cell: Cell) -> list[dict[str, Any]]:
    """Whether the method with all tokens kept gives the dense model's logits, bit for bit; nothing is said of methods
    that keep all tokens in any case and spend less on them."""
    cases, method = cases_of(cell), method_of(cell)
    inputs = encode(processor, [case.picture for case in cases], [case.question for case in cases]).to(model.device)
    plain = model(**inputs).logits
    with applied(model, method, 1.0) as session:
        equal = torch.equal(model(**inputs).logits, plain)
    spends = any(isinstance(one, Effort) for one in method or [])
    return [
        {
            **_asked(cell, number, case),
            "correct": None if spends else equal,
            "tokens_in": seen.tokens_in,
            "tokens_input": seen.tokens_kept,
        }
        for number, (case, seen) in enumerate(zip(cases, session.pictures, strict=True))
    ]


def _asked(cell: Cell, number: int, case: Case) -> dict[str, Any]:
    truth = case.truth
    return {
        "question": f"{cell.task}:{cell.seed}:{number}",
        "family": truth.family if truth else None,
        "asked": case.question,
        "truth": truth.answer if truth else None,
    }


@torch.inference_mode()
def clock(
    model: PreTrainedModel, processor: ProcessorMixin, method: Any, keep: float | int, case: Case
) -> dict[str, float | None]:
    """What one question costs, of a dialogue the prompt with the picture: milliseconds with dense and method in turn,
    the first round not counted; operations, bytes and joules up to the first token."""
    inputs = encode(processor, [case.pictures], [case.question]).to(model.device)

    def first_token() -> None:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)

    def spend(how: Any) -> tuple[float, float | None]:
        with how:
            synchronise(model)
            start, charged = time.perf_counter(), joules(model.device)
            first_token()
            synchronise(model)
            end, drained = time.perf_counter(), joules(model.device)
        # A meter that has begun anew meanwhile tells nothing.
        used = None if charged is None or drained is None or drained < charged else drained - charged
        return 1e3 * (end - start), used

    with applied(model, method, keep) as session:
        peak = peak_bytes(model.device, first_token)
    counts = {"flops": float(session.flops), "kv_bytes": session.kv_bytes, "peak_bytes": peak}
    dense, ours, energy, parts = [], [], [], []
    for _ in range(REPEATS + 1):
        dense.append(spend(nullcontext())[0])
        taken, used = spend(apply(model, method, keep=keep) if method else nullcontext())
        ours.append(taken)
        energy.append(used)
        with applied(model, method, keep) as session:
            model.generate(**inputs, min_new_tokens=DECODED + 1, max_new_tokens=DECODED + 1, do_sample=False)
            parts.append(session.milliseconds)
    low, middle, high = np.percentile(ours[1:], [25, 50, 75])
    told = [used for used in energy[1:] if used is not None]
    return {
        "ttft_ms": float(middle),
        "ttft_spread_ms": float(high - low),
        "ttft_over_dense": statistics.median(a / b for a, b in zip(ours[1:], dense[1:], strict=True)),
        **{
            f"{name}_ms": statistics.median(part[name] for part in parts[1:])
            for name in ("vision", "select", "prefill")
        },
        "decode_ms": statistics.median(part["decode"] for part in parts[1:]) / DECODED,
        "energy_j": statistics.fmean(told) if told else None,
        **counts,
    }
