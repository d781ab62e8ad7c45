"""A sweep's results as the tab Compare shows them: curves of one place, tables of equal tokens, pictures of one point.

Nothing here knows of Gradio. What may be compared is what ``vistok.bench`` compares: rows of one place (model, task,
protocol), and in a table only methods that were left with as many tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vistok import catalogue
from vistok.bench import rows, run
from vistok.bench.chart import RING, Point, chart, looks
from vistok.bench.figures import data_url, dropped, evidence_path
from vistok.bench.markdown import HELD, fair, held_name, ordered, setting_name, signed
from vistok.bench.measure import DENSE, Case
from vistok.bench.pareto import front
from vistok.bench.report import keep_text
from vistok.bench.summary import PLACE, PLAIN, SETTING, by_setting, summarise, tables
from vistok.bench.sweep import IDENTITY, Cell, parts_of
from vistok.bench.wins import case_of_row, in_shape

if TYPE_CHECKING:
    import polars

Row = Mapping[str, Any]
MODEL = PLACE[: PLACE.index("task")]
CONTROLS = (DENSE, "random", "uniform")
COSTS = {"tokens": "Visual tokens, mean over the layers", "ttft_ms": "Milliseconds to the first token"}
"""What curves can be drawn against, and the label of the axis."""
EACH = 6
"""Pictures that are shown at once, of those answered right and of those answered wrong."""


class Where(NamedTuple):
    """What is looked at: one place of a sweep, and of its questions one ``family``, or all ("")."""

    model: str
    """As ``Results.models`` names it."""
    task: str
    protocol: str
    family: str = ""


class Results:
    """All rows of a sweep. Summaries and pictures are made when they are asked for, once."""

    def __init__(self, frame: polars.DataFrame, cases_of: Callable[[Cell], Sequence[Case]] = run.cases_of) -> None:
        self.frame = frame.filter(frame["protocol"] != IDENTITY)
        self._cases_of = cases_of
        self._cases: dict[Cell, Sequence[Case]] = {}
        self._summaries: dict[Where, list[Row]] = {}

    @classmethod
    def read(cls, folder: Path) -> Results:
        """Those of a sweep's folder. Raises ValueError where there are none."""
        return cls(rows.read(folder))

    def models(self) -> list[str]:
        """The models, each with its precision and what of it is held in fewer bits."""
        return list(dict.fromkeys(_model_name(place) for place in self._places()))

    def values(self, column: str) -> list[str]:
        """What stands in "task", "protocol" or "family", sorted."""
        return sorted(self.frame[column].drop_nulls().unique())

    def mechanisms(self) -> list[str]:
        """Those of the methods that were measured, in the catalogue's order."""
        found = {one for method in self.frame["method"].unique() for one in mechanisms_of(method)}
        return [one for one in catalogue.TAGS["mechanism"] if one in found]

    def rows(self, where: Where) -> list[Row]:
        """The summary, a row a setting, each with its "key"; [] for a place that was not measured."""
        if where not in self._summaries:
            found = ordered(fair(summarise(self._part(where))))
            self._summaries[where] = [{**row, "key": key_of(row)} for row in found]
        return self._summaries[where]

    def _places(self) -> list[Row]:
        """Of the models; each as it is comes before what is held in fewer bits."""

        def order(place: Row) -> tuple[Any, ...]:
            held = [(place[name] != "none", place[name]) for name in HELD]
            return (place["model"], place["precision"], held)

        return sorted(self.frame.select(MODEL).unique().to_dicts(), key=order)

    def _part(self, where: Where) -> polars.DataFrame:
        """The rows of one place and kind of question."""
        import polars

        place = next((one for one in self._places() if _model_name(one) == where.model), dict.fromkeys(MODEL, ""))
        wanted = {**place, "task": where.task, "protocol": where.protocol}
        wanted |= {"family": where.family} if where.family else {}
        return self.frame.filter(*(polars.col(name) == value for name, value in wanted.items()))

    def pictures(self, where: Where, key: str) -> dict[str, list[dict[str, Any]]]:
        """{"wrong", "right": a few questions of one setting with what was kept of the picture}.

        First come questions that tell something: of the wrong ones those that the dense model gets right, of the right
        ones those that as many random tokens get wrong; then the lower seed and number. Left out are pictures that
        cannot be drawn again (a user's own).
        """
        measured = by_setting(self._part(where))
        found: dict[str, list[dict[str, Any]]] = {"wrong": [], "right": []}
        settings = (dict(zip((*PLACE, *SETTING), setting, strict=True)) for setting in measured)
        row = next((row for row in settings if key_of(row) == key), None)
        if row is None:
            return found
        place = tuple(row[name] for name in PLACE)
        mine = measured[tuple(row.values())]
        dense = measured.get((*place, *PLAIN), {})
        drawn = measured.get((*place, "random", "{}", row["keep"], row["counted"]), {})

        def dull(at: tuple[int, str], right: bool) -> bool:
            """Whether the other side answered alike."""
            other = (drawn if right else dense).get(at)
            return other is None or bool(other["correct"]) == right

        for name, right in (("wrong", False), ("right", True)):
            fit = [at for at, one in mine.items() if one["correct"] is not None and bool(one["correct"]) == right]
            for at in sorted(fit, key=lambda at: (dull(at, right), at[0], _number(at[1]))):
                if len(found[name]) < EACH and (case := case_of_row(mine[at], self._cases_of, self._cases)) is not None:
                    found[name].append(_picture(mine[at], dense.get(at), case))
        return found


