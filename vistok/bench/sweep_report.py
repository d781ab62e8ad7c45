"""A sweep as Markdown and as curves: accuracy by tokens and by time, with intervals."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .markdown import line, points
from .measure import DENSE
from .report import percent, replace_file
from .rows import read
from .summary import PLACE, broken, summarise, tables

if TYPE_CHECKING:
    import polars

TABLE, CURVES = "report.md", "report.svg"
HEADS = (
    "method", "keep", "right", "95%", "over dense", "over random", "chrF", "tokens", "recall", "ms", "ms / dense",
    "select ms", "GFLOPs", "KV kB",
)  # fmt: skip
NOTES = """\
Each table holds one count of tokens: their mean over the decoder's layers, counted from the sequence that ran. *right*:
share of the questions answered right, with the 95% Wilson interval. *over dense*, *over random*: points above the dense
model and above random tokens at the same keep, with the 95% interval of the difference on the same questions (paired
bootstrap). **bold**: the whole interval lies below random. *recall*: share of the answer's pixels under tokens that
stay. *ms*: to the first token, median with the distance of the quartiles; *ms / dense*: median of the ratios to the
dense model, measured in turn.
"""


def write(folder: Path) -> list[Path]:
    """Write the report of the sweep in ``folder`` beside its rows: the paths. ValueError where there are none."""
    frame = read(folder)
    found = summarise(frame)
    replace_file(folder / TABLE, markdown(found, frame).encode())
    replace_file(folder / CURVES, curves(found))
    return [folder / TABLE, folder / CURVES]


def markdown(found: Sequence[Mapping[str, Any]], frame: polars.DataFrame) -> str:
    """All tables, what ran where, and which methods broke a rule."""
    lines = ["# Sweep", ""]
    for name in ("machine", "versions"):
        lines.append(f"- {name}: {'; '.join(sorted(set(frame[name].drop_nulls())))}")
    lines += [f"- questions: {frame['question'].n_unique()} in {frame['cell'].n_unique()} cells", "", NOTES.strip(), ""]
    failed = broken(frame)
    lines += [f"With all tokens kept not the dense model: {', '.join(failed)}.", ""] if failed else []
    for table in tables(found):
        place = ", ".join(str(table[0][name]) for name in PLACE)
        count = next(row["tokens"] for row in table if row["method"] != DENSE)
        lines += [f"## {place}: {count:.1f} tokens", "", line(HEADS), line(["---"] + ["---:"] * (len(HEADS) - 1))]
        lines += [line(cells(row)) for row in table]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row as it is shown, under ``HEADS``."""
    name = row["method"] if row["hyper"] == "{}" else f"{row['method']} {row['hyper']}"
    below = row["over_random_high"] is not None and row["over_random_high"] < 0
    return [
        f"**{name}**" if below else name,
        "" if row["method"] == DENSE else f"{row['keep']:.0f}" if row["counted"] else f"{row['keep']:.4g}",
        percent(row["accuracy"]),
        f"{100 * row['accuracy_low']:.0f} to {100 * row['accuracy_high']:.0f}",
        points(row, "over_dense"),
        points(row, "over_random"),
        "" if row["chrf"] is None else f"{row['chrf']:.1f}",
        f"{row['tokens']:.1f}",
        "" if row["evidence_recall"] is None else f"{row['evidence_recall']:.0%}",
        f"{row['ttft_ms']:.1f} ({row['ttft_spread_ms']:.1f})",
        f"{row['ttft_over_dense']:.2f}",
        f"{row['select_ms']:.1f}",
        f"{row['flops'] / 1e9:.2f}",
        f"{row['kv_bytes'] / 1e3:.0f}",
    ]


def curves(found: Sequence[Mapping[str, Any]]) -> bytes:
    """An SVG, a line of panels a place: accuracy by mean tokens, and by milliseconds to the first token."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "vistok"  # the same rows give the same bytes
    from matplotlib import pyplot

    places = list(dict.fromkeys(tuple(row[name] for name in PLACE) for row in found))
    figure, axes = pyplot.subplots(len(places), 2, figsize=(11, 4 * len(places)), squeeze=False)
    for panels, place in zip(axes, places, strict=True):
        by_method: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for row in found:
            if tuple(row[name] for name in PLACE) == place:
                by_method[row["method"]].append(row)
        for axis, key, label in zip(panels, ("tokens", "ttft_ms"), ("tokens, mean over layers", "ms"), strict=True):
            for method, mine in by_method.items():
                mine = sorted(mine, key=lambda row: row[key])
                heights = [row["accuracy"] for row in mine]
                below = [row["accuracy"] - row["accuracy_low"] for row in mine]
                above = [row["accuracy_high"] - row["accuracy"] for row in mine]
                control = method in (DENSE, "random", "uniform")
                axis.errorbar(
                    [row[key] for row in mine], heights, (below, above), label=method, marker="o", markersize=3,
                    capsize=2, linewidth=1.8 if control else 1, linestyle="--" if control else "-",
                )  # fmt: skip
            axis.set(xlabel=label, ylabel="share right", title=", ".join(map(str, place)))
            axis.grid(alpha=0.3)
        panels[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return buffer.getvalue()
