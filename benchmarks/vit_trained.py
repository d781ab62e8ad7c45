"""Trained methods for vision transformers: each against what its paper beats, by the studies in benchmarks.vit_studies.

A study trains both sides for equal steps on equal pictures, and yields the rows of one table; its file says what is
compared. The rows are kept beside the page, so that one study can be run again without the others.

python -m benchmarks.vit_trained [STUDY ...] [--quick] [--pictures 500] [--out docs/results]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import vit_studies
from benchmarks.common import machine_line
from vistok.bench.vit_trial import ViTTrial

PAGE, DATA = "vit-trained.md", "vit-trained.json"


def studies() -> list[str]:
    """The studies by name: those of ``benchmarks.vit_studies``."""
    return sorted(module.name for module in pkgutil.iter_modules(vit_studies.__path__))


def run(name: str, pictures: int, quick: bool) -> dict[str, Any]:
    """One study: {"title", "about", "rows", "seconds", "machine"}."""
    module = importlib.import_module(f"benchmarks.vit_studies.{name}")
    start, rows = time.perf_counter(), []
    for row in module.study(ViTTrial(pictures=pictures), quick=quick):
        rows.append(row)
        print("  ".join(f"{key} {_shown(key, value)}" for key, value in row.items()), flush=True)
    return {
        "title": module.TITLE,
        "about": " ".join((module.__doc__ or "").split()),
        "rows": rows,
        "seconds": round(time.perf_counter() - start),
        "machine": machine_line(),
    }


def page(found: dict[str, dict[str, Any]], pictures: int) -> str:
    """The results in Markdown."""
    lines = [
        "# Vision transformers with trained methods",
        "",
        f"`python -m benchmarks.vit_trained` makes this page ({pictures} held-out pictures; training by "
        "`vistok.bench.vit_trial.ViTTrial.fit`). Both sides of a comparison get the same pictures, steps and seeds.",
        "",
    ]
    for name, study in sorted(found.items()):
        columns = list(study["rows"][0])
        lines += [
            f"## {study['title']}",
            "",
            study["about"],
            "",
            "| " + " | ".join(column.replace("_", " ") for column in columns) + " |",
            "|" + "".join("---|" if isinstance(study["rows"][0][c], str) else "---:|" for c in columns),
            *("| " + " | ".join(_shown(c, row[c]) for c in columns) + " |" for row in study["rows"]),
            "",
            f"{study['seconds']} s for `{name}`; {study['machine']}.",
            "",
        ]
    return "\n".join(lines)


def _shown(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        exact = repr(value)  # a setting such as 0.9999 is told as it is
        if len(exact) <= 6:
            return exact
        return f"{value:.3g}" if abs(value) > 1 or "flop" in key else f"{value:.3f}"
    return "" if value is None else str(value)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="*", help=f"of {', '.join(studies())}; all by default")
    parser.add_argument("--quick", action="store_true", help="a few steps each, to see that they run; writes nothing")
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    given = parser.parse_args(arguments)
    if unknown := set(given.study) - set(studies()):
        parser.error(f"study: got {', '.join(sorted(unknown))}, must be of {', '.join(studies())}")
    data = given.out / DATA
    found = json.loads(data.read_text(encoding="utf-8")) if data.exists() else {}
    for name in given.study or studies():
        print(f"== {name}", flush=True)
        done = run(name, given.pictures, given.quick)
        if given.quick:
            continue
        found[name] = done
        given.out.mkdir(parents=True, exist_ok=True)
        _write(data, json.dumps(found, indent=1) + "\n")
        _write(given.out / PAGE, page(found, given.pictures))


if __name__ == "__main__":
    main()