def key_of(row: Row) -> str:
    """Names the setting of a row at its place, in a form that a page can hand back."""
    told = json.dumps([row[name] for name in (*PLACE, *SETTING)])
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def mechanisms_of(method: str) -> set[str]:
    """What decides which tokens stay, by the cards of the systems that ``method`` names; none for what is not known."""
    found: set[str] = set()
    for name, _ in parts_of(method) if method != DENSE else []:
        try:
            found |= {*catalogue.card(name).mechanism}
        except catalogue.UnknownSystem:
            continue
    return found


def with_mechanisms(found: Sequence[Row], wanted: Sequence[str]) -> list[Row]:
    """The rows of methods that go by one of ``wanted``; the dense model, controls and what is not known stay."""
    return [row for row in found if not (names := mechanisms_of(row["method"])) or names & {*wanted}]


def named(row: Row) -> str:
    """A setting in a few words: "holov 25%"."""
    return setting_name(row) if row["method"] == DENSE else f"{setting_name(row)} {_keep(row)}"


def curves(found: Sequence[Row], cost: str) -> dict[str, Any] | None:
    """What the template draws of ``found`` (of one place): a plot against ``cost``, and tables of equal tokens.

    None where ``cost`` was not measured.
    """
    known = [row for row in found if row[cost] is not None]
    if not known:
        return None
    written = all(row["chrf"] is not None for row in known)
    gain = "chrf" if written else "accuracy"
    best = front(known, cost, gain)
    points = [_point(row, cost, written) for row in known]
    plot = chart(points, [points[known.index(row)] for row in best], beside=cost == "tokens")
    for series in plot["series"]:
        # As ``chart`` orders the points of a series.
        mine = sorted((row for row in known if setting_name(row) == series["name"]), key=lambda row: row[cost])
        for point, row in zip(series["points"], mine, strict=True):
            point["key"] = row["key"]
    names = [series["name"] for series in plot["series"]]
    return {
        **plot,
        "x_label": COSTS[cost],
        "y_label": "chrF of the answers, %" if written else "Answered right, %",
        "written": written,
        "timed": any(row["ttft_ms"] is not None for row in found),
        "looks": looks(names, CONTROLS),
        "ring": RING,
        "n": max(row["n"] for row in known),
        "tables": [_table(table) for table in tables(found)],
    }


