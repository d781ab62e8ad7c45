"""A sweep as Markdown, as one HTML page, and as curves: accuracy by tokens and by time, with intervals."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .joint import WHERE, combinations
from .markdown import (
    fair,
    held_name,
    interval,
    joint_order,
    line,
    ordered,
    place_name,
    points,
    setting_name,
)
from .measure import DENSE
from .page import CONTROLS, render
from .report import percent, replace_file
from .rows import read
from .summary import broken, summarise, tables

if TYPE_CHECKING:
    import polars

TABLE, CURVES, PICTURE, PAGE = "report.md", "report.svg", "report.png", "report.html"
HEADS = (
    "method", "keep", "right", "95%", "over dense", "over random", "as dense", "drop", "ECE", "chrF",
    "tokens", "recall", "ms", "ms / dense", "select ms", "GFLOPs", "KV kB",
)  # fmt: skip
NOTES = """\
Each table holds one count of tokens: their mean over the decoder's layers, counted from the sequence that ran. *right*:
share of the questions answered right, with the 95% Wilson interval. *over dense*, *over random*: points above the dense
model and above random tokens at the same keep, with the 95% interval of the difference on the same questions (paired
bootstrap); a method that is left with another number of tokens (2%) is not held against random ones. **bold**: the
whole interval lies below random. *as dense*: share of the answers that are the dense model's; *drop*: points of
probability that the right answer loses; *ECE*: calibration error. *recall*: share of the answer's pixels under tokens
that stay. *ms*: to the first token, median with the distance of the quartiles; *ms / dense*: median of the ratios to
the dense model, measured in turn.
"""
JOINT_HEADS = ("method", "held", "keep", "right", "change", "beyond the sum", "tokens", "MB", "ms", "front")
JOINT = """\
Where weights or the cache are held in fewer bits too: *change*: points above the model as it is; *beyond the sum*:
points above the sum of what each part loses by itself, negative where they make each other worse; both with the 95%
interval over the same questions. *MB*: of weights and of one question's cache. *front*: no other row is as accurate
with fewer bytes.
"""


def write(folder: Path) -> list[Path]:
    """Write the report of the sweep in ``folder`` beside its rows: the paths. ValueError where there are none."""
    frame = read(folder)
    found = summarise(frame)
    vector, pixels = curves(found)
    made = {
        TABLE: markdown(found, frame).encode(),
        CURVES: vector,
        PICTURE: pixels,
        PAGE: render(frame, found).encode(),
    }
    for name, data in made.items():
        replace_file(folder / name, data)
    return [folder / name for name in made]


def markdown(found: Sequence[Mapping[str, Any]], frame: polars.DataFrame) -> str:
    """All tables, what ran where, and which methods broke a rule."""
    lines = ["# Sweep", ""]
    for name in ("machine", "versions"):
        lines.append(f"- {name}: {'; '.join(sorted(set(frame[name].drop_nulls())))}")
    lines += [f"- questions: {frame['question'].n_unique()} in {frame['cell'].n_unique()} cells", "", NOTES.strip(), ""]
    failed = broken(frame)
    lines += [f"With all tokens kept not the dense model: {', '.join(failed)}.", ""] if failed else []
    for table in tables(ordered(fair(found))):
        count = next(row["tokens"] for row in table if row["method"] != DENSE)
        lines += [
            f"## {place_name(table[0])}: {count:.1f} tokens",
            "",
            line(HEADS),
            line(["---"] + ["---:"] * (len(HEADS) - 1)),
        ]
        lines += [line(cells(row)) for row in table]
        lines.append("")
    lines += _joint(frame)
    return "\n".join(lines).rstrip() + "\n"


def _joint(frame: polars.DataFrame) -> list[str]:
    """Tables of the places where weights or caches were varied."""
    places: dict[str, list[Mapping[str, Any]]] = {}
    for row in joint_order(combinations(frame)):
        places.setdefault(", ".join(row[name] for name in WHERE), []).append(row)
    lines = [JOINT.strip(), ""] if places else []
    for place, rows in places.items():
        lines += [f"## {place}: fewer tokens and fewer bits", "", line(JOINT_HEADS)]
        lines.append(line(["---"] * 3 + ["---:"] * (len(JOINT_HEADS) - 3)))
        for row in rows:
            losses = [interval(row, key) for key in ("change", "interaction")]
            numbers = [f"{row['tokens']:.1f}", _number(row["bytes"], ".4g", 1e6), _number(row["ttft_ms"], ".1f")]
            shown = [setting_name(row), held_name(row), _keep(row), percent(row["accuracy"]), *losses, *numbers]
            lines.append(line([*shown, "yes" if row["front"] else ""]))
        lines.append("")
    return lines


def _keep(row: Mapping[str, Any]) -> str:
    return "" if row["method"] == DENSE else f"{row['keep']:.0f}" if row["counted"] else f"{row['keep']:.4g}"


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row as it is shown, under ``HEADS``."""
    name = setting_name(row)
    below = row["over_random_high"] is not None and row["over_random_high"] < 0
    return [
        f"**{name}**" if below else name,
        _keep(row),
        percent(row["accuracy"]),
        f"{100 * row['accuracy_low']:.0f} to {100 * row['accuracy_high']:.0f}",
        points(row, "over_dense"),
        points(row, "over_random"),
        "" if row["agreement"] is None else f"{row['agreement']:.0%}",
        points(row, "probability_drop"),
        _number(row["calibration_error"], ".3f"),
        _number(row["chrf"], ".1f"),
        f"{row['tokens']:.1f}",
        "" if row["evidence_recall"] is None else f"{row['evidence_recall']:.0%}",
        "" if row["ttft_ms"] is None else f"{row['ttft_ms']:.1f} ({row['ttft_spread_ms']:.1f})",
        _number(row["ttft_over_dense"], ".2f"),
        _number(row["select_ms"], ".1f"),
        _number(row["flops"], ".2f", 1e9),
        _number(row["kv_bytes"], ".0f", 1e3),
    ]


