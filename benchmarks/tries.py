"""What ``vistok try`` measured of systems, kept in one page: each in a process of its own, on one thread.

Rows stay in docs/results/tries.json until a system is measured again.

python -m benchmarks.tries SLUG ... | --family attend   [--out docs/results]
python -m benchmarks.tries --page                       the page alone, from the rows
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import machine_line
from benchmarks.studies import write
from vistok import catalogue

PAGE = "tries.md"
INTRO = """# What `vistok try` measured

`python -m benchmarks.tries` makes this page. A claim is the one sentence of a paper that can be measured here, in about
a minute, at a very small size and with one seed: that it holds says little of the paper's scale, and that it does not
hold says no more. Every figure is with and without the system in one run of equal budget. Seconds are wall time on one
thread, on machines whose load the last column tells."""


def measure(slug: str) -> dict[str, Any]:
    """The row of ``vistok try``, with what it ran on. Raises RuntimeError with its last words where it failed."""
    command = [sys.executable, "-m", "vistok", "try", slug, "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    if ran.returncode or not lines:
        raise RuntimeError(f"{slug}: {ran.stderr.strip().splitlines()[-1:]}")
    return {**json.loads(lines[-1]), "machine": machine_line()}


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """The page: a table a family."""
    lines = [INTRO, ""]
    for family in catalogue.FAMILIES:
        slugs = [card.slug for card in catalogue.systems(family) if card.slug in rows]
        if not slugs:
            continue
        held = sum(rows[slug]["holds"] for slug in slugs)
        lines += [f"## {family}: {held} of {len(slugs)} held", ""]
        lines += [
            "| system | claim | metric | without | with | held | seconds, load |",
            "|---|---|---|---:|---:|---|---|",
        ]
        for slug in slugs:
            row = rows[slug]
            note = f"{row['metric']} ({row['note']})" if row.get("note") else row["metric"]
            load = row["machine"].partition("load ")[2].partition(",")[0]
            cells = [f"`{slug}`", catalogue.card(slug).claim, note, f"{row['baseline']:.4g}", f"{row['value']:.4g}"]
            cells += [
                "yes" if row["holds"] else "no",
                f"{row['seconds']:.0f}, {load}" if load else f"{row['seconds']:.0f}",
            ]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slug", nargs="*")
    parser.add_argument("--family")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    given = parser.parse_args(arguments)
    slugs = given.slug or [card.slug for card in catalogue.systems(given.family)]
    data = (given.out / PAGE).with_suffix(".json")
    for slug in () if given.page else slugs:
        row = measure(slug)
        print(f"{slug}: {row['metric']}: {row['baseline']:.4g} and {row['value']:.4g}", flush=True)
        rows = json.loads(data.read_text(encoding="utf-8")) if data.exists() else {}
        write(data, json.dumps(dict(sorted((rows | {slug: row}).items())), indent=1) + "\n")
    write(given.out / PAGE, markdown(json.loads(data.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
