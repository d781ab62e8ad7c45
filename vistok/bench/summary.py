"""A sweep's rows as tables that compare only what may be compared: methods that were left with as many tokens.

Tokens are counted as their mean over the decoder's layers, from the sequence that ran. A method that was asked for a
count but is left with another (yopo keeps all tokens) stands in a table of its own.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vistok.zoo.asking import same_answer

from .measure import DENSE
from .metrics import agreement, calibration
from .statistics import paired_bootstrap, wilson
from .sweep import IDENTITY

if TYPE_CHECKING:
    import polars

PLACE = ("model", "precision", "weights", "cache", "task", "protocol")
"""What stands at the head of a table."""
SETTING = ("method", "hyper", "keep", "counted")
PLAIN = (DENSE, "{}", 1.0, False)
"""The setting of the dense model."""
TIMES = ("ttft_ms", "ttft_spread_ms", "ttft_over_dense", "vision_ms", "select_ms", "prefill_ms", "decode_ms")
COSTS = (*TIMES, "flops", "kv_bytes", "weight_bytes", "peak_bytes", "energy_j")
TOLERANCE = 0.02
"""How far, as a share, two counts of tokens may lie apart in one table."""

Key = tuple[int, str]
Rows = Mapping[Key, Mapping[str, Any]]
"""{(seed, question): row}"""


def summarise(frame: polars.DataFrame, seed: int = 0) -> list[dict[str, Any]]:
    """One row a place and setting, over its seeds.

    Accuracy with its 95% Wilson interval ("accuracy", "_low", "_high"), also by question family ("families"); its
    distance from dense and from random tokens at the same keep ("over_dense", "over_random"), the share of questions
    answered as dense answers them ("agreement") and the fall of the right answers' probability ("probability_drop"),
    each with its 95% interval over the same questions; "calibration_error"; tokens, evidence recall and cost. None
    stands for what was not measured.
    """
    measured = by_setting(frame)
    found = []
    for setting, mine in measured.items():
        place, (method, _, keep, counted) = setting[: len(PLACE)], setting[len(PLACE) :]
        cells = list({row["cell"]: row for row in mine.values()}.values())
        dense = measured.get((*place, *PLAIN), {}) if method != DENSE else {}
        drawn = measured.get((*place, "random", "{}", keep, counted), {}) if method not in (DENSE, "random") else {}
        sure = [row for row in mine.values() if row["confidence"] is not None]
        found.append(
            {
                **dict(zip((*PLACE, *SETTING), setting, strict=True)),
                **_accuracy(mine.values()),
                "families": _families(mine.values()),
                "tokens": statistics.fmean(row["tokens_mean"] for row in mine.values()),
                **{name: _mean(row[name] for row in mine.values()) for name in ("chrf", "evidence_recall")},
                **_over("over_dense", mine, dense, _right, seed),
                **_over("over_random", mine, drawn, _right, seed),
                **_agreement(mine, dense),
                "probability": _mean(row["probability"] for row in mine.values()),
                **_over("probability_drop", dense, mine, _probability, seed),
                "calibration_error": calibration(
                    [row["confidence"] for row in sure], [bool(row["correct"]) for row in sure]
                ).error
                if sure
                else None,
                **{name: _median(row[name] for row in cells) for name in COSTS},
            }
        )
    return found


def by_setting(frame: polars.DataFrame) -> dict[tuple[Any, ...], dict[Key, dict[str, Any]]]:
    """{values of ``PLACE`` and ``SETTING``: {(seed, question): row}}, checks left out.

    Where the right answer is not known, what the dense model says counts as right.
    """
    found: dict[tuple[Any, ...], dict[Key, dict[str, Any]]] = defaultdict(dict)
    for row in frame.iter_rows(named=True):
        if row["protocol"] != IDENTITY:
            found[tuple(row[name] for name in (*PLACE, *SETTING))][row["seed"], row["question"]] = row
    for setting, mine in found.items():
        dense = found.get((*setting[: len(PLACE)], *PLAIN), {})
        for key, row in mine.items():
            if row["correct"] is None and key in dense:
                mine[key] = {**row, "correct": same_answer(dense[key]["answer"] or "", row["answer"] or "")}
    return found


def _accuracy(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    right = [bool(row["correct"]) for row in rows]
    low, high = wilson(sum(right), len(right))
    return {"n": len(right), "accuracy": sum(right) / len(right), "accuracy_low": low, "accuracy_high": high}


def _families(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    found = defaultdict(list)
    for row in rows:
        if row["family"] is not None:
            found[row["family"]].append(row)
    return {name: _accuracy(mine) for name, mine in sorted(found.items())}


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Iterable[float | None]) -> float | None:
    """Of those that are known."""
    known = _known(values)
    return statistics.fmean(known) if known else None


def _median(values: Iterable[float | None]) -> float | None:
    known = _known(values)
    return statistics.median(known) if known else None


def _right(row: Mapping[str, Any]) -> float | None:
    return float(bool(row["correct"]))


def _probability(row: Mapping[str, Any]) -> float | None:
    return row["probability"]


def _over(
    name: str, mine: Rows, theirs: Rows, value: Callable[[Mapping[str, Any]], float | None], seed: int
) -> dict[str, Any]:
    """Mean difference of a value on the questions where both have it, with its interval; None where there are none."""
    both = [
        (mine[key], theirs[key]) for key in mine if key in theirs and None not in (value(mine[key]), value(theirs[key]))
    ]
    if not both:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    ours, others = ([value(row) or 0.0 for row in side] for side in zip(*both, strict=True))
    low, high = paired_bootstrap(ours, others, seed=seed)
    return {name: statistics.fmean(ours) - statistics.fmean(others), f"{name}_low": low, f"{name}_high": high}


def _agreement(mine: Rows, dense: Rows) -> dict[str, Any]:
    both = [key for key in mine if key in dense]
    if not both:
        return dict.fromkeys(("agreement", "agreement_low", "agreement_high"))
    same = agreement(*([rows[key]["answer"] or "" for key in both] for rows in (mine, dense)))
    return {"agreement": same.value, "agreement_low": same.low, "agreement_high": same.high}


def tables(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """``rows`` in tables of one place and of as many tokens (2% apart at most); the dense model heads each of its
    place's, then come the controls, then the most accurate first."""
    found: list[list[Mapping[str, Any]]] = []
    for place in dict.fromkeys(tuple(row[name] for name in PLACE) for row in rows):
        here = [row for row in rows if tuple(row[name] for name in PLACE) == place]
        dense = [row for row in here if row["method"] == DENSE]
        rest = sorted((row for row in here if row["method"] != DENSE), key=lambda row: -row["tokens"])
        while rest:
            # The count of random tokens is what was asked for; without them, the largest count that is left.
            count = next((row["tokens"] for row in rest if row["method"] == "random"), rest[0]["tokens"])
            if rest[0]["tokens"] > count * (1 + TOLERANCE):
                count = rest[0]["tokens"]
            level = [row for row in rest if abs(row["tokens"] - count) <= TOLERANCE * count]
            rest = [row for row in rest if row not in level]
            found.append([*dense, *sorted(level, key=_order)])
    return found


