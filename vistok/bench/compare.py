"""All methods on the same questions, in one run: on a few pictures that are shown, or on many that are counted."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from vistok.world import FAMILIES, Picture, Question, derive_seed, make, photos, sample

from .measure import Answered, Case, Cost, answer_all, cost_all, is_dense, method_name
from .statistics import paired_bootstrap, wilson

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

OVERLAY_SIDE = 336
DRAWN = {("scenes", 28): "shape", ("words", 57): "reading", ("charts", 14): "chart", ("forms", 7): "key-value"}
PHOTOGRAPHS = {"astronaut": "is there an orange object?", "coffee": "what colour is the circle?"}

Setting = tuple[Any, float | int]
"""(method as for ``vistok.apply`` or None for dense, keep)"""


@dataclass(frozen=True)
class Look:
    """What one method made of one case."""

    method: str
    keep: float | int
    answered: Answered
    cost: Cost

    def row(self, case: Case) -> dict[str, Any]:
        """As one JSON row."""
        found = self.answered
        return {
            "method": self.method,
            "keep": self.keep,
            "tokens_in": found.tokens_in,
            "tokens_kept": found.tokens_kept,
            "answer": found.answer,
            "correct": found.correct,
            "ttft_ms": self.cost.ttft_ms,
            "flops": self.cost.flops,
            "kv_bytes": self.cost.kv_bytes,
            "evidence_recall": found.evidence_recall,
            "picture": case.name,
            "question": case.question,
            "truth": case.truth.answer if case.truth else None,
        }


@dataclass(frozen=True)
class Comparison:
    """Every method on every case. ``looks[i][j]``: case i, setting j; dense is the first setting."""

    cases: list[Case]
    looks: list[list[Look]]
    skipped: dict[str, str] = field(default_factory=dict)
    """Methods that cannot work on this model, and why."""

    @property
    def shown(self) -> Comparison:
        """What overlays are drawn of."""
        return self

    @property
    def rows(self) -> list[dict[str, Any]]:
        """JSON rows, one a case and setting."""
        return [look.row(case) for case, line in zip(self.cases, self.looks, strict=True) for look in line]

    def summary(self) -> list[dict[str, Any]]:
        """One row a setting: means over the cases; ``right`` of ``judged`` answers where the truth is known."""
        return [summarise(list(column)) for column in zip(*self.looks, strict=True)]


@dataclass(frozen=True)
class Survey:
    """Every method on many questions of the world."""

    task: str
    rows: list[dict[str, Any]]
    """JSON rows, one a setting."""
    families: list[dict[str, Any]]
    """The same for each question family by itself; "family" is its name."""
    shown: Comparison
    """A few of the pictures."""


def summarise(looks: Sequence[Look]) -> dict[str, Any]:
    """Means of what one method made of several cases."""
    judged = [look.answered.correct for look in looks if look.answered.correct is not None]
    recalls = [look.answered.evidence_recall for look in looks if look.answered.evidence_recall is not None]
    return {
        "method": looks[0].method,
        "keep": looks[0].keep,
        "tokens_in": statistics.fmean(look.answered.tokens_in for look in looks),
        "tokens_kept": statistics.fmean(look.answered.tokens_kept for look in looks),
        "right": sum(judged),
        "judged": len(judged),
        "ttft_ms": statistics.fmean(look.cost.ttft_ms for look in looks),
        "flops": statistics.fmean(look.cost.flops for look in looks),
        "kv_bytes": statistics.fmean(look.cost.kv_bytes for look in looks),
        "evidence_recall": statistics.fmean(recalls) if recalls else None,
    }


def settings_of(methods: Sequence[Any], keeps: Sequence[float | int]) -> list[Setting]:
    """Dense once, and first, since all else is measured against it; then every method with every keep."""
    return [(None, 1.0), *((method, keep) for method in methods if not is_dense(method) for keep in keeps)]


def sample_cases(size: int = 112) -> list[Case]:
    """The fixed sample: a held-out picture of each task of the world, and two photographs if scikit-image is here.

    Asked is the question of the family in ``DRAWN`` whose answer lies in the fewest pixels. A drawn picture is called
    as ``vistok ask`` takes it.
    """
    cases = []
    for (task, number), family in DRAWN.items():
        picture = make(task, derive_seed(0, number, "test"), size)
        asked = [question for question in picture.questions if question.family == family]
        question = min(asked, key=lambda q: int(q.evidence.sum()))
        cases.append(Case(picture.pil(), question.text, question, f"world:{task}:{number}"))
    try:
        real = {photo.name: photo for photo in photos(2 * size)}
    except (ModuleNotFoundError, FileNotFoundError):
        return cases
    return cases + [Case(real[name].pil(), question, name=name) for name, question in PHOTOGRAPHS.items()]


def case_of(picture: Picture, question: Question) -> Case:
    """One of the picture's questions, named by the picture's task."""
    return Case(picture.pil(), question.text, question, picture.task)


def compare_cases(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    settings: Sequence[Setting],
    cases: Sequence[Case],
    *,
    tolerant: bool = False,
    max_new_tokens: int = 16,
    overlay_side: int = OVERLAY_SIDE,
    on_step: Callable[[], None] = lambda: None,
) -> Comparison:
    """Answers, overlays and cost of every setting on every case.

    ``tolerant``: leave out a method that cannot work on this model, instead of raising its error. ``on_step`` is called
    ``len(settings) + len(cases)`` times. Raises ValueError for a keep beyond a picture's tokens.
    """
    answered: dict[int, list[Answered]] = {}
    skipped: dict[str, str] = {}
    for index, (method, keep) in enumerate(settings):
        try:
            answered[index] = answer_all(
                model, processor, method, keep, cases, max_new_tokens=max_new_tokens, overlay_side=overlay_side
            )
        except ValueError as error:
            if not tolerant or is_dense(method):
                raise
            skipped[method_name(method)] = str(error)
        if is_dense(method):
            _check_keeps(settings, [a.tokens_in for a in answered[index]])
        on_step()
    looks = []
    repeats = 5 if len(cases) == 1 else 3  # a mean over several pictures evens out what a median of three does not
    for number, case in enumerate(cases):
        costs = cost_all(model, processor, [settings[i] for i in answered], case, repeats=repeats)
        looks.append(
            [
                Look(method_name(settings[i][0]), settings[i][1], answered[i][number], cost)
                for i, cost in zip(answered, costs, strict=True)
            ]
        )
        on_step()
    return Comparison(list(cases), looks, skipped)


def _check_keeps(settings: Sequence[Setting], tokens: Sequence[int]) -> None:
    """ValueError for a count that a picture does not have; told before a method meets it."""
    for _, keep in settings:
        if isinstance(keep, int) and keep > min(tokens):
            raise ValueError(f"keep: got {keep}, must be at most the {min(tokens)} visual tokens of a picture")


def survey_world(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    settings: Sequence[Setting],
    task: str,
    n: int,
    *,
    seed: int = 0,
    tolerant: bool = False,
    on_step: Callable[[int], None] = lambda count: None,
) -> Survey:
    """Accuracy of every setting on n held-out pictures of ``task`` ("all": of each in turn), one question each.

    One question a picture keeps the answers independent, as the 95% interval takes them to be. Cost is measured on the
    examples. ``on_step`` is told how many questions were answered, ``n * len(settings)`` in all.
    """
    cases = [case_of(p, p.questions[0]) for p in sample(task, n, seed=seed, split="test", questions=1)]
    examples = compare_cases(model, processor, settings, _one_a_task(cases), tolerant=tolerant)
    costs = {(row["method"], row["keep"]): row for row in examples.summary()}
    rows, families = [], []
    hits: dict[Setting, list[bool]] = {}
    for method, keep in settings:
        cost = costs.get((method_name(method), keep))
        if cost is None:  # cannot work on this model
            on_step(n)
            continue
        answered = answer_all(model, processor, method, keep, cases, on_batch=on_step)
        hits[method_name(method), keep] = [bool(a.correct) for a in answered]
        rows.append({"task": task, **survey_row(method, keep, answered), **{k: cost[k] for k in COSTS}})
        families += [
            {"family": family, **survey_row(method, keep, of_family)}
            for family in FAMILIES
            if (of_family := [a for a, c in zip(answered, cases, strict=True) if c.truth and c.truth.family == family])
        ]
    for row in rows:
        row.update(_beside(hits, row["method"], row["keep"], seed))
    return Survey(task, rows, families, examples)


def _beside(hits: dict[Setting, list[bool]], name: str, keep: float | int, seed: int) -> dict[str, Any]:
    """Accuracy minus dense's, and minus that of random tokens at the same keep, each with the 95% interval over the
    same questions; None where the other was not measured."""
    dense = next(found for (method, _), found in hits.items() if is_dense(method))
    found: dict[str, Any] = {}
    for other, theirs in (("dense", dense), ("random", hits.get(("random", keep)))):
        ours = hits[name, keep]
        low, high = (None, None) if theirs is None else paired_bootstrap(ours, theirs, seed=seed)
        found[f"over_{other}"] = None if theirs is None else (sum(ours) - sum(theirs)) / len(ours)
        found[f"over_{other}_low"], found[f"over_{other}_high"] = low, high
    return found


COSTS = ("ttft_ms", "flops", "kv_bytes")


def survey_row(method: Any, keep: float | int, answered: Sequence[Answered]) -> dict[str, Any]:
    """Means over questions whose truth is known, with the 95% interval of the accuracy."""
    right = sum(bool(a.correct) for a in answered)
    low, high = wilson(right, len(answered))
    recalls = [a.evidence_recall for a in answered if a.evidence_recall is not None]
    return {
        "method": method_name(method),
        "keep": keep,
        "tokens_in": statistics.fmean(a.tokens_in for a in answered),
        "tokens_kept": statistics.fmean(a.tokens_kept for a in answered),
        "answer": None,
        "correct": None,
        "n": len(answered),
        "accuracy": right / len(answered),
        "accuracy_low": low,
        "accuracy_high": high,
        "evidence_recall": statistics.fmean(recalls) if recalls else None,
    }


def _one_a_task(cases: Sequence[Case], most: int = 4) -> list[Case]:
    """The first case of each task; of a single task the first four."""
    by_task: dict[str, list[Case]] = {}
    for case in cases:
        by_task.setdefault(case.name, []).append(case)
    turns = zip_longest(*by_task.values())
    return [case for turn in turns for case in turn if case is not None][:most]
