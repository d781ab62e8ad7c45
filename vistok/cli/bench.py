"""``vistok bench``: a sweep from a file, its report, and what changed between two of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from vistok.cli.console import Json, UserError, console, emit, progress, show_rows
from vistok.cli.options import check_folder

OUT = Path("out/bench")
Folder = Annotated[Path, typer.Option("--out", help="Folder of the results; a sweep that was stopped goes on there.")]


def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file that says what to vary.")],
    out: Folder = OUT,
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Processes; times are only to be trusted with one.")
    ] = 1,
    engine: Annotated[str, typer.Option("--engine", help="local, or ray.")] = "local",
    address: Annotated[
        str | None, typer.Option("--address", help="Of a Ray cluster (default: one of its own).")
    ] = None,
    cpus: Annotated[
        int | None, typer.Option("--cpus", min=1, help="Cores of a worker (default: all by the workers; ray: 1).")
    ] = None,
    gpus: Annotated[float, typer.Option("--gpus", min=0, help="GPUs of each worker, or a share of one.")] = 0,
    as_json: Json = False,
) -> None:
    """Measure every cell of a sweep that is not in the folder yet."""
    if not config.is_file():
        raise UserError("CONFIG", str(config), "must be a TOML file")
    if engine not in ("local", "ray"):
        raise UserError("--engine", engine, "must be local or ray")
    if address is not None and engine != "ray":
        raise UserError("--address", address, "goes with --engine ray")
    folder = check_folder(out).resolve()
    from vistok.bench import rows
    from vistok.bench.run import Worker, measure
    from vistok.bench.sweep import Sweep
    from vistok.engine import LocalEngine, RayEngine, Resources

    try:
        cells = Sweep.read(config).cells()
    except ValueError as error:
        raise UserError("CONFIG", str(config), str(error)) from error
    runs = LocalEngine(workers) if engine == "local" else RayEngine(address, workers)
    if cpus is None:
        cpus = max(1, (os.cpu_count() or 1) // workers) if engine == "local" else 1
    by_key = {cell.key: cell for cell in cells}
    failed = 0
    with progress() as bar:
        task = bar.add_task("measuring", total=len(cells))
        outcomes = runs.map(
            cells,
            measure,
            setup=partial(Worker, folder),
            resources=Resources(cpus, gpus),
            folder=folder,
            done=partial(rows.done, folder),
        )
        for outcome in outcomes:
            cell = by_key[outcome.key]
            told = {"cell": cell.key, "model": cell.model, "method": cell.method, "keep": cell.keep, "task": cell.task}
            failed += bool(outcome.error)
            if outcome.error:
                console().print(outcome.error, markup=False, soft_wrap=True)
            if as_json:
                emit({**told, "status": str(outcome.status), "rows": outcome.value, "error": outcome.error or None})
            bar.advance(task)
    if failed:
        raise UserError("CONFIG", str(config), f"has {failed} cells that could not be measured (see above)")


def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where `vistok bench run` wrote.")] = OUT,
) -> None:
    """Write tables (report.md) and curves (report.svg) of a sweep beside its rows."""
    from vistok.bench.sweep_report import write

    try:
        paths = write(folder)
    except ValueError as error:
        raise UserError("FOLDER", str(folder), "must hold the results of `vistok bench run`") from error
    for path in paths:
        console().print(str(path), markup=False, soft_wrap=True)


def diff(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="Folder of a sweep.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="Folder of another one, with cells of the same kind.")],
    as_json: Json = False,
) -> None:
    """Accuracy of each setting on the questions that both asked; exits with 1 where one is lower beyond noise (95%)."""
    from vistok.bench.rows import read
    from vistok.bench.summary import changes

    frames = []
    for name, folder in (("BEFORE", before), ("AFTER", after)):
        try:
            frames.append(read(folder))
        except ValueError as error:
            raise UserError(name, str(folder), "must hold the results of `vistok bench run`") from error
    found = changes(frames[0], frames[1])
    if not found:
        raise UserError("AFTER", str(after), "must hold a setting and questions that BEFORE holds too")
    for row in found:
        if as_json:
            emit(row)
    if not as_json:
        heads = ("model", "method", "keep", "task", "questions", "before", "after", "change", "95%", "verdict")
        show_rows([_shown(row) for row in found], heads, title="accuracy on the questions that both asked")
    if any(row["verdict"] == "lower" for row in found):
        raise typer.Exit(1)


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **row,
        "before": f"{row['before']:.1%}",
        "after": f"{row['after']:.1%}",
        "change": f"{100 * row['change']:+.1f}",
        "95%": f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}",
    }
