"""Pictures on which methods win and lose, picked by rule from a sweep's rows, never by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .markdown import as_many, setting_name
from .measure import DENSE, Case
from .rows import cell_of
from .summary import PLACE, SETTING, by_setting
from .sweep import Cell

if TYPE_CHECKING:
    import polars

Row = Mapping[str, Any]
RULES = {
    "win": "Random tokens answer wrong, and methods with as many tokens right.",
    "loss": "The most accurate method of the place answers wrong, and random tokens right.",
    "lost": "The dense model answers right, and every method and control wrong.",
}
HOW = (
    "Of the questions that fit a rule, first comes the one on which the largest share of the methods is right (won) or "
    "wrong (lost); among equals, the one where they give the right answer a probability that lies furthest from that "
    "of random tokens, or where the dense model was surest (lost by all); then the first place, the smaller keep and "
    "the lowest number."
)
EACH = 2
"""Pictures of each rule and model."""
MODEL = PLACE[: PLACE.index("task")]
CONTROLS = ("random", "uniform")


@dataclass(frozen=True)
class Pick:
    """One question, and what was answered to it at one keep."""

    rule: str
    case: Case
    dense: Row
    rows: list[Row]
    """Random and uniform tokens, then the methods, the most accurate at this place first."""
    best: str
    """The method that is the most accurate here."""


def pick(frame: polars.DataFrame, cases_of: Callable[[Cell], Sequence[Case]]) -> list[Pick]:
    """At most ``EACH`` pictures of a rule and model, each from another place where there are several.

    Held against each other are methods with as many tokens as random ones, all of them asked. Left out are rows of
    tokens that form no grid of the picture's shape, and pictures that ``cases_of`` does not give (any more).
    """
    shown: dict[Cell, Sequence[Case]] = {}
    by_rule: dict[tuple[Any, ...], list[tuple[tuple[float, ...], dict[str, Any]]]] = {}
    for number, candidate in enumerate(_candidates(frame)):
        order = (-candidate["share"], -candidate["margin"], number)
        model = tuple(candidate["dense"][name] for name in MODEL)
        by_rule.setdefault((model, candidate["rule"]), []).append((order, candidate))
    found: list[Pick] = []
    for model in dict.fromkeys(model for model, _ in by_rule):
        taken: set[str] = set()
        for rule in RULES:
            ranked = [one for _, one in sorted(by_rule.get((model, rule), []), key=lambda pair: pair[0])]
            places: list[tuple[Any, ...]] = []
            for once in (True, False):  # every place once, before one is there twice
                for one in ranked:
                    dense, rows = one["dense"], one["rows"]
                    place = tuple(dense[name] for name in PLACE)
                    if len(places) == EACH or dense["question"] in taken or (once and place in places):
                        continue
                    case = _case(dense, rows[0], cases_of, shown)
                    if case is not None:
                        found.append(Pick(rule, case, dense, rows, one["best"]))
                        places.append(place)
                        taken.add(dense["question"])
    return found


def _candidates(frame: polars.DataFrame) -> Iterator[dict[str, Any]]:
    """Every question that fits a rule, by place and keep."""
    measured = by_setting(frame)
    groups: dict[tuple[Any, ...], dict[tuple[str, str], Mapping[Any, Row]]] = {}
    for key, rows in sorted(measured.items(), key=lambda pair: pair[0]):
        setting = dict(zip(SETTING, key[len(PLACE) :], strict=True))
        groups.setdefault((key[: len(PLACE)], setting["keep"], setting["counted"]), {})[
            setting["method"], setting["hyper"]
        ] = rows
    for (place, _, _), by_method in groups.items():
        dense = measured.get((*place, DENSE, "{}", 1.0, False))
        random = by_method.get(("random", "{}"))
        if dense is None or random is None:
            continue
        tokens = _mean(random, "tokens_mean")
        level = {
            key: rows
            for key, rows in by_method.items()
            if key[0] != DENSE and tokens is not None and as_many(_mean(rows, "tokens_mean") or 0, tokens)
        }
        ranked = sorted(
            (key for key in level if key[0] not in CONTROLS), key=lambda key: -(_mean(level[key], "correct") or 0)
        )
        if not ranked:
            continue
        names = [*(key for key in level if key[0] in CONTROLS), *ranked]
        for question in random:
            if question in dense and all(question in level[key] for key in names):
                yield from _judged(dense[question], [level[key][question] for key in names])


def _judged(dense: Row, rows: list[Row]) -> Iterator[dict[str, Any]]:
    """The rules that one question fits. ``rows``: controls first, then the most accurate method first."""
    if dense["correct"] is None or not all(row["grid_height"] and row["grid_width"] and row["kept"] for row in rows):
        return
    methods = [row for row in rows if row["method"] not in CONTROLS]
    random = next(row for row in rows if row["method"] == "random")
    right = [row for row in methods if row["correct"]]
    wrong = [row for row in methods if not row["correct"]]
    common = {"dense": dense, "rows": rows, "best": setting_name(methods[0])}
    if not random["correct"] and right:
        yield {**common, "rule": "win", "share": len(right) / len(methods), "margin": _margin(right, random)}
    if random["correct"] and not methods[0]["correct"]:
        yield {**common, "rule": "loss", "share": len(wrong) / len(methods), "margin": -_margin(wrong, random)}
    if dense["correct"] and not any(row["correct"] for row in rows):
        yield {**common, "rule": "lost", "share": 1.0, "margin": dense["probability"] or 0.0}


def _margin(rows: Sequence[Row], random: Row) -> float:
    """How much likelier the right answer is than with random tokens, mean; 0 where it was not asked for."""
    known = [row["probability"] for row in rows if row["probability"] is not None]
    return sum(known) / len(known) - random["probability"] if known and random["probability"] is not None else 0.0


def _mean(rows: Mapping[Any, Row], name: str) -> float | None:
    known = [float(row[name]) for row in rows.values() if row[name] is not None]
    return sum(known) / len(known) if known else None


def _case(
    dense: Row, row: Row, cases_of: Callable[[Cell], Sequence[Case]], shown: dict[Cell, Sequence[Case]]
) -> Case | None:
    """The case of both rows, if it is at hand, is the one that was asked, and has the shape of the grid."""
    case = case_of_row(dense, cases_of, shown)
    return case if case is not None and in_shape(case, row) else None


def case_of_row(row: Row, cases_of: Callable[[Cell], Sequence[Case]], shown: dict[Cell, Sequence[Case]]) -> Case | None:
    """The case of a row, if it is at hand and is the one that was asked; ``shown`` holds those that were drawn."""
    cell = cell_of(row)
    if cell not in shown:
        try:
            shown[cell] = cases_of(cell)
        except (OSError, ValueError):
            shown[cell] = []
    number = row["question"].rpartition(":")[2]
    if not number.isdecimal() or int(number) >= len(shown[cell]):
        return None
    case = shown[cell][int(number)]
    return case if case.question == row["asked"] else None


def in_shape(case: Case, row: Row) -> bool:
    """Whether the kept tokens of a row can be drawn over the picture: a host that cuts a picture to a square would see
    other pixels under the same positions."""
    height, width = row["grid_height"], row["grid_width"]
    if not height or not width:
        return False
    across, down = case.picture.width * height, case.picture.height * width
    return abs(across - down) * min(height, width) <= max(across, down)
