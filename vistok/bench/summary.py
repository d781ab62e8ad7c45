"""A sweep's rows as tables that compare only what may be compared: methods that were left with as many tokens.

Tokens are counted as their mean over the decoder's layers, from the sequence that ran. A method that was asked for a
count but is left with another (yopo keeps all tokens) stands in a table of its own.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .measure import DENSE
from .statistics import paired_bootstrap, wilson
from .sweep import IDENTITY

if TYPE_CHECKING:
    import polars

PLACE = ("model", "precision", "task", "protocol")
"""What stands at the head of a table."""
SETTING = ("method", "hyper", "keep", "counted")
COSTS = ("ttft_ms", "ttft_spread_ms", "ttft_over_dense", "vision_ms", "select_ms", "prefill_ms", "flops", "kv_bytes")
TOLERANCE = 0.02
"""How far, as a share, two counts of tokens may lie apart in one table."""


def summarise(frame: polars.DataFrame, seed: int = 0) -> list[dict[str, Any]]:
    """One row a place and setting, over its seeds: accuracy with its 95% Wilson interval, its distance from dense and
    from random tokens at the same keep with 95% intervals over the same questions, tokens, evidence recall and cost."""
    measured = by_setting(frame)
    found = []
    for setting, mine in measured.items():
        place, (method, _, keep, counted) = setting[: len(PLACE)], setting[len(PLACE) :]
        right = [bool(row["correct"]) for row in mine.values()]
        low, high = wilson(sum(right), len(right))
        cells = list({row["cell"]: row for row in mine.values()}.values())
        found.append(
            {
                **dict(zip((*PLACE, *SETTING), setting, strict=True)),
                "n": len(right),
                "accuracy": sum(right) / len(right),
                "accuracy_low": low,
                "accuracy_high": high,
                "tokens": statistics.fmean(row["tokens_mean"] for row in mine.values()),
                "chrf": _mean(row["chrf"] for row in mine.values()),
                "evidence_recall": _mean(row["evidence_recall"] for row in mine.values()),
                **{name: statistics.median(row[name] for row in cells) for name in COSTS},
            }
        )
        for other, keys in (("dense", (DENSE, "{}", 1.0, False)), ("random", ("random", "{}", keep, counted))):
            theirs = measured.get((*place, *keys))
            found[-1] |= _over(other, mine, theirs if method not in (DENSE, other) else None, seed)
    return found


def by_setting(frame: polars.DataFrame) -> dict[tuple[Any, ...], dict[tuple[int, str], Mapping[str, Any]]]:
    """{values of ``PLACE`` and ``SETTING``: {(seed, question): row}}, checks left out."""
    found: dict[tuple[Any, ...], dict[tuple[int, str], Mapping[str, Any]]] = defaultdict(dict)
    for row in frame.iter_rows(named=True):
        if row["protocol"] != IDENTITY:
            found[tuple(row[name] for name in (*PLACE, *SETTING))][row["seed"], row["question"]] = row
    return found


def _mean(values: Iterable[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _over(name: str, mine: Mapping[Any, Any], theirs: Mapping[Any, Any] | None, seed: int) -> dict[str, Any]:
    """Accuracy minus the other's on the questions that both were asked; None where there are none."""
    both = [key for key in mine if theirs is not None and key in theirs]
    if theirs is None or not both:
        return dict.fromkeys((f"over_{name}", f"over_{name}_low", f"over_{name}_high"))
    ours, other = ([float(bool(rows[key]["correct"])) for key in both] for rows in (mine, theirs))
    low, high = paired_bootstrap(ours, other, seed=seed)
    return {
        f"over_{name}": statistics.fmean(ours) - statistics.fmean(other),
        f"over_{name}_low": low,
        f"over_{name}_high": high,
    }


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
        over = _over("it", new, old, seed)
        if over["over_it"] is None:
            continue
        low, high = over["over_it_low"], over["over_it_high"]
        both = [key for key in new if key in old]
        found.append(
            {
                **dict(zip((*PLACE, *SETTING), setting, strict=True)),
                "questions": len(both),
                "before": statistics.fmean(float(bool(old[key]["correct"])) for key in both),
                "after": statistics.fmean(float(bool(new[key]["correct"])) for key in both),
                "change": over["over_it"],
                "low": low,
                "high": high,
                "verdict": "lower" if high < 0 else "higher" if low > 0 else "same",
            }
        )
    return found


def broken(frame: polars.DataFrame) -> list[str]:
    """Methods that with all tokens kept were not the dense model, each with its model and precision."""
    checks = frame.filter((frame["protocol"] == IDENTITY) & (frame["correct"] == False))  # noqa: E712
    return sorted({f"{row['method']} on {row['model']} ({row['precision']})" for row in checks.iter_rows(named=True)})
