"""A survey as a Markdown table, to be kept beside the code: accuracy with intervals, by question family, and cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .compare import Survey

CONTROLS = ("random", "uniform", "pool")
NOTES = """\
*right*: share of the questions answered right, with the 95% Wilson interval. *over dense*, *over random*: points above
the dense model and above random tokens at the same keep, with the 95% interval of the difference on the same questions
(paired bootstrap). **bold**: the whole interval lies below random. *tokens*: mean over the decoder's layers, counted
from the sequence that ran. *recall*: share of the answer's pixels that lie under a token that stays. *ms*: first token,
median, all methods in turn; GFLOPs and KV kB: one question, up to the first token.
"""


def markdown(survey: Survey, facts: Mapping[str, str]) -> str:
    """The survey as one Markdown page. ``facts``: what is said of the run, e.g. {"model": .., "seed": ..}."""
    families = list(dict.fromkeys(row["family"] for row in survey.families))
    counts = {row["family"]: row["n"] for row in survey.families}
    cells = {(row["method"], row["keep"], row["family"]): row["accuracy"] for row in survey.families}
    lines = [f"# {survey.task}: {survey.rows[0]['n']} questions, one a picture", ""]
    lines += [f"- {name}: {_code(value) if name == 'command' else value}" for name, value in facts.items()]
    lines += ["", NOTES.strip(), ""]
    heads = ["method", "right", "95%", "over dense", "over random", "tokens", "recall", "ms", "GFLOPs", "KV kB"]
    heads += [f"{family} ({counts[family]})" for family in families]
    dense, *rest = survey.rows
    for keep in dict.fromkeys(row["keep"] for row in rest):
        rows = [dense, *_ordered([row for row in rest if row["keep"] == keep])]
        lines += [f"## keep = {keep}", "", line(heads), line(["---"] + ["---:"] * (len(heads) - 1))]
        for row in rows:
            by_family = [cells.get((row["method"], row["keep"], family)) for family in families]
            lines.append(line([*_row(row), *("" if cell is None else f"{cell:.0%}" for cell in by_family)]))
        lines += ["", _verdict(rest, keep), ""]
    lines += [f"{name} is left out: {why}" for name, why in survey.shown.skipped.items()]
    return "\n".join(lines).rstrip() + "\n"


def _ordered(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Controls first, then the most accurate first."""
    place = {name: number for number, name in enumerate(CONTROLS)}
    return sorted(rows, key=lambda row: (place.get(row["method"], len(place)), -row["accuracy"]))


def _row(row: Mapping[str, Any]) -> list[str]:
    name = f"**{row['method']}**" if _below_random(row) else row["method"]
    recall = row["evidence_recall"]
    return [
        name,
        f"{row['accuracy']:.1%}",
        f"{100 * row['accuracy_low']:.0f} to {100 * row['accuracy_high']:.0f}",
        points(row, "over_dense"),
        "" if row["method"] in ("dense", "random") else points(row, "over_random"),
        f"{row['tokens_kept']:.1f}",
        "" if recall is None else f"{recall:.0%}",
        f"{row['ttft_ms']:.1f}",
        f"{row['flops'] / 1e9:.2f}",
        f"{row['kv_bytes'] / 1e3:.0f}",
    ]


def points(row: Mapping[str, Any], key: str) -> str:
    """A difference in points with its interval; nothing where it was not measured."""
    if row[key] is None or row["method"] == "dense":
        return ""
    return f"{100 * row[key]:+.1f} ({100 * row[f'{key}_low']:+.1f} to {100 * row[f'{key}_high']:+.1f})"


def _below_random(row: Mapping[str, Any]) -> bool:
    return row["over_random_high"] is not None and row["over_random_high"] < 0


def _verdict(rows: Sequence[Mapping[str, Any]], keep: float | int) -> str:
    """Which methods are less accurate than random tokens, and of which that is certain."""
    lost = [row for row in rows if row["keep"] == keep and row["over_random"] is not None and row["over_random"] < 0]
    if not any(row["method"] == "random" for row in rows):
        return "Random tokens were not measured."
    if not lost:
        return "No method is less accurate than random tokens."
    certain = [row["method"] for row in lost if _below_random(row)]
    open_ = [row["method"] for row in lost if not _below_random(row)]
    parts = [f"Less accurate than random tokens: {', '.join(certain)}."] if certain else []
    parts += [f"Below random, but within chance: {', '.join(open_)}."] if open_ else []
    return " ".join(parts)


def _code(text: str) -> str:
    return f"`{text}`"


def line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
