"""The page of a sweep: HTML in one piece. Its sections are made here as plain dicts; ``sweep.html`` writes them out."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .chart import RING, Point, chart, looks
from .figures import data_url, dropped, evidence_path
from .joint import WHERE, combinations
from .markdown import fair, held_name, joint_order, ordered, place_name, setting_name, signed
from .measure import DENSE, Case
from .pareto import front
from .report import keep_text, template
from .summary import PLACE, broken, tables
from .sweep import Cell
from .wins import EACH, HOW, RULES, Pick, pick

if TYPE_CHECKING:
    import polars

Row = Mapping[str, Any]
CONTROLS = (DENSE, "random", "uniform")
AXES = (("tokens", "Tokens, mean over the layers"), ("ttft_ms", "Milliseconds to the first token"))
STAGES = ("vision_ms", "select_ms", "prefill_ms")
STRONG = 0.3
"""A difference of as much or more has the strongest colour."""
TITLES = {"win": "Won", "loss": "Lost", "lost": "Lost by all"}


@dataclass(frozen=True)
class Column:
    """A column of numbers: what stands at its head, what that means, and the cell of a row."""

    head: str
    about: str
    key: str
    cell: Callable[[Row], dict[str, Any]]


def render(
    frame: polars.DataFrame, found: Sequence[Row], cases_of: Callable[[Cell], Sequence[Case]] | None = None
) -> str:
    """The page of the rows ``frame`` and their summary ``found``. ``cases_of``: gives the pictures of a cell, for
    overlays; left out: those of the world, drawn again by their seeds."""
    if cases_of is None:
        from . import run

        cases_of = run.cases_of
    found = ordered(fair(found))
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in found:
        groups.setdefault(tuple(row[name] for name in PLACE), []).append(row)
    ids = {place: f"place-{number}" for number, place in enumerate(groups, 1)}
    picked = pick(frame, cases_of)
    return template("sweep.html").render(
        title=_title(found),
        facts=_facts(frame),
        broken=broken(frame),
        places=[_place(ids[place], _short(rows[0], groups), rows) for place, rows in groups.items()],
        overviews=_overviews(groups, ids) if len(groups) > 1 else [],
        pictures=[_picture(one, number, ids) for number, one in enumerate(picked, 1)],
        rules=[(TITLES[rule], told) for rule, told in RULES.items()],
        how=HOW,
        each=EACH,
        joints=_joints(frame),
        looks=_looks(found),
        ring=RING,
    )


# The head -------------------------------------------------------------------------------------------------------------


def _title(found: Sequence[Row]) -> str:
    methods = {setting_name(row) for row in found if row["method"] not in CONTROLS}
    given = sorted({(row["counted"], -row["keep"], _keep(row)) for row in found if row["method"] != DENSE})
    keeps = [told for _, _, told in given]
    models, tasks = (list(dict.fromkeys(row[name] for row in found)) for name in ("model", "task"))
    told = f"{len(methods)} method{'s' if len(methods) != 1 else ''} on {', '.join(models)}"
    return f"{told}{' at ' if keeps else ''}{' and '.join(keeps)}: {', '.join(tasks)}"


def _facts(frame: polars.DataFrame) -> dict[str, str]:
    """What ran where and when."""

    def listed(name: str) -> str:
        return "; ".join(map(str, sorted(set(frame[name].drop_nulls()))))

    dates = sorted({date[:10] for date in frame["date"].drop_nulls()})
    return {
        "models": listed("model"),
        "precision": listed("precision"),
        "questions": f"{frame['question'].n_unique()}, in {frame['cell'].n_unique()} cells",
        "seeds": listed("seed"),
        "machine": listed("machine"),
        "versions": listed("versions"),
        "date": " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "",
    }


def _keep(row: Row) -> str:
    return "all" if row["method"] == DENSE else keep_text(int(row["keep"]) if row["counted"] else row["keep"])


def _looks(found: Sequence[Row]) -> dict[str, dict[str, str]]:
    """How each method is drawn, the same on the whole page."""
    return looks(list(dict.fromkeys(setting_name(row) for row in found)), CONTROLS)


# Over all places ------------------------------------------------------------------------------------------------------


def _overviews(groups: Mapping[tuple[Any, ...], list[Row]], ids: Mapping[tuple[Any, ...], str]) -> list[dict[str, Any]]:
    """A table a keep: points of every method above random tokens at every place, the best method first."""
    every = [row for rows in groups.values() for row in rows]
    found = []
    keeps = {(row["counted"], -row["keep"]) for row in every if row["method"] != DENSE}
    for counted, keep in ((counted, -less) for counted, less in sorted(keeps)):
        level = {
            place: {setting_name(row): row for row in rows if (row["keep"], row["counted"]) == (keep, counted)}
            for place, rows in groups.items()
        }
        dense = {place: next((row for row in rows if row["method"] == DENSE), None) for place, rows in groups.items()}
        names = list(dict.fromkeys(name for rows in level.values() for name in rows if name not in (DENSE, "random")))
        means = {name: _mean([rows[name]["over_random"] for rows in level.values() if name in rows]) for name in names}
        names.sort(key=lambda name: (means[name] is None, -(means[name] or 0.0)))
        found.append(
            {
                "keep": keep_text(int(keep) if counted else keep),
                "names": names,
                "means": [_heat_of(means[name]) for name in names],
                "rows": [
                    {
                        "id": ids[place],
                        "name": _short(groups[place][0], groups),
                        "n": max(row["n"] for row in groups[place]),
                        "dense": _percent(dense[place]),
                        "random": _percent(rows.get("random")),
                        "cells": [_over(rows.get(name)) for name in names],
                    }
                    for place, rows in level.items()
                    if rows
                ],
            }
        )
    return found


def _short(row: Row, groups: Mapping[tuple[Any, ...], Any]) -> str:
    """The place of a row without what all places share."""
    varied = [name for name, values in zip(PLACE, zip(*groups, strict=True), strict=True) if len(set(values)) > 1]
    told = [row[name] for name in ("model", "precision") if name in varied]
    told += [held_name(row)] if {"weights", "cache"} & {*varied} else []
    return ", ".join([*told, row["task"], row["protocol"]])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _percent(row: Row | None) -> str:
    return "" if row is None else f"{100 * row['accuracy']:.1f}%"


def _heat_of(value: float | None, told: str = "", certain: bool = False) -> dict[str, Any]:
    """A difference with the sign and the strength (0 to 100) of its colour."""
    if value is None:
        return {"text": "≠" if told else "", "sign": "", "strength": 0, "told": told, "certain": False}
    strength = round(100 * min(abs(value) / STRONG, 1))
    sign = "more" if value > 0 else "less"
    return {"text": signed(value), "sign": sign, "strength": strength, "told": told, "certain": certain}


def _over(row: Row | None) -> dict[str, Any]:
    if row is None:
        return _heat_of(None)
    if row["over_random"] is None:
        return _heat_of(None, f"left with {row['tokens']:.1f} tokens")
    low, high = row["over_random_low"], row["over_random_high"]
    return _heat_of(row["over_random"], f"{signed(low)} to {signed(high)}", low > 0 or high < 0)


# One place ------------------------------------------------------------------------------------------------------------


def _place(key: str, name: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Curves, tables of equal tokens, families and costs of one place."""
    written = all(row["chrf"] is not None for row in rows)
    gain = "chrf" if written else "accuracy"
    fronts = {cost: front(rows, cost, gain) for cost, _ in AXES}
    dense = next((row for row in rows if row["method"] == DENSE), None)
    columns = [column for column in _columns(fronts) if any(row.get(column.key) is not None for row in rows)]
    return {
        "id": key,
        "name": name,
        "where": place_name(rows[0]),
        "n": max(row["n"] for row in rows),
        "dense": _percent(dense),
        "written": written,
        "charts": [one for axis in AXES if (one := _chart(rows, axis, gain, fronts[axis[0]]))],
        "names": list(dict.fromkeys(setting_name(row) for row in rows)),
        "fronts": [
            (label.split(",")[0].lower(), ", ".join(_setting(row) for row in fronts[cost])) for cost, label in AXES
        ],
        "heads": [{"head": column.head, "about": column.about} for column in columns],
        "levels": [
            {
                "tokens": next(
                    (f"{row['tokens']:.1f} tokens" for row in table if row["method"] != DENSE), "all tokens"
                ),
                "rows": [_table_row(row, dense, columns) for row in table],
            }
            for table in tables(rows) or [list(rows)]
        ],
        "families": _families(rows),
        "costs": _costs(rows),
    }


