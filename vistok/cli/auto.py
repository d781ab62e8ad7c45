"""``vistok auto``: the cheapest method and count that stays within a bound, saved as a file that ``apply`` reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from vistok.cli.console import Json, Seed, UserError, console, emit, progress, show_rows
from vistok.cli.options import ModelArgument, create, load_model, parse_keeps, parse_methods
from vistok.cli.questions import Data, Number, World, check_setting_path, read_questions

COLUMNS = {
    "method": "method",
    "keep": "keep",
    "accuracy": "right",
    "drop": "points lost",
    "interval": "95%",
    "ms": "ms",
    "gflops": "GFLOPs",
    "holds": "",
}


def auto(
    model: ModelArgument,
    world: World = None,
    data: Data = None,
    n: Number = 200,
    max_drop: Annotated[
        str | None, typer.Option("--max-drop", help="Points of accuracy that may be lost: 2pt, 2% or 0.02.")
    ] = None,
    ttft: Annotated[str | None, typer.Option("--ttft", help="Time to the first token, at most: 80ms or 0.08s.")] = None,
    sure: Annotated[
        bool, typer.Option("--sure", help="The whole 95% interval of the drop must stay within --max-drop.")
    ] = False,
    methods: Annotated[str, typer.Option("--methods", help="Names separated by commas, a+b composes, or all.")] = "all",
    keep: Annotated[str, typer.Option("--keep", help="Counts or shares, separated by commas.")] = "0.5,0.25,0.11,0.05",
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("auto.json"),
    as_json: Json = False,
    seed: Seed = 0,
) -> None:
    """Find the cheapest method and count that is good enough, and save it for vistok.apply.

    What was answered is kept in a journal beside --out, so that a run that was stopped goes on where it was.
    """
    if max_drop is None and ttft is None:
        raise UserError("--max-drop", "nothing", "must be given, such as 2pt, or --ttft such as 80ms")
    from vistok.bench.auto import Bound, choose, measure_settings, setting_of
    from vistok.bench.compare import settings_of

    bound = Bound(
        None if max_drop is None else parse_points(max_drop), None if ttft is None else parse_milliseconds(ttft), sure
    )
    keeps, names = parse_keeps(keep), parse_methods(methods)
    check_setting_path(out)
    cases, answers = read_questions(world, data, n, seed)
    loaded, processor = load_model(model, "MODEL")
    settings = settings_of([create(name, seed) for name in names], keeps)
    journal = out.with_suffix(".journal.jsonl")
    with progress() as bar:
        task = bar.add_task(f"asking {len(cases)} questions", total=len(cases) * len(settings))
        rows, skipped = measure_settings(
            loaded, processor, settings, cases, answers,
            seed=seed, tolerant=methods.strip() == "all", journal=journal,
            on_step=lambda count: bar.advance(task, count),
        )  # fmt: skip
    chosen = choose(rows, bound)
    for row in rows:
        row.update(holds=bound.holds(row), chosen=row is chosen)
    if as_json:
        for row in rows:
            emit(row)
    else:
        _print(rows)
    for name, reason in skipped.items():
        console(stderr=True).print(f"{name} is left out: {reason}", markup=False)
    if chosen is None:
        raise UserError("--max-drop" if max_drop else "--ttft", max_drop or ttft, "no setting holds it, not even dense")
    asked = {"model": model, "max_drop": max_drop, "ttft": ttft, "sure": sure, "seed": seed}
    path = setting_of(chosen, {k: v for k, v in asked.items() if v is not None}).write(out)
    if not as_json:
        with_keep = "" if chosen["method"] == "dense" else f" at keep = {chosen['keep']}"
        console().print(f'{chosen["method"]}{with_keep}; vistok.apply(model, "{path}") uses it', markup=False)


def parse_points(text: str) -> float:
    """Points of accuracy as a share.

    >>> parse_points("2pt"), parse_points("2%"), parse_points("0.02"), parse_points("0")
    (0.02, 0.02, 0.02, 0.0)
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(pt|%|)\s*", text)
    value = float(found[1]) / (100 if found[2] else 1) if found else -1.0
    if not 0 <= value < 1:
        raise UserError("--max-drop", text, "must be points of accuracy such as 2pt or 2%, or a share such as 0.02")
    return value


def parse_milliseconds(text: str) -> float:
    """A time in milliseconds.

    >>> parse_milliseconds("80ms"), parse_milliseconds("0.08s"), parse_milliseconds("80")
    (80.0, 80.0, 80.0)
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(ms|s|)\s*", text)
    value = float(found[1]) * (1000 if found[2] == "s" else 1) if found else 0.0
    if value <= 0:
        raise UserError("--ttft", text, "must be a time such as 80ms or 0.08s")
    return value


def _print(rows: list[dict[str, Any]]) -> None:
    shown = [
        {
            **row,
            "accuracy": f"{row['accuracy']:.1%}",
            "drop": f"{100 * row['drop']:.1f}",
            "interval": f"{100 * row['drop_low']:.1f} to {100 * row['drop_high']:.1f}",
            "ms": f"{row['ttft_ms']:.1f}",
            "gflops": f"{row['flops'] / 1e9:.2f}",
            "holds": "chosen" if row["chosen"] else "holds" if row["holds"] else "",
        }
        for row in sorted(rows, key=lambda row: row["flops"])
    ]
    show_rows(shown, COLUMNS)