def point(row: Row) -> dict[str, Any]:
    """What is said of one setting."""
    facts = [
        ("right", f"{100 * row['accuracy']:.1f}%", f"95%: {_range(row, 'accuracy', unsigned=True)}, n = {row['n']}"),
        ("over dense", _points(row, "over_dense"), _range(row, "over_dense")),
        ("over random", _points(row, "over_random"), _range(row, "over_random")),
        ("as dense", _percent(row["agreement"]), ""),
        ("chrF", _digits(row["chrf"], ".1f"), ""),
        ("tokens", f"{row['tokens']:.1f}", "mean over the layers"),
        ("evidence kept", _percent(row["evidence_recall"]), "of the answer's pixels"),
        ("first token", _digits(row["ttft_ms"], ".1f", " ms"), _digits(row["ttft_over_dense"], ".2f", " of dense")),
    ]
    dense = row["method"] == DENSE
    shown = [fact for fact in facts if fact[1] and not (dense and fact[0] in ("over dense", "as dense"))]
    return {"name": named(row), "method": row["method"], "facts": shown}


def _point(row: Row, cost: str, written: bool) -> Point:
    right = f"{100 * row['accuracy']:.1f}% right, 95% interval {_range(row, 'accuracy', unsigned=True)}"
    gain = f"chrF {row['chrf']:.1f}" if written else right
    time = "" if row["ttft_ms"] is None else f", {row['ttft_ms']:.1f} ms"
    told = f"{named(row)}: {gain}, {row['tokens']:.1f} tokens{time}"
    if written:
        return Point(setting_name(row), row[cost], row["chrf"] / 100, told=told)
    return Point(setting_name(row), row[cost], row["accuracy"], row["accuracy_low"], row["accuracy_high"], told)


def _table(table: Sequence[Row]) -> dict[str, Any]:
    """Methods that were left with as many tokens."""
    count = next((row["tokens"] for row in table if row["method"] != DENSE), None)
    return {
        "tokens": "all tokens" if count is None else f"{count:.1f} tokens",
        "rows": [
            {
                "key": row["key"],
                "name": named(row),
                "dense": row["method"] == DENSE,
                "right": _percent(row["accuracy"]),
                "interval": _range(row, "accuracy", unsigned=True),
                "over": _points(row, "over_random"),
                "over_interval": _range(row, "over_random"),
                "mark": _mark(row),
                "ms": _digits(row["ttft_ms"], ".1f"),
            }
            for row in table
        ],
    }


def _mark(row: Row) -> str:
    """Whether the whole interval lies above or below random tokens."""
    low, high = row["over_random_low"], row["over_random_high"]
    return "" if low is None or low <= 0 <= high else "above" if low > 0 else "below"


def _picture(row: Row, dense: Row | None, case: Case) -> dict[str, Any]:
    """One question: the picture, what was dropped of it, and the answers."""
    width, height = case.picture.size
    drawn = bool(row["kept"]) and in_shape(case, row)
    return {
        "number": row["question"],
        "question": row["asked"],
        "truth": row["truth"],
        "answer": row["answer"],
        "correct": bool(row["correct"]),
        "dense": None if dense is None or row["method"] == DENSE else dense["answer"] or "no answer",
        "picture": data_url(case.picture),
        "width": width,
        "height": height,
        "drawn": drawn,
        "kept": len(row["kept"] or ()),
        "tokens": row["tokens_in"],
        "scale": f"{width / row['grid_width']:g} {height / row['grid_height']:g}" if drawn else "",
        "dropped": dropped(row["kept"], (row["grid_height"], row["grid_width"])) if drawn else "",
        **evidence_path(case),
    }


def _model_name(place: Row) -> str:
    held = held_name(place)
    return ", ".join([place["model"], place["precision"], *([] if held == "as it is" else [held])])


def _number(question: str) -> tuple[int, str]:
    """Orders questions as they were asked."""
    number = question.rpartition(":")[2]
    return (int(number) if number.isdecimal() else 0, question)


def _keep(row: Row) -> str:
    return keep_text(int(row["keep"]) if row["counted"] else row["keep"])


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"


def _digits(value: float | None, digits: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{digits}}{unit}"


def _points(row: Row, key: str) -> str:
    return "" if row[key] is None else signed(row[key])


def _range(row: Row, key: str, unsigned: bool = False) -> str:
    low, high = row[f"{key}_low"], row[f"{key}_high"]
    if low is None or high is None:
        return ""
    return f"{100 * low:.0f} to {100 * high:.0f}" if unsigned else f"{signed(low)} to {signed(high)}"