def _setting(row: Row) -> str:
    return setting_name(row) if row["method"] == DENSE else f"{setting_name(row)} {_keep(row)}"


def _chart(rows: Sequence[Row], axis: tuple[str, str], gain: str, best: Sequence[Row]) -> dict[str, Any] | None:
    """The curves of one cost; None where it was not measured."""
    cost, label = axis
    share = 0.01 if gain == "chrf" else 1.0
    points = [
        (
            row,
            Point(
                setting_name(row),
                row[cost],
                share * row[gain],
                None if gain == "chrf" else row["accuracy_low"],
                None if gain == "chrf" else row["accuracy_high"],
                _told(row, gain),
            ),
        )
        for row in rows
        if row[cost] is not None
    ]
    if not points:
        return None
    front_points = [point for one in best for row, point in points if row is one]
    return {"label": label, **chart([point for _, point in points], front_points, beside=cost == "tokens")}


def _told(row: Row, gain: str) -> str:
    right = f"{100 * row['accuracy']:.1f}% right ({100 * row['accuracy_low']:.0f} to {100 * row['accuracy_high']:.0f})"
    told = f"chrF {row['chrf']:.1f}" if gain == "chrf" else right
    time = "" if row["ttft_ms"] is None else f", {row['ttft_ms']:.1f} ms"
    return f"{_setting(row)}: {told}, {row['tokens']:.1f} tokens{time}"


