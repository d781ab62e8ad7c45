"""``vistok bench``: a sweep from a file or from flags, a recipe with other steps, reports, and what changed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vistok.cli.console import Json, UserError, console, emit, progress, show_rows
from vistok.cli.options import check_folder, parse_keeps

if TYPE_CHECKING:
    from vistok.bench.sweep import Sweep
    from vistok.engine import Engine, Resources

OUT = Path("out/bench")
ABLATION = Path("out/ablate")
OutFolder = Annotated[
    Path, typer.Option("--out", help="Folder of the results; a sweep that was stopped goes on there.")
]
Workers = Annotated[int, typer.Option("--workers", min=1, help="Processes; times are only to be trusted with one.")]
EngineName = Annotated[str, typer.Option("--engine", help="local, or ray.")]
Address = Annotated[str | None, typer.Option("--address", help="Of a Ray cluster (default: one of its own).")]
Cpus = Annotated[
    int | None, typer.Option("--cpus", min=1, help="Cores of a worker (default: all by the workers; ray: 1).")
]
Gpus = Annotated[float, typer.Option("--gpus", min=0, help="GPUs of each worker, or a share of one.")]
Keeps = Annotated[str | None, typer.Option("--keep", help="Tokens left, as for `vistok ask`; several with commas.")]
Tasks = Annotated[str | None, typer.Option("--tasks", help="Of the world, or names of the file's [data.NAME].")]
Number = Annotated[int | None, typer.Option("--n", min=1, help="Pictures, one question each.")]
Several = Annotated[str | None, typer.Option(help="As in the file, with commas.")]


def run(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="A TOML file that says what to vary; flags overrule it.")
    ] = None,
    models: Annotated[str | None, typer.Option("--models", help="Shipped models, folders, names on the hub.")] = None,
    methods: Annotated[
        str | None, typer.Option("--methods", help="Systems; a+b composes, a:select=topk swaps.")
    ] = None,
    keep: Keeps = None,
    tasks: Tasks = None,
    protocols: Several = None,
    precisions: Several = None,
    weights: Several = None,
    caches: Several = None,
    seeds: Several = None,
    n: Number = None,
    probabilities: Annotated[
        bool | None, typer.Option("--probabilities/--no-probabilities", help="Measure how probable answers are.")
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", help="A folder with pictures.jsonl of your own, asked as a task (docs/data.md)."),
    ] = None,
    out: OutFolder = OUT,
    workers: Workers = 1,
    engine: EngineName = "local",
    address: Address = None,
    cpus: Cpus = None,
    gpus: Gpus = 0,
    as_json: Json = False,
) -> None:
    """Measure every cell of a sweep that is not in the folder yet."""
    given = _entries(config)
    lists = {"models": models, "methods": methods, "tasks": tasks, "protocols": protocols, "precisions": precisions}
    for name, text in (lists | {"weights": weights, "caches": caches}).items():
        if text is not None:
            given[name] = [part.strip() for part in text.split(",")]
    if keep is not None:
        given["keep"] = parse_keeps(keep)
    if seeds is not None:
        given["seeds"] = _integers("--seeds", seeds)
    given |= {name: value for name, value in (("n", n), ("probabilities", probabilities)) if value is not None}
    if data:
        own = {folder.resolve().name: {"folder": str(folder.resolve())} for folder in data}
        given["data"] = dict(given.get("data", {})) | own
        if tasks is None:
            given["tasks"] = [*given.get("tasks", []), *(name for name in own if name not in given.get("tasks", []))]
    _measure(_sweep(given, config), out, Runs(engine, address, workers, cpus, gpus), as_json, config)


def ablate(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="A system that is a chain of steps.")],
    swaps: Annotated[
        list[str] | None,
        typer.Option("--swap", help="SLOT=STEP,STEP..: each in its turn, the rest held; without it, what there is."),
    ] = None,
    model: Annotated[str, typer.Option("--model", help="A shipped model, a folder, a name on the hub.")] = "",
    keep: Keeps = "0.25,0.1",
    tasks: Tasks = "all",
    n: Number = 200,
    seeds: Several = "0",
    out: OutFolder = ABLATION,
    workers: Workers = 1,
    engine: EngineName = "local",
    address: Address = None,
    cpus: Cpus = None,
    gpus: Gpus = 0,
    as_json: Json = False,
) -> None:
    """Swap one step of a recipe (score, allocate, select, merge, order), hold the rest, and measure the difference."""
    from vistok import catalogue
    from vistok.host.recipe import steps_of, swap
    from vistok.zoo import DEFAULT

    try:
        recipe = catalogue.create(method)
        steps = steps_of(recipe)
    except (catalogue.UnknownSystem, ValueError) as error:
        raise UserError("METHOD", method, str(error)) from error
    if not swaps:
        shown = [{"slot": slot, "step": one.step, "choices": ", ".join(one.choices)} for slot, one in steps.items()]
        for row in shown if as_json else ():
            emit(row)
        if not as_json:
            show_rows(shown, ("slot", "step", "choices"), title=f"{method}: steps, and what --swap takes for them")
        return
    swapped = []
    for text in swaps:
        slot, sign, names = text.partition("=")
        if not sign or not names:
            raise UserError("--swap", text, "must be SLOT=STEP, or SLOT=STEP,STEP")
        for name in names.split(","):
            try:
                swap(recipe, **{slot: name})  # type: ignore[arg-type]  # slots are strings
            except ValueError as error:
                raise UserError("--swap", text, str(error)) from error
            swapped.append(f"{method}:{slot}={name}")
    sweep = _sweep(
        {
            "models": [model or DEFAULT],
            "methods": [method, *swapped],
            "keep": parse_keeps(keep or ""),
            "tasks": [part.strip() for part in (tasks or "").split(",")],
            "n": n,
            "seeds": _integers("--seeds", seeds or ""),
        },
        None,
    )
    _measure(sweep, out, Runs(engine, address, workers, cpus, gpus))
    from vistok.bench.rows import read
    from vistok.bench.summary import against

    keys = {cell.key for cell in sweep.cells()}
    frame = read(out)
    found = against(frame.filter(frame["cell"].is_in(list(keys))), method)
    for row in found if as_json else ():
        emit(row)
    if not as_json:
        heads = ("task", "keep", "method", "right", "over", "95%", "tokens", "recall", "select ms")
        show_rows([_ablated(row) for row in found], heads, title=f"{method}, one step swapped at a time")


def _ablated(row: Mapping[str, Any]) -> dict[str, Any]:
    own = row["over"] is None
    return {
        **row,
        "right": f"{row['accuracy']:.1%}",
        "over": "" if own else f"{100 * row['over']:+.1f}",
        "95%": "" if own else f"{100 * row['over_low']:+.1f} to {100 * row['over_high']:+.1f}",
        "tokens": f"{row['tokens']:.1f}",
        "recall": "" if row["evidence_recall"] is None else f"{row['evidence_recall']:.0%}",
        "select ms": f"{row['select_ms']:.1f}",
    }


def _entries(config: Path | None) -> dict[str, Any]:
    """Those of the file."""
    if config is None:
        return {}
    if not config.is_file():
        raise UserError("CONFIG", str(config), "must be a TOML file")
    from vistok.bench.sweep import entries_of

    try:
        return entries_of(config)
    except ValueError as error:
        raise UserError("CONFIG", str(config), str(error)) from error


def _sweep(given: Mapping[str, Any], config: Path | None) -> Sweep:
    from vistok.bench.sweep import Sweep

    try:
        return Sweep.of({"name": "sweep", **given})
    except (ValueError, TypeError) as error:
        raise UserError("CONFIG", str(config or "flags"), str(error)) from error


def _integers(argument: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(argument, text, "must be whole numbers, separated by commas") from error


@dataclass(frozen=True)
class Runs:
    """What cells run on, as it was asked for."""

    engine: str
    address: str | None
    workers: int
    cpus: int | None
    gpus: float

    def check(self) -> None:
        """Raises UserError for options that mean nothing, or nothing together."""
        if self.engine not in ("local", "ray"):
            raise UserError("--engine", self.engine, "must be local or ray")
        if self.address is not None and self.engine != "ray":
            raise UserError("--address", self.address, "goes with --engine ray")

    def connect(self) -> tuple[Engine, Resources]:
        """The engine, and what each worker needs."""
        from vistok.engine import LocalEngine, RayEngine, Resources

        if self.engine == "ray":
            return RayEngine(self.address, self.workers), Resources(self.cpus or 1, self.gpus)
        shared = max(1, (os.cpu_count() or 1) // self.workers)
        return LocalEngine(self.workers), Resources(self.cpus or shared, self.gpus)


def _measure(sweep: Sweep, out: Path, runs: Runs, as_json: bool = False, config: Path | None = None) -> None:
    """Run the cells that are not there yet. Raises UserError where some could not be measured."""
    runs.check()
    folder = check_folder(out).resolve()
    from vistok.bench import rows
    from vistok.bench.run import Worker, measure

    try:
        cells = sweep.cells()
    except ValueError as error:  # of the user's own pictures
        raise UserError("CONFIG", str(config or "flags"), str(error)) from error
    engine, resources = runs.connect()
    by_key = {cell.key: cell for cell in cells}
    failed = 0
    with progress() as bar:
        task = bar.add_task("measuring", total=len(cells))
        outcomes = engine.map(
            cells,
            measure,
            setup=partial(Worker, folder),
            resources=resources,
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
        raise UserError("CONFIG", str(config or "flags"), f"has {failed} cells that could not be measured (see above)")


def compact(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where `vistok bench run` wrote or writes.")] = OUT,
    as_json: Json = False,
) -> None:
    """Move the rows of finished cells, one file each, into few files; also while drivers are at work."""
    if not (folder / "rows").is_dir():
        raise UserError("FOLDER", str(folder), "must hold the results of `vistok bench run`")
    from vistok.bench import rows
    from vistok.engine import claim, owner_of

    taken = claim(folder, "compact")
    if taken is None:
        at_work = owner_of(folder, "compact")
        raise UserError("FOLDER", str(folder), f"must not be under another compaction; {at_work} is at it")
    with taken:
        done = rows.compact(folder)
    if as_json:
        emit(vars(done))
        return
    console().print(
        f"{done.cells} cells packed: {done.files_before} files of {done.bytes_before / 1e6:.1f} MB "
        f"are now {done.files_after} of {done.bytes_after / 1e6:.1f} MB",
        markup=False,
        soft_wrap=True,
    )


def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where `vistok bench run` wrote.")] = OUT,
) -> None:
    """Write the page (report.html), tables (report.md) and curves of a sweep beside its rows."""
    from vistok.bench.sweep_report import write

    try:
        paths = write(folder)
    except ValueError as error:
        raise UserError("FOLDER", str(folder), "must hold the results of `vistok bench run`") from error
    for path in paths:
        console().print(str(path), markup=False, soft_wrap=True)


def rank(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER..", help="Of sweeps; their cells are pooled.")],
    seed: Annotated[int, typer.Option("--seed", help="Of the intervals.")] = 0,
    as_json: Json = False,
) -> None:
    """One ranking of methods from all that was measured, however sparse; only equal tokens are compared (ONEBench)."""
    import polars

    from vistok.bench.ranking import rank as ranked
    from vistok.bench.rows import read

    frames = []
    for folder in folders:
        try:
            frames.append(read(folder))
        except ValueError as error:
            raise UserError("FOLDER", str(folder), "must hold the results of `vistok bench run`") from error
    try:
        found = ranked(polars.concat(frames), seed)
    except ValueError as error:
        raise UserError("FOLDER", " ".join(map(str, folders)), str(error).partition(": ")[2]) from error
    for row in found if as_json else ():
        emit(row)
    if not as_json:
        shown = [
            {
                **row,
                "method": row["method"] if row["hyper"] == "{}" else f"{row['method']} {row['hyper']}",
                "strength": f"{row['strength']:+.2f}",
                "95%": f"{row['low']:+.2f} to {row['high']:+.2f}",
                "mean": f"{row['mean']:.1%}",
            }
            for row in found
        ]
        show_rows(shown, ("method", "strength", "95%", "samples", "mean"), title="ranking over all questions")


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