def _order(row: Mapping[str, Any]) -> tuple[int, float]:
    controls = ("random", "uniform", "pool")
    return controls.index(row["method"]) if row["method"] in controls else len(controls), -row["accuracy"]


def changes(before: polars.DataFrame, after: polars.DataFrame, seed: int = 0) -> list[dict[str, Any]]:
    """One row a place and setting that both measured, on the questions that both asked: accuracy before and after, the
    change with its 95% interval, and the verdict: "higher", "lower", or "same" where the interval holds zero."""
    sides = [by_setting(frame) for frame in (before, after)]
    found = []
    for setting in sides[0]:
        old, new = sides[0][setting], sides[1].get(setting, {})
        both = [key for key in new if key in old]
        if not both:
            continue
        change = _over("change", new, old, _right, seed)
        low, high = change.pop("change_low"), change.pop("change_high")
        found.append(
            {
                **dict(zip((*PLACE, *SETTING), setting, strict=True)),
                "questions": len(both),
                "before": statistics.fmean(float(bool(old[key]["correct"])) for key in both),
                "after": statistics.fmean(float(bool(new[key]["correct"])) for key in both),
                **change,
                "low": low,
                "high": high,
                "verdict": "lower" if high < 0 else "higher" if low > 0 else "same",
            }
        )
    return found


def against(frame: polars.DataFrame, method: str, seed: int = 0) -> list[dict[str, Any]]:
    """``summarise``'s rows of ``method`` and its swapped forms, each with "over": its accuracy above ``method``'s at
    the same place and keep, with the 95% interval on the same questions; None for ``method`` itself."""
    measured = by_setting(frame)
    found = []
    for row in summarise(frame, seed):
        if row["method"].partition(":")[0] != method:
            continue
        key = [row[name] for name in (*PLACE, *SETTING)]
        base = [row[name] for name in PLACE] + [method, *key[len(PLACE) + 1 :]]
        theirs = measured.get(tuple(base), {}) if row["method"] != method else {}
        found.append({**row, **_over("over", measured[tuple(key)], theirs, _right, seed)})
    return sorted(found, key=lambda row: [str(row[name]) for name in PLACE] + [-row["keep"], row["method"]])


def broken(frame: polars.DataFrame) -> list[str]:
    """Methods that with all tokens kept were not the dense model, each with its model and precision."""
    checks = frame.filter((frame["protocol"] == IDENTITY) & (frame["correct"] == False))  # noqa: E712
    return sorted({f"{row['method']} on {row['model']} ({row['precision']})" for row in checks.iter_rows(named=True)})
