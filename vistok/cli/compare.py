"""``vistok compare``: all methods on the same questions, as a table, a page and a sheet of overlays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vistok.cli.ask import ANSWER_TOKENS, check_question, in_words, print_question, read_case
from vistok.cli.console import Json, Seed, UserError, console, emit, progress, show_rows
from vistok.cli.options import (
    Model,
    check_folder,
    command_line,
    create,
    load_model,
    parse_keeps,
    parse_methods,
)
from vistok.world import TASKS

if TYPE_CHECKING:
    from vistok.bench.compare import Comparison, Survey

COSTS = {"kept": "tokens", "ttft_ms": "ms", "gflops": "GFLOPs", "kv_kb": "KV kB", "evidence": "recall"}
ANSWER_WIDTH = 16


def compare(
    context: typer.Context,
    picture: Annotated[
        str | None, typer.Argument(metavar="[PICTURE]", help="A picture file, or world:TASK:NUMBER for a drawn one.")
    ] = None,
    question: Annotated[str | None, typer.Argument(metavar="[QUESTION]", help="What to ask.")] = None,
    samples: Annotated[
        bool, typer.Option("--samples", help="Compare on the sample pictures (this is done if nothing else is asked).")
    ] = False,
    world: Annotated[
        str | None, typer.Option("--world", help=f"Compare on many held-out pictures: {', '.join(TASKS)} or all.")
    ] = None,
    n: Annotated[
        int | None, typer.Option("--n", min=1, max=20_000, help="With --world: pictures, one question each (200).")
    ] = None,
    methods: Annotated[
        str,
        typer.Option("--methods", help="Names separated by commas, a+b composes, or all; dense is always measured."),
    ] = "all",
    keep: Annotated[
        str, typer.Option("--keep", help="Tokens to keep: counts (64) or shares (0.25, 25%), separated by commas.")
    ] = "0.25",
    out: Annotated[Path, typer.Option("--out", help="Folder for compare.html and compare.png.")] = Path("out"),
    model: Model = "vistok-tiny",
    as_json: Json = False,
    seed: Seed = 0,
) -> None:
    """Compare methods on one picture, on the sample pictures, or on many of the world."""
    keeps, names = parse_keeps(keep), parse_methods(methods)
    _check_what(picture, samples, world, n)
    cases = [read_case(picture, question)] if picture is not None else []
    folder = check_folder(out)
    loaded, processor = load_model(model)
    for case in cases:
        check_question(loaded, processor, case)
    from vistok.bench.compare import compare_cases, sample_cases, settings_of, survey_world
    from vistok.bench.report import surroundings, write

    settings = settings_of([create(name, seed) for name in names], keeps)
    tolerant = methods.strip() == "all"
    found: Comparison | Survey
    with progress() as bar:
        if world is not None:
            count = 200 if n is None else n
            task = bar.add_task(f"asking {count} pictures", total=count * len(settings))
            found = survey_world(
                loaded, processor, settings, world, count,
                seed=seed, tolerant=tolerant, on_step=lambda answered: bar.advance(task, answered),
            )  # fmt: skip
        else:
            cases = cases or sample_cases()
            task = bar.add_task("comparing", total=len(settings) + len(cases))
            limit = ANSWER_TOKENS if picture is not None else 16
            found = compare_cases(
                loaded, processor, settings, cases,
                tolerant=tolerant, max_new_tokens=limit, on_step=lambda: bar.advance(task),
            )  # fmt: skip
    said = {"model": model, "keep": ", ".join(part.strip() for part in keep.split(",")), "seed": str(seed)}
    paths = write(folder, found, {**said, **surroundings(), "command": command_line(context)})
    if as_json:
        for row in found.rows:
            emit(row)
    else:
        _print(found)
    for name, reason in found.shown.skipped.items():
        console(stderr=True).print(f"{name} is left out: {reason}", markup=False)
    for path in paths:
        console().print(str(path), markup=False, soft_wrap=True)


def _check_what(picture: str | None, samples: bool, world: str | None, n: int | None) -> None:
    given = [name for name, on in (("PICTURE", picture), ("--samples", samples), ("--world", world)) if on]
    if len(given) > 1:
        raise UserError(given[1], "both", f"must not be given with {given[0]}")
    if world is not None and world not in (*TASKS, "all"):
        raise UserError("--world", world, f"must be one of {', '.join(TASKS)}, all")
    if n is not None and world is None:
        raise UserError("--n", n, "needs --world")


def _print(found: Comparison | Survey) -> None:
    from vistok.bench.compare import Survey

    if isinstance(found, Survey):
        _print_survey(found)
    elif len(found.cases) == 1:
        print_question(found.cases[0])
        rows = found.rows
        show_rows([_row(row) for row in rows], {**_method(rows), "answer": "answer", "right": "", **COSTS})
        _print_legend(rows)
    else:
        _print_cases(found)


def _method(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The columns that tell rows apart: keep only where there are several."""
    several = len({row["keep"] for row in rows if row["method"] != "dense"}) > 1
    return {"method": "method", **({"keep": "keep"} if several else {})}


def _row(row: dict[str, Any]) -> dict[str, Any]:
    recall = row["evidence_recall"]
    kept = round(row["tokens_kept"], 1)
    return {**in_words(row), "kept": kept, "evidence": "" if recall is None else f"{recall:.0%}"}


def _print_legend(rows: Sequence[dict[str, Any]]) -> None:
    tokens = sorted({row["tokens_in"] for row in rows})
    of = " or ".join(f"{count:.4g}" for count in tokens) if len(tokens) < 3 else f"{tokens[0]:.4g} to {tokens[-1]:.4g}"
    console().print(
        f"tokens: kept, of {of}; ms: to the first token, median; recall: share of the answer's pixels that stay"
    )


def _print_cases(found: Comparison) -> None:
    for number, case in enumerate(found.cases, 1):
        print_question(case, number)
    marks = {None: "", True: " ✓", False: " ✗"}
    summary = found.summary()
    rows: list[dict[str, Any]] = []
    for row, looks in zip(summary, zip(*found.looks, strict=True), strict=True):
        answers = {
            str(i): _shorten(look.answered.answer) + marks[look.answered.correct] for i, look in enumerate(looks, 1)
        }
        rows.append({**_row(row), **answers})
    show_rows(rows, [*_method(summary), *(str(i) for i in range(1, len(found.cases) + 1))], title="answers")
    counted = [{**_row(row), "right": f"{row['right']} of {row['judged']}"} for row in summary]
    show_rows(counted, {**_method(summary), "right": "right", **COSTS}, title="means over the pictures")
    _print_legend(found.rows)


def _shorten(answer: str) -> str:
    return answer if len(answer) <= ANSWER_WIDTH else answer[: ANSWER_WIDTH - 1].rstrip() + "…"


def _print_survey(found: Survey) -> None:
    rows = [
        {
            **_row(row),
            "accuracy": f"{row['accuracy']:.1%}",
            "interval": f"{100 * row['accuracy_low']:.0f} to {100 * row['accuracy_high']:.0f}",
        }
        for row in found.rows
    ]
    columns = {**_method(found.rows), "accuracy": "right", "interval": "95%", **COSTS}
    show_rows(rows, columns, title=f"{found.task}, {found.rows[0]['n']} pictures")
    _print_legend(found.rows)