def _number(value: float | None, digits: str, unit: float = 1) -> str:
    return "" if value is None else f"{value / unit:{digits}}"


def curves(found: Sequence[Mapping[str, Any]]) -> tuple[bytes, bytes]:
    """An SVG and a PNG, a line of panels a place: accuracy by mean tokens, and by milliseconds to the first token."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "vistok"  # the same rows give the same bytes
    from matplotlib import pyplot

    places: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in ordered(found):
        places.setdefault(place_name(row), {}).setdefault(setting_name(row), []).append(row)
    figure, axes = pyplot.subplots(
        len(places), 2, figsize=(11, 4 * len(places)), squeeze=False, gridspec_kw={"hspace": 0.35}
    )
    for panels, (place, by_method) in zip(axes, places.items(), strict=True):
        for axis, key, label in zip(panels, ("tokens", "ttft_ms"), ("tokens, mean over layers", "ms"), strict=True):
            for number, (method, rows) in enumerate(by_method.items()):
                mine = sorted((row for row in rows if row[key] is not None), key=lambda row: row[key])
                heights = [row["accuracy"] for row in mine]
                below = [row["accuracy"] - row["accuracy_low"] for row in mine]
                above = [row["accuracy_high"] - row["accuracy"] for row in mine]
                control = method in CONTROLS
                axis.errorbar(
                    [row[key] for row in mine], heights, (below, above), label=method, marker="os^Dv"[number % 5],
                    color=f"C{number % 10}", markersize=4, capsize=2, linewidth=1.8 if control else 1,
                    linestyle="--" if control else "-",
                )  # fmt: skip
            axis.set(xlabel=label, ylabel="share right", title=place)
            axis.grid(alpha=0.3)
        panels[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    vector, pixels = io.BytesIO(), io.BytesIO()
    figure.savefig(vector, format="svg", bbox_inches="tight", metadata={"Date": None})
    figure.savefig(pixels, format="png", bbox_inches="tight", dpi=100)
    pyplot.close(figure)
    return vector.getvalue(), pixels.getvalue()
