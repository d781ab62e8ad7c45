"""``vistok search``: tune a method's hyper-parameters on a model, saved as a file that ``apply`` reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vistok.cli.console import Json, UserError, console, emit, progress, show_rows
from vistok.cli.options import ModelArgument, load_model, parse_keep, parse_methods
from vistok.cli.questions import Data, Number, World, check_setting_path, read_questions

if TYPE_CHECKING:
    from vistok.bench.search import Evaluation

SHOWN = 5


def search(
    model: ModelArgument,
    method: Annotated[str, typer.Argument(metavar="METHOD", help="The reducer to tune.")] = "vflowopt",
    world: World = None,
    data: Data = None,
    n: Number = 30,
    keep: Annotated[str, typer.Option("--keep", help="Tokens allowed: a count or a share, mean over layers.")] = "0.25",
    space: Annotated[
        list[str] | None,
        typer.Option("--space", help="NAME=LOW:HIGH or NAME=A|B, again for each; default: the method's own."),
    ] = None,
    calls: Annotated[int, typer.Option("--calls", min=1, max=100_000, help="Settings to try.")] = 300,
    starts: Annotated[int, typer.Option("--starts", min=1, help="How many of them at random.")] = 27,
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("search.json"),
    as_json: Json = False,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**31, help="Seed of the optimiser.")] = 42,
) -> None:
    """Tune a method's hyper-parameters so that the last token's final state moves least, within a count of tokens.

    What was tried is kept in a journal beside --out, so that a search that was stopped goes on where it was.
    """
    share = parse_keep(keep)
    names = parse_methods(method, "METHOD")
    if len(names) != 1 or "+" in names[0] or names[0] == "dense":
        raise UserError("METHOD", method, "must be one reducer")
    check_setting_path(out)
    cases, _ = read_questions(world, data, n, seed)
    loaded, processor = load_model(model, "MODEL")
    from vistok.bench.search import check_space, read_space
    from vistok.bench.search import search as run

    ranges = check_space(names[0], read_space(space) if space else None, {})
    with progress() as bar:
        task = bar.add_task("trying settings", total=calls)

        def tell(evaluation: Evaluation) -> None:
            bar.advance(task)
            if as_json:
                emit(_row(evaluation))

        found = run(
            loaded, processor, names[0], cases,
            keep=share, space=ranges, calls=calls, starts=starts, seed=seed,
            journal=out.with_suffix(".journal.jsonl"), on_call=tell,
        )  # fmt: skip
    path = found.setting().write(out)
    if as_json:
        return
    ranked = sorted((e for e in found.evaluations if e.allowed), key=lambda e: -e.cosine)
    rows = [{**_row(e), "cosine": f"{e.cosine:.4f}"} for e in ranked[:SHOWN]]
    show_rows(rows, ["cosine", "tokens", *found.best.hyper], title=f"the best of {len(found.evaluations)}")
    console().print(f'vistok.apply(model, "{path}") uses the first', markup=False)


def _row(evaluation: Evaluation) -> dict[str, Any]:
    known = {"cosine": evaluation.cosine, "tokens": evaluation.tokens, "allowed": evaluation.allowed}
    return {**known, "seconds": evaluation.seconds, **evaluation.hyper}
