"""A survey as a Markdown table, to be kept beside the code: accuracy with intervals, by question family, and cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .compare import Survey
from .measure import DENSE
from .summary import PLACE, TOLERANCE

CONTROLS = ("random", "uniform", "pool")
HELD = ("weights", "cache")
NOTES = """\
*right*: share of the questions answered right, with the 95% Wilson interval. *over dense*, *over random*: points above
the dense model and above random tokens at the same keep, with the 95% interval of the difference on the same questions
(paired bootstrap); a method that is left with another number of tokens (2%) is not held against random ones. **bold**:
the whole interval lies below random. *tokens*: mean over the decoder's layers, counted from the sequence that ran.
*recall*: share of the answer's pixels that lie under a token that stays. *ms*: first token, median, all methods in
turn; GFLOPs and KV kB: one question, up to the first token.
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
        control = next((row for row in rows if row["method"] == "random"), None)
        lines += [f"## keep = {keep}", "", line(heads), line(["---"] + ["---:"] * (len(heads) - 1))]
        for row in rows:
            by_family = [cells.get((row["method"], row["keep"], family)) for family in families]
            lines.append(line([*_row(row, control), *("" if cell is None else f"{cell:.0%}" for cell in by_family)]))
        lines += ["", _verdict(rows[1:], control), ""]
    lines += [f"{name} is left out: {why}" for name, why in survey.shown.skipped.items()]
    return "\n".join(lines).rstrip() + "\n"


def _ordered(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Controls first, then the most accurate first."""
    place = {name: number for number, name in enumerate(CONTROLS)}
    return sorted(rows, key=lambda row: (place.get(row["method"], len(place)), -row["accuracy"]))


def _row(row: Mapping[str, Any], control: Mapping[str, Any] | None) -> list[str]:
    judged = control is not None and row is not control and as_many(row["tokens_kept"], control["tokens_kept"])
    name = f"**{row['method']}**" if judged and _below_random(row) else row["method"]
    recall = row["evidence_recall"]
    return [
        name,
        f"{row['accuracy']:.1%}",
        f"{100 * row['accuracy_low']:.0f} to {100 * row['accuracy_high']:.0f}",
        points(row, "over_dense"),
        points(row, "over_random") if judged else "",
        f"{row['tokens_kept']:.1f}",
        "" if recall is None else f"{recall:.0%}",
        f"{row['ttft_ms']:.1f}",
        f"{row['flops'] / 1e9:.2f}",
        f"{row['kv_bytes'] / 1e3:.0f}",
    ]


def points(row: Mapping[str, Any], key: str) -> str:
    """As ``interval``; nothing for the dense model, which the others are held against."""
    return "" if row["method"] == DENSE else interval(row, key)


def interval(row: Mapping[str, Any], key: str) -> str:
    """A difference in points with its interval; nothing where it was not measured."""
    if row[key] is None:
        return ""
    return f"{signed(row[key])} ({signed(row[f'{key}_low'])} to {signed(row[f'{key}_high'])})"


def signed(share: float) -> str:
    """A difference of shares in points.

    >>> signed(0.125), signed(-0.0001)
    ('+12.5', '+0.0')
    """
    return f"{round(100 * share, 1) + 0.0:+.1f}"


def as_many(tokens: float, random: float) -> bool:
    """Whether a method is left with as many tokens as random ones, so that the two may be compared."""
    return abs(tokens - random) <= TOLERANCE * random


def _below_random(row: Mapping[str, Any]) -> bool:
    return row["over_random_high"] is not None and row["over_random_high"] < 0


def _verdict(rows: Sequence[Mapping[str, Any]], control: Mapping[str, Any] | None) -> str:
    """Which methods of one keep are less accurate than as many random tokens, and of which that is certain."""
    if control is None:
        return "Random tokens were not measured."
    others = [row for row in rows if row is not control]
    judged = [row for row in others if as_many(row["tokens_kept"], control["tokens_kept"])]
    lost = [row for row in judged if row["over_random"] < 0]
    certain = [row["method"] for row in lost if _below_random(row)]
    open_ = [row["method"] for row in lost if not _below_random(row)]
    apart = [row["method"] for row in others if row not in judged]
    parts = [f"Less accurate than random tokens: {', '.join(certain)}."] if certain else []
    parts += [f"Below random, but within chance: {', '.join(open_)}."] if open_ else []
    parts = parts or ["No method is less accurate than random tokens."]
    parts += [f"Not held against random, since it keeps another number of tokens: {', '.join(apart)}."] if apart else []
    return " ".join(parts)


def _code(text: str) -> str:
    return f"`{text}`"


def line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def fair(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a sweep's summary that say nothing of random tokens where those at the same keep are not as many."""

    def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in (*PLACE, "keep", "counted"))

    controls = {key(row): row["tokens"] for row in found if row["method"] == "random"}
    unknown = dict.fromkeys(("over_random", "over_random_low", "over_random_high"))
    return [{**row} if as_many(row["tokens"], controls.get(key(row), 0)) else {**row, **unknown} for row in found]


def ordered(found: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows of a sweep's summary by place (the model as it is and single questions first) and method: the dense model,
    the controls, then by name, the larger keep first."""

    def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        where = [row[name] for name in ("model", "precision")]
        where += [(row[name] != "none", row[name]) for name in HELD]
        where += [row["task"], row["protocol"] != "single", row["protocol"]]
        known = (DENSE, *CONTROLS)
        rank = known.index(row["method"]) if row["method"] in known else len(known)
        how = (rank, row["method"], row["hyper"], row["counted"], -row["keep"])
        return (*where, *how)

    return sorted(found, key=key)


def joint_order(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows of ``joint.combinations`` by place, the model as it is first, then by what is held in fewer bits."""

    def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        place = tuple(row[name] for name in PLACE if name not in HELD)
        held = [(row[name] != "none", row[name]) for name in HELD]
        return (*place, *held, row["method"] != DENSE, row["method"], row["hyper"], row["counted"], -row["keep"])

    return sorted(rows, key=key)


def held_name(row: Mapping[str, Any]) -> str:
    """What of a row's model is held in fewer bits."""
    return ", ".join(f"{row[name]} {name}" for name in HELD if row[name] != "none") or "as it is"


def place_name(row: Mapping[str, Any]) -> str:
    """Where a row of a sweep was measured; weights and cache only where they are not the model's own."""
    held = [] if held_name(row) == "as it is" else [held_name(row)]
    return ", ".join([row["model"], row["precision"], *held, row["task"], row["protocol"]])


def setting_name(row: Mapping[str, Any]) -> str:
    """A method of a sweep with the hyper-parameters that were set."""
    given = ", ".join(f"{name}={value}" for name, value in json.loads(row["hyper"]).items())
    return f"{row['method']} ({given})" if given else row["method"]