def _table_row(row: Row, dense: Row | None, columns: Sequence[Column]) -> dict[str, Any]:
    low, high = row["accuracy_low"], row["accuracy_high"]
    return {
        "name": setting_name(row),
        "dense": row["method"] == DENSE,
        "keep": _keep(row),
        "value": f"{row['keep']:g}",
        "right": f"{100 * row['accuracy']:.1f}%",
        "interval": f"{100 * low:.0f} to {100 * high:.0f}",
        "low": f"{100 * low:.1f}",
        "high": f"{100 - 100 * high:.1f}",
        "dot": f"{100 * row['accuracy']:.1f}",
        "line": "" if dense is None else f"{100 * dense['accuracy']:.1f}",
        "cells": [column.cell(row) for column in columns],
    }


def _cell(text: str = "", small: str = "", mark: str = "") -> dict[str, Any]:
    return {"text": text, "small": small, "mark": mark}


def _number(key: str, scale: float = 1.0, digits: str = ".1f", spread: str = "") -> Callable[[Row], dict[str, Any]]:
    """Cells with the value of ``key`` times ``scale``, and that of ``spread`` behind it."""

    def cell(row: Row) -> dict[str, Any]:
        if row.get(key) is None:
            return _cell()
        small = "" if not spread or row.get(spread) is None else f"± {row[spread] / 2 * scale:{digits}}"
        return _cell(f"{row[key] * scale:{digits}}", small)

    return cell


def _points(key: str, marked: bool, dense: bool = False) -> Callable[[Row], dict[str, Any]]:
    """A cell with a difference in points and its interval; ``marked``: says so where the interval leaves out zero;
    ``dense``: also for the dense model."""

    def cell(row: Row) -> dict[str, Any]:
        if row.get(key) is None or (row["method"] == DENSE and not dense):
            return _cell()
        low, high = row[f"{key}_low"], row[f"{key}_high"]
        mark = "" if not marked or low <= 0 <= high else "above" if low > 0 else "below"
        return _cell(signed(row[key]), f"{signed(low)} to {signed(high)}", mark)

    return cell


