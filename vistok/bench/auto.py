"""The cheapest setting that is good enough: methods x keeps on the user's own questions, or on the world.

Every setting answers the same questions as the dense model. Its accuracy (where a question has no known answer: its
agreement with dense) is held against dense question by question, its cost is measured in turn with all others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vistok.host.setting import Setting
from vistok.zoo.asking import same_answer

from .compare import Setting as Cell
from .journal import Journal, print_of
from .measure import Case, answer_all, cost_all, is_dense, method_name
from .statistics import paired_bootstrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


@dataclass(frozen=True)
class Bound:
    """What a setting must hold; at least one of the two."""

    max_drop: float | None = None
    """Accuracy that may be lost against dense, as a share (0.02 is two points)."""
    ttft_ms: float | None = None
    """Milliseconds to the first token, median on this machine."""
    sure: bool = False
    """True: the whole 95% interval of the drop must stay within ``max_drop``, not only its mean."""

    def __post_init__(self) -> None:
        if self.max_drop is None and self.ttft_ms is None:
            raise ValueError("bound: got neither max_drop nor ttft_ms, must have at least one")
        if self.max_drop is not None and not 0 <= self.max_drop < 1:
            raise ValueError(f"max_drop: got {self.max_drop}, must be a share in [0, 1), 0.02 for two points")
        if self.ttft_ms is not None and not self.ttft_ms > 0:
            raise ValueError(f"ttft_ms: got {self.ttft_ms}, must be above 0")

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether a measured setting keeps to it."""
        drop = row["drop_high"] if self.sure else row["drop"]
        within = self.max_drop is None or drop <= self.max_drop + 1e-12
        return within and (self.ttft_ms is None or row["ttft_ms"] <= self.ttft_ms)


def choose(rows: Sequence[Mapping[str, Any]], bound: Bound) -> Mapping[str, Any] | None:
    """The row with the fewest FLOPs among those that hold ``bound``; None where none does.

    With a bound on time alone anything cheaper would hold as well: then the one that loses least, of equals the one
    with the fewest FLOPs.
    """
    good = [row for row in rows if bound.holds(row)]
    if bound.max_drop is None:
        return min(good, key=lambda row: (row["drop"], row["flops"]), default=None)
    return min(good, key=lambda row: (row["flops"], row["drop"]), default=None)


def measure_settings(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    settings: Sequence[Cell],
    cases: Sequence[Case],
    answers: Sequence[str | None],
    *,
    seed: int = 0,
    tolerant: bool = False,
    journal: Path | None = None,
    on_step: Callable[[int], None] = lambda count: None,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One row a setting, dense first; and the methods that cannot work on this model with the reason.

    ``answers``: what is right for each case, None where that is not known. ``tolerant``: leave out a method that cannot
    work, instead of raising its error. ``journal``: a file of what each setting answered, one JSON line a setting; a
    setting that stands there is not asked again. ``on_step`` is told how many questions were answered.
    """
    noted = Journal(journal, print_of(model, cases, {}) if journal else "")
    said = noted.said
    skipped: dict[str, str] = {}
    measured: list[Cell] = []
    for method, keep in settings:
        key = _key(method, keep)
        if key in said:
            on_step(len(cases))
        else:
            try:
                found = answer_all(model, processor, method, keep, cases, on_batch=on_step)
            except ValueError as error:
                if not tolerant or is_dense(method):
                    raise
                skipped[method_name(method)] = str(error)
                on_step(len(cases))
                continue
            kept = sum(a.tokens_kept for a in found) / len(found)
            noted.add(key, {"answers": [a.answer for a in found], "tokens_kept": kept})
        measured.append((method, keep))
    costs = cost_all(model, processor, measured, cases[0], repeats=7)
    dense = said[_key(*measured[0])]["answers"]
    truth = [known if known is not None else plain for known, plain in zip(answers, dense, strict=True)]
    right = _hits(cases, truth, dense)
    rows = []
    for (method, keep), cost in zip(measured, costs, strict=True):
        found_here = said[_key(method, keep)]
        hits = _hits(cases, truth, found_here["answers"])
        low, high = paired_bootstrap(right, hits, seed=seed)
        rows.append(
            {
                "method": method_name(method),
                "keep": keep,
                "n": len(cases),
                "accuracy": sum(hits) / len(hits),
                "drop": (sum(right) - sum(hits)) / len(hits),
                "drop_low": low,
                "drop_high": high,
                "tokens_kept": found_here["tokens_kept"],
                "ttft_ms": cost.ttft_ms,
                "flops": cost.flops,
                "kv_bytes": cost.kv_bytes,
            }
        )
    return rows, skipped


def setting_of(row: Mapping[str, Any], measured: Mapping[str, Any]) -> Setting:
    """The setting of a chosen row, ready to be written. ``measured``: what to say of how it was found."""
    if row["method"] == method_name(None):  # no method at all: every token stays
        return Setting(("uniform",), 1.0, (), {**row, **measured})
    return Setting(tuple(row["method"].split("+")), row["keep"], (), {**row, **measured})


def _hits(cases: Sequence[Case], truth: Sequence[str], answers: Sequence[str]) -> list[float]:
    """1 for each answer that is the right one, or another that counts as right."""
    also = [case.truth.also if case.truth else () for case in cases]
    told = zip(truth, also, answers, strict=True)
    return [float(any(same_answer(right, answer) for right in (t, *others))) for t, others, answer in told]


def _key(method: Any, keep: float | int) -> str:
    """What a setting is called in the journal: its method with all hyper-parameters, and its keep."""
    return f"{method_name(method)} {method!r} {keep!r}"
