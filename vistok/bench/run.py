"""Measuring the cells of a sweep: a worker loads a model once and answers, counts and times what it is given."""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vistok import catalogue
from vistok.host import Reducer, apply
from vistok.host.effort import Effort
from vistok.world import sample
from vistok.zoo import load, load_processor
from vistok.zoo.asking import encode

from . import rows
from .compare import case_of
from .corruptions import CORRUPTIONS
from .measure import DENSE, Case, answer_all, applied, synchronise
from .metrics import chrf
from .protocols import detail, long_answer, robustness
from .report import surroundings
from .sweep import IDENTITY, Cell

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

REPEATS = 7
SHORT, LONG = 16, 128
"""Tokens that an answer may have."""


class Worker:
    """What measures cells in one process; it holds the model that it used last."""

    def __init__(self, folder: Path, device: str | None = None) -> None:
        self.folder, self.device = folder, device
        self._held: tuple[tuple[str, str], PreTrainedModel, ProcessorMixin] | None = None

    def model(self, name: str, precision: str) -> tuple[PreTrainedModel, ProcessorMixin]:
        """The model in evaluation mode, and its processor."""
        if self._held is None or self._held[0] != (name, precision):
            self._held = None
            self._held = ((name, precision), load(name, dtype=precision, device=self.device), load_processor(name))
        return self._held[1:]

    def __call__(self, cell: Cell) -> int:
        """Measure ``cell`` and write its rows; how many they are."""
        model, processor = self.model(cell.model, cell.precision)
        found = same(model, processor, cell) if cell.protocol == IDENTITY else single(model, processor, cell)
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
    for part in cell.method.split("+"):
        seeded = any(hyper.name == "seed" for hyper in catalogue.hyper_of(part))
        made.append(catalogue.create(part, **({"seed": cell.seed} if seeded else {}) | dict(cell.hyper)))
    return made


def cases_of(cell: Cell) -> list[Case]:
    """The questions of a cell: at most one a picture, on pictures that no model of the zoo was trained on."""
    if cell.protocol == "detail":
        several = sample(cell.task, cell.n, seed=cell.seed, split="test")
        return [case for picture in several for case in detail([picture])[:1]]
    pictures = sample(cell.task, cell.n, seed=cell.seed, split="test", questions=1)
    if cell.protocol == "long-answer":
        return long_answer(list(pictures))
    cases = [case_of(picture, picture.questions[0]) for picture in pictures]
    kind = next((kind for kind in CORRUPTIONS if cell.protocol.startswith(kind)), None)
    return robustness(cases, kind, int(cell.protocol[-1]), cell.seed) if kind else cases


def single(model: PreTrainedModel, processor: ProcessorMixin, cell: Cell) -> list[dict[str, Any]]:
    """One question a prompt."""
    cases, method = cases_of(cell), method_of(cell)
    if not cases:
        raise ValueError(f"protocol: {cell.protocol} finds no question in {cell.n} pictures of {cell.task}")
    cost = clock(model, processor, method, cell.keep, cases[0])
    long = LONG if cell.protocol == "long-answer" else SHORT
    found = answer_all(model, processor, method, cell.keep, cases, max_new_tokens=long)
    return [
        {
            **_asked(cell, number, case),
            "answer": one.answer,
            "correct": one.correct,
            "chrf": chrf(one.answer, case.truth.answer) if case.truth and long == LONG else None,
            "tokens_in": one.tokens_in,
            "tokens_input": one.tokens_input,
            "tokens_mean": one.tokens_kept,
            "evidence_recall": one.evidence_recall,
            **cost,
        }
        for number, (case, one) in enumerate(zip(cases, found, strict=True))
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
) -> dict[str, float]:
    """Milliseconds to the first token of one question, dense and method in turn; the first round is not counted."""
    inputs = encode(processor, [case.picture], [case.question]).to(model.device)

    def spend(how: Any) -> float:
        with how:
            synchronise(model)
            start = time.perf_counter()
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
            synchronise(model)
            return 1e3 * (time.perf_counter() - start)

    dense, ours, parts = [], [], []
    for _ in range(REPEATS + 1):
        dense.append(spend(nullcontext()))
        ours.append(spend(apply(model, method, keep=keep) if method else nullcontext()))
        with applied(model, method, keep) as session:
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
            parts.append(session.milliseconds)
    low, middle, high = np.percentile(ours[1:], [25, 50, 75])
    return {
        "ttft_ms": float(middle),
        "ttft_spread_ms": float(high - low),
        "ttft_over_dense": statistics.median(a / b for a, b in zip(ours[1:], dense[1:], strict=True)),
        **{
            f"{name}_ms": statistics.median(part[name] for part in parts[1:])
            for name in ("vision", "select", "prefill")
        },
        "flops": float(session.flops),
        "kv_bytes": session.kv_bytes,
    }