def _share(key: str) -> Callable[[Row], dict[str, Any]]:
    """A cell with a share in percent, and its interval where it has one."""

    def cell(row: Row) -> dict[str, Any]:
        if row.get(key) is None or (key == "agreement" and row["method"] == DENSE):
            return _cell()
        low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
        small = "" if low is None or high is None else f"{100 * low:.0f} to {100 * high:.0f}"
        return _cell(f"{100 * row[key]:.1f}%", small)

    return cell


def _columns(fronts: Mapping[str, Sequence[Row]]) -> list[Column]:
    """Those of a table of methods, behind its name, its keep and its share right."""

    def beaten(row: Row) -> dict[str, Any]:
        names = (("tokens", "tokens"), ("ttft_ms", "time"))
        return _cell(", ".join(name for cost, name in names if any(row is one for one in fronts[cost])))

    return [
        Column("Over dense", "points above the dense model", "over_dense", _points("over_dense", True)),
        Column("Over random", "points above as many random tokens", "over_random", _points("over_random", True)),
        Column("As dense", "share answered as the dense model does", "agreement", _share("agreement")),
        Column(
            "Drop", "points of probability that the right answer loses", "probability_drop",
            _points("probability_drop", False),
        ),
        Column("ECE", "calibration error", "calibration_error", _number("calibration_error", 1, ".3f")),
        Column("chrF", "of long answers, 0 to 100", "chrf", _number("chrf")),
        Column("Tokens", "mean over the layers", "tokens", _number("tokens")),
        Column("Evidence", "share of the answer's pixels kept", "evidence_recall", _share("evidence_recall")),
        Column("ms", "to the first token", "ttft_ms", _number("ttft_ms", spread="ttft_spread_ms")),
        Column("ms / dense", "time, measured in turn", "ttft_over_dense", _number("ttft_over_dense", 1, ".2f")),
        Column("GFLOPs", "up to the first token", "flops", _number("flops", 1e-9, ".4g")),
        Column("KV kB", "cache after the prompt", "kv_bytes", _number("kv_bytes", 1e-3, ".4g")),
        Column("Front", "not beaten at its tokens, or at its time", "tokens", beaten),
    ]  # fmt: skip


COSTS = (
    Column("Vision ms", "encoder and projector", "vision_ms", _number("vision_ms", 1, ".2f")),
    Column("Select ms", "evidence and method", "select_ms", _number("select_ms", 1, ".2f")),
    Column("Prefill ms", "the language model's layers", "prefill_ms", _number("prefill_ms", 1, ".2f")),
    Column("Decode ms", "one more token", "decode_ms", _number("decode_ms", 1, ".2f")),
    Column("Peak MB", "memory beside the weights", "peak_bytes", _number("peak_bytes", 1e-6, ".4g")),
    Column("Weights MB", "and buffers", "weight_bytes", _number("weight_bytes", 1e-6, ".4g")),
    Column("Energy J", "up to the first token", "energy_j", _number("energy_j", 1, ".3g")),
)  # fmt: skip


def _costs(rows: Sequence[Row]) -> dict[str, Any]:
    """Where time and memory go. A row's bars: its stages as shares of the slowest row's, in percent."""
    columns = [column for column in COSTS if any(row.get(column.key) is not None for row in rows)]
    longest = max([sum(row[stage] or 0.0 for stage in STAGES) for row in rows], default=0.0) or 1.0
    return {
        "heads": [{"head": column.head, "about": column.about} for column in columns],
        "rows": [
            {
                "name": setting_name(row),
                "dense": row["method"] == DENSE,
                "keep": _keep(row),
                "value": f"{row['keep']:g}",
                "total": f"{sum(row[stage] or 0.0 for stage in STAGES):.3f}",
                "bars": [f"{100 * (row[stage] or 0.0) / longest:.1f}" for stage in STAGES],
                "cells": [column.cell(row) for column in columns],
            }
            for row in rows
        ],
    }


