"""``vistok tokenize`` and ``vistok detokenize``: a corpus of pictures as ids in Parquet files, and back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vistok.cli.bench import Address, EngineName, Gpus, Runs, Workers
from vistok.cli.console import Json, UserError, console, emit, progress
from vistok.cli.options import check_folder

if TYPE_CHECKING:
    from vistok.engine.tokens import Report

Threads = Annotated[int, typer.Option("--cpus", min=1, help="Cores of a worker; ids may hang on them.")]


def tokenize(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A folder of pictures; a .tar or .parquet file; a glob of any of these."),
    ],
    tokenizer: Annotated[str, typer.Option("--tokenizer", help="A folder that Tokenizer.save wrote, or of the zoo.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the ids; a run that was stopped goes on there.")],
    column: Annotated[str, typer.Option("--column", help="Of Parquet files, where the pictures are.")] = "image",
    shard_size: Annotated[int, typer.Option("--shard-size", min=1, help="Pictures of a shard.")] = 4096,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Pictures read and opened at once.")] = 64,
    workers: Workers = 1,
    engine: EngineName = "local",
    address: Address = None,
    cpus: Threads = 1,
    gpus: Gpus = 0,
    as_json: Json = False,
) -> None:
    """Write the ids of every picture of a corpus, or go on where that was stopped."""
    runs = Runs(engine, address, workers, cpus, gpus)
    runs.check()
    check_folder(out)
    from vistok.bench.pictures import decode_picture
    from vistok.engine import tokenize as work

    connected, resources = runs.connect()
    with _watched("tokenizing") as (watch, seconds), _told("SOURCE"):
        report = work.tokenize(
            source,
            tokenizer,
            out,
            opener=decode_picture,
            engine=connected,
            resources=resources,
            shard_size=shard_size,
            batch_size=batch_size,
            column=column,
            watch=watch,
        )
    made = report.manifest
    row = {
        "folder": str(out),
        "complete": made.complete,
        "pictures": made.pictures,
        "rejects": made.rejects,
        "shards": made.total,
        "seconds": seconds(),
    }
    _end(report, "SOURCE", source)
    if as_json:
        emit(row)
        return
    seen = f"{made.pictures} pictures as ids in {out}, {made.total} shards; {made.rejects} rejects"
    console().print(seen + (" (rejects.parquet)" if made.rejects else ""), markup=False, soft_wrap=True)


def detokenize(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where `vistok tokenize` wrote.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the PNGs; a run that was stopped goes on there.")],
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="Where it is now, if it was moved.")] = None,
    workers: Workers = 1,
    engine: EngineName = "local",
    address: Address = None,
    cpus: Threads = 1,
    gpus: Gpus = 0,
    as_json: Json = False,
) -> None:
    """Write the pictures of stored ids as PNG files under their source keys."""
    runs = Runs(engine, address, workers, cpus, gpus)
    runs.check()
    check_folder(out)
    from vistok.engine import detokenize as work

    connected, resources = runs.connect()
    with _watched("drawing") as (watch, seconds), _told("DIR"):
        report = work.detokenize(folder, out, engine=connected, tokenizer=tokenizer, resources=resources, watch=watch)
    _end(report, "DIR", str(folder))
    if as_json:
        emit({"folder": str(out), "complete": report.manifest.complete, "seconds": seconds()})
        return
    part = "" if report.manifest.complete else " (of the shards that are done)"
    console().print(f"the pictures of {folder} are in {out}{part}", markup=False, soft_wrap=True)


@contextmanager
def _watched(what: str) -> Iterator[tuple[Callable[..., None], Callable[[], float]]]:
    """A bar of shards with the time that is left and pictures a second; and how long it has been."""
    start = time.monotonic()
    with progress() as bar:
        task = bar.add_task(what, total=None)
        done = 0

        def watch(outcome: Any, ended: int, total: int) -> None:
            nonlocal done
            done += sum(outcome.value or ())
            rate = done / (time.monotonic() - start)
            bar.update(task, completed=ended, total=total, description=f"{what}, {rate:.0f} pictures/s")

        yield watch, lambda: round(time.monotonic() - start, 1)


@contextmanager
def _told(source: str) -> Iterator[None]:
    """Errors of the work, with the name that their argument has here."""
    names = {"source": source, "folder": "--out" if source == "SOURCE" else "DIR", "tokenizer": "--tokenizer"}
    try:
        yield
    except (ValueError, LookupError) as error:
        name, _, rest = str(error).partition(": ")
        if name not in names:
            raise
        raise ValueError(f"{names[name]}: {rest}") from error


def _end(report: Report, argument: str, got: str) -> None:
    """Raises UserError where something is left to be done."""
    for error in report.failed:
        console(stderr=True).print(error, markup=False, soft_wrap=True)
    if report.failed:
        left = f"has {len(report.failed)} shards that could not be done (see above); the same command tries them again"
        raise UserError(argument, got, left)
    if report.held:
        left = f"is at work in {len(report.held)} shards: {', '.join(sorted(set(report.held)))}"
        console(stderr=True).print(f"another run {left}", markup=False, soft_wrap=True)
