"""What the engine costs a cell: 1,000 cells that do nothing, on each engine, and what that is for a million.

The clock starts at the first outcome, so that starting workers and Ray is left out; it is given on its own, as the
seconds until that outcome. With --claims each is run again with claims, whose lock files go to a temporary folder.

python -m benchmarks.engine_overhead [--cells 1000] [--workers 1 2] [--engines local ray] [--claims] [--json]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vistok.engine import Engine, LocalEngine, RayEngine

MILLION = 1_000_000


@dataclass(frozen=True)
class Nothing:
    """A cell as light as a key."""

    key: str


def do_nothing(state: None, cell: Nothing) -> str:
    return cell.key


def engines(names: list[str], workers: list[int]) -> Iterator[tuple[str, int, Engine]]:
    """Name, workers, engine; the local engine with one worker both in this process and in one of its own."""
    for name in names:
        for count in workers:
            if name == "ray":
                yield "ray", count, RayEngine("local", count)
                continue
            if count == 1:
                yield "in this process", 1, LocalEngine()
            yield "processes", count, LocalEngine(count, spawn=True)


def row_of(name: str, workers: int, engine: Engine, cells: int, folder: str | None) -> dict[str, Any]:
    """Run the cells once."""
    begun = time.perf_counter()
    outcomes = engine.map([Nothing(f"{number:07}") for number in range(cells)], do_nothing, folder=folder)
    next(outcomes)
    first = time.perf_counter()
    rest = sum(1 for _ in zip(range(cells - 1), outcomes, strict=False))
    each = (time.perf_counter() - first) / rest
    outcomes.close()
    return {
        "engine": name,
        "workers": workers,
        "claims": folder is not None,
        "first_s": round(first - begun, 2),
        "us_a_cell": round(each * 1e6, 1),
        "cells_a_second": round(1 / each),
        "million_min": round(each * MILLION / 60, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--engines", nargs="+", choices=["local", "ray"], default=["local", "ray"])
    parser.add_argument("--claims", action="store_true", help="with claims in a folder too")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    if options.cells < 2:
        parser.error(f"--cells is {options.cells}; the clock runs from the first cell to the last of 2 or more")
    if not options.json:
        print(f"{'engine':16} {'workers':>7} {'claims':>6} {'first s':>8} {'us/cell':>8} {'cells/s':>8}  10^6 cells")
    for claims in [False, True] if options.claims else [False]:
        for name, workers, engine in engines(options.engines, options.workers):
            with tempfile.TemporaryDirectory() as folder:
                row = row_of(name, workers, engine, options.cells, folder if claims else None)
            if options.json:
                print(json.dumps(row), flush=True)
                continue
            print(
                f"{name:16} {workers:7} {'yes' if claims else 'no':>6} {row['first_s']:8.2f} {row['us_a_cell']:8.1f} "
                f"{row['cells_a_second']:8} {row['million_min']:6.1f} min",
                flush=True,
            )
    if not options.json:
        print(
            "One driver hands out all cells, so the last column is about the least time that a sweep of 10^6 cells "
            "takes,\nhowever many GPUs there are; 1,000 workers stay busy while a cell lasts over 1,000 x us/cell."
        )


if __name__ == "__main__":
    main()