def _families(rows: Sequence[Row]) -> dict[str, Any] | None:
    """A heat map, methods by kinds of question; None where there is but one kind."""
    counts: dict[str, int] = {}
    for row in rows:
        for family, one in (row.get("families") or {}).items():
            counts[family] = max(counts.get(family, 0), one["n"])
    if len(counts) < 2:
        return None
    return {
        "heads": sorted(counts.items()),
        "rows": [
            {
                "name": setting_name(row),
                "dense": row["method"] == DENSE,
                "keep": _keep(row),
                "value": f"{row['keep']:g}",
                "cells": [_family(row["families"].get(family)) for family in sorted(counts)],
            }
            for row in rows
        ],
    }


def _family(one: Mapping[str, Any] | None) -> dict[str, Any]:
    if one is None:
        return {"text": "", "share": 0, "told": ""}
    told = f"{100 * one['accuracy_low']:.0f} to {100 * one['accuracy_high']:.0f}, {one['n']} questions"
    return {"text": f"{100 * one['accuracy']:.0f}", "share": round(100 * one["accuracy"]), "told": told}


# Fewer tokens and fewer bits ------------------------------------------------------------------------------------------


def _joints(frame: polars.DataFrame) -> list[dict[str, Any]]:
    """A plot and a table of each place where weights or caches were varied."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in joint_order(combinations(frame)):
        groups.setdefault(tuple(row[name] for name in WHERE), []).append(row)
    return [_joint(f"joint-{number}", place, rows) for number, (place, rows) in enumerate(groups.items(), 1)]


def _joint(key: str, place: tuple[Any, ...], rows: Sequence[Row]) -> dict[str, Any]:
    names = list(dict.fromkeys(held_name(row) for row in rows))
    points = [
        Point(
            held_name(row),
            row["bytes"] / 1e6,
            row["accuracy"],
            told=f"{_setting(row)}, {held_name(row)}: {_percent(row)} right, {row['bytes'] / 1e6:.4g} MB",
        )
        for row in rows
    ]
    best = [point for row, point in zip(rows, points, strict=True) if row["front"]]
    best.sort(key=lambda point: point.cost)
    columns = (_number("tokens"), _number("bytes", 1e-6, ".4g"), _number("ttft_ms"))
    return {
        "id": key,
        "name": ", ".join(place),
        "where": ", ".join(place),
        "written": False,
        "names": names,
        # The plain model looks like the dense one; what is held in fewer bits, like methods.
        "looks": looks(names, names[:1]),
        "chart": {"label": "MB of weights and one question's cache", **chart(points, best, beside=False, joined=False)},
        "rows": [
            {
                "name": setting_name(row),
                "dense": False,
                "keep": _keep(row),
                "value": f"{row['keep']:g}",
                "held": held_name(row),
                "cells": [
                    _cell(_percent(row)),
                    _points("change", True, dense=True)(row),
                    _points("interaction", True, dense=True)(row),
                    *(column(row) for column in columns),
                    _cell("yes" if row["front"] else ""),
                ],
            }
            for row in rows
        ],
    }


# Wins and losses ------------------------------------------------------------------------------------------------------


def _picture(one: Pick, number: int, ids: Mapping[tuple[Any, ...], str]) -> dict[str, Any]:
    """One picked question: its picture once, and of each method what of the picture it dropped."""
    case = one.case
    width, height = case.picture.size
    return {
        "id": f"picture-{number}",
        "title": TITLES[one.rule],
        "place": ids[tuple(one.dense[name] for name in PLACE)],
        "where": f"{place_name(one.dense)}, {_keep(one.rows[0])}",
        "number": one.dense["question"],
        "question": case.question,
        "truth": one.dense["truth"],
        "dense": {"answer": one.dense["answer"], "correct": one.dense["correct"]},
        **evidence_path(case),
        "picture": data_url(case.picture),
        "width": width,
        "height": height,
        "panels": [
            {
                "name": setting_name(row),
                "best": setting_name(row) == one.best,
                "answer": row["answer"],
                "correct": row["correct"],
                "kept": len(row["kept"]),
                "tokens": row["tokens_in"],
                "scale": f"{width / row['grid_width']:g} {height / row['grid_height']:g}",
                "dropped": dropped(row["kept"], (row["grid_height"], row["grid_width"])),
            }
            for row in one.rows
        ],
    }
