"""What several commands ask a model about: held-out pictures of the world, or a folder of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vistok.bench.pictures import Unusable
from vistok.cli.console import UserError
from vistok.world import TASKS
from vistok.world.files import LINES

if TYPE_CHECKING:
    from vistok.bench.measure import Case

World = Annotated[str | None, typer.Option("--world", help=f"Ask about held-out pictures: {', '.join(TASKS)} or all.")]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help=f"Ask about your own: a folder with {LINES}, a line each: "
        '{"image": file, "questions": [{"text": .., "answer": ..}]}; without an answer, dense\'s counts as right.',
    ),
]
Number = Annotated[int, typer.Option("--n", min=1, max=20_000, help="With --world: pictures, one question each.")]


def read_questions(world: str | None, data: Path | None, n: int, seed: int) -> tuple[list[Case], list[str | None]]:
    """Pictures with a question each, and the right answers where they are known. Raises UserError."""
    if (world is None) == (data is None):
        raise UserError("--world", world or "nothing", "must be given, or --data, and not both")
    if data is not None:
        return _read(data)
    if world not in (*TASKS, "all"):
        raise UserError("--world", world, f"must be one of {', '.join(TASKS)}, all")
    from vistok.bench.compare import case_of
    from vistok.world import sample

    cases = [case_of(p, p.questions[0]) for p in sample(world, n, seed=seed, split="test", questions=1)]
    return cases, [case.truth.answer if case.truth else None for case in cases]


def _read(folder: Path) -> tuple[list[Case], list[str | None]]:
    """The questions of a folder."""
    from vistok.bench.folder import read_folder

    try:
        cases = read_folder(folder)
    except Unusable as error:
        raise UserError("--data", error.got, error.right) from error
    return cases, [case.truth.answer if case.truth else None for case in cases]


def check_setting_path(out: Path) -> None:
    """Raises UserError where a setting for ``vistok.apply`` cannot be written to ``out``."""
    if out.suffix != ".json":
        raise UserError("--out", out, "must end in .json: vistok.apply knows a setting by that")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError("--out", out, "must be a file in a folder that exists")
