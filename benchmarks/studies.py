"""Studies: each a module that yields the rows of one table; the rows are kept beside the page that shows them all.

A study has a docstring (what is compared), ``TITLE`` and ``study(trial, quick) -> rows``. One can be run again without
the others.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.common import machine_line


@dataclass(frozen=True)
class Studies:
    """The modules of a package as one command and one page."""

    package: ModuleType
    page: str
    """Name of the page, with .md; the rows are beside it, with .json."""
    intro: str
    """Markdown of its beginning; "{pictures}" is filled in."""
    trial: Callable[[int], Any]
    """Number of held-out pictures -> what a study measures with."""
    pictures: int = 500

    def names(self) -> list[str]:
        """The studies."""
        return sorted(module.name for module in pkgutil.iter_modules(self.package.__path__))

    def run(self, name: str, pictures: int, quick: bool) -> dict[str, Any]:
        """One study: {"title", "about", "rows", "seconds", "machine"}."""
        module = importlib.import_module(f"{self.package.__name__}.{name}")
        start, rows = time.perf_counter(), []
        for row in module.study(self.trial(pictures), quick=quick):
            rows.append(row)
            print("  ".join(f"{key} {_shown(key, value)}" for key, value in row.items()), flush=True)
        return {
            "title": module.TITLE,
            "about": " ".join((module.__doc__ or "").split()),
            "rows": rows,
            "seconds": round(time.perf_counter() - start),
            "machine": machine_line(),
        }

    def markdown(self, found: dict[str, dict[str, Any]], pictures: int) -> str:
        """The page."""
        lines = [self.intro.format(pictures=pictures), ""]
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

    def main(self, about: str | None, arguments: Sequence[str] | None = None) -> None:
        """The command."""
        parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("study", nargs="*", help=f"of {', '.join(self.names())}; all by default")
        parser.add_argument("--quick", action="store_true", help="a few steps each, to see they run; writes nothing")
        parser.add_argument("--pictures", type=int, default=self.pictures)
        parser.add_argument("--out", type=Path, default=Path("docs/results"))
        given = parser.parse_args(arguments)
        if unknown := set(given.study) - set(self.names()):
            parser.error(f"study: got {', '.join(sorted(unknown))}, must be of {', '.join(self.names())}")
        data = (given.out / self.page).with_suffix(".json")
        found = json.loads(data.read_text(encoding="utf-8")) if data.exists() else {}
        for name in given.study or self.names():
            print(f"== {name}", flush=True)
            done = self.run(name, given.pictures, given.quick)
            if given.quick:
                continue
            found[name] = done
            given.out.mkdir(parents=True, exist_ok=True)
            write(data, json.dumps(found, indent=1) + "\n")
            write(given.out / self.page, self.markdown(found, given.pictures))


def _shown(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        exact = repr(value)  # a setting such as 0.9999 is told as it is
        if len(exact) <= 6:
            return exact
        return f"{value:.3g}" if abs(value) > 1 or "flop" in key else f"{value:.3f}"
    return "" if value is None else str(value)


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
