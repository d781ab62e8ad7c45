"""The comparison as files: one page that needs nothing else, one sheet of overlays, and for many questions a table."""

from __future__ import annotations

import io
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from jinja2 import Environment, FileSystemLoader, StrictUndefined

import vistok

from .compare import Comparison, Look, Survey
from .figures import frames, sheet
from .markdown import markdown
from .measure import DENSE

if TYPE_CHECKING:
    from jinja2 import Template

PAGE, SHEET, TABLE = "compare.html", "compare.png", "compare.md"
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def write(folder: Path, comparison: Comparison | Survey, facts: Mapping[str, str]) -> list[Path]:
    """Write ``compare.html`` and ``compare.png`` into ``folder``, of a survey also ``compare.md``; their paths.

    Each file is whole or not there. ``facts``: what the page's head says of the run, e.g. {"model": "vistok-tiny",
    "seed": "0"}.
    """
    buffer = io.BytesIO()
    sheet(comparison.shown).save(buffer, "PNG", optimize=True)
    page = render(comparison, facts)
    replace_file(folder / PAGE, page.encode())
    replace_file(folder / SHEET, buffer.getvalue())
    paths = [folder / PAGE, folder / SHEET]
    if isinstance(comparison, Survey):
        paths.append(folder / TABLE)
        replace_file(folder / TABLE, markdown(comparison, facts).encode())
    return paths


def replace_file(path: Path, data: bytes) -> None:
    """Write ``data`` under a temporary name beside ``path``, then rename: nobody ever sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def render(comparison: Comparison | Survey, facts: Mapping[str, str]) -> str:
    """The page: HTML in one piece, style, script and images inside."""
    survey = comparison if isinstance(comparison, Survey) else None
    shown = comparison.shown
    rows = survey.rows if survey else shown.summary()
    return template("compare.html").render(
        facts=facts,
        survey=survey,
        rows=[table_row(row, rows[0]) for row in rows],
        families=family_table(survey) if survey else None,
        sections=sections(shown),
        skipped=shown.skipped,
        keeps={row["keep"] for row in rows if row["method"] != DENSE},
    )


def surroundings() -> dict[str, str]:
    """Machine, versions and, in a checkout, the commit of what runs."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()
    counted = f"{os.cpu_count()} cores, {torch.get_num_threads()} used" if os.cpu_count() else ""
    return {
        "machine": f"{device}, {counted}",
        "versions": f"vistok {vistok.__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
        **commit(),
    }


@cache
def commit() -> dict[str, str]:
    """{"commit": short hash, "+" behind it where files differ}; {} outside a checkout of vistok."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return {}
    try:
        head, changed = (
            subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=10)
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": head.stdout.strip() + ("+" if changed.stdout.strip() else "")}


@cache
def processor_name() -> str:
    """What the CPU calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


@cache
def template(name: str, folder: Path | None = None) -> Template:
    """A template of ``folder``, or of ``templates/`` here; all that it shows is escaped."""
    folders = [*([folder] if folder else []), Path(__file__).parent / "templates"]
    environment = Environment(
        loader=FileSystemLoader(folders),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"amount": amount, "keep": keep_text, "percent": percent}
    return environment.get_template(name)


# What the template shows ----------------------------------------------------------------------------------------------


def table_row(row: Mapping[str, Any], dense: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table of methods: its numbers, and its costs beside dense."""
    return {**row, "bars": bars(row, dense)}


def bars(costs: Mapping[str, Any], dense: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Time, FLOPs and cache: {"label", "text", "share" of dense in percent, "more": whether it costs more than dense}.

    A single percent more counts as the same: milliseconds are never exact.
    """
    found = []
    for key, label, unit in (("ttft_ms", "first token", "ms"), ("flops", "FLOPs", ""), ("kv_bytes", "KV cache", "B")):
        share = 100 * costs[key] / dense[key] if dense[key] else 100.0
        text = f"{costs[key]:.1f} ms" if unit == "ms" else f"{amount(costs[key])}{unit}"
        found.append({"key": key, "label": label, "text": text, "share": share, "more": share > 101})
    return found


def sections(comparison: Comparison) -> list[dict[str, Any]]:
    """One a case: the picture, what was asked, and a card for each method."""
    drawn = frames(comparison)
    return [
        {
            "name": case.name or "picture",
            "question": case.question,
            "truth": case.truth.answer if case.truth else None,
            "outlined": case.truth is not None and not case.truth.evidence.all(),
            "picture": picture,
            "cards": [card(look, looks[0], url) for look, url in zip(looks, urls, strict=True)],
        }
        for case, looks, (picture, urls) in zip(comparison.cases, comparison.looks, drawn, strict=True)
    ]


def card(look: Look, dense: Look, overlay: str) -> dict[str, Any]:
    """What a card shows of one method on one case; ``overlay`` is a data URL."""
    costs = bars(vars(look.cost), vars(dense.cost))
    return {**vars(look.answered), "method": look.method, "keep": look.keep, "overlay": overlay, "bars": costs}


def family_table(survey: Survey) -> dict[str, Any]:
    """{"families": [(name, n)], "rows": [{..., "cells": [row of that family or None]}]}"""
    found = {(row["method"], row["keep"], row["family"]): row for row in survey.families}
    names = list(dict.fromkeys(row["family"] for row in survey.families))
    counts = {row["family"]: row["n"] for row in survey.families}
    rows: list[dict[str, Any]] = []
    for row in survey.rows:
        cells: Sequence[Any] = [found.get((row["method"], row["keep"], name)) for name in names]
        rows.append({**row, "cells": cells})
    return {"families": [(name, counts[name]) for name in names], "rows": rows}


def amount(value: float) -> str:
    """Three digits and a unit prefix: 1.23 G.

    >>> amount(1234567), amount(950), amount(0)
    ('1.23 M', '950 ', '0 ')
    """
    for size, prefix in UNITS:
        if abs(value) >= 0.9995 * size:
            scaled = value / size
            return f"{scaled:.{max(0, 3 - len(str(round(scaled))))}f} {prefix}"
    return f"{value:.3g} "


def keep_text(keep: float | int) -> str:
    """A count as it is, a share in percent."""
    return f"{keep} token{'s' if keep > 1 else ''}" if isinstance(keep, int) else f"{100 * keep:.4g}%"


def percent(share: float | None) -> str:
    """A share in percent with one decimal, nothing for None."""
    return "" if share is None else f"{100 * share:.1f}%"
