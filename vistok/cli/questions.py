"""What several commands ask a model about: held-out pictures of the world, or a folder of the user's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vistok.cli.console import UserError
from vistok.cli.pictures import open_picture
from vistok.world import TASKS

if TYPE_CHECKING:
    from vistok.bench.measure import Case

LINES = "pictures.jsonl"

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
    """The questions of a folder, in the form that ``vistok world sample`` writes (only these fields are read)."""
    from vistok.bench.measure import Case

    path = folder / LINES
    if not path.is_file():
        raise UserError("--data", folder, f"must be a folder with a file {LINES}")
    cases: list[Case] = []
    answers: list[str | None] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        right = '{"image": file, "questions": [{"text": ..}]}'
        try:
            entry = json.loads(line)
            asked = [(str(q["text"]), q.get("answer")) for q in entry["questions"]]
            image = open_picture(str(folder / entry["image"]), "--data")
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError("--data", f"{path}, line {number}", f"must be {right}") from error
        cases += [Case(image, text, name=entry["image"]) for text, _ in asked]
        answers += [None if answer is None else str(answer) for _, answer in asked]
    if not cases:
        raise UserError("--data", path, "must have at least one question")
    return cases, answers


def check_setting_path(out: Path) -> None:
    """Raises UserError where a setting for ``vistok.apply`` cannot be written to ``out``."""
    if out.suffix != ".json":
        raise UserError("--out", out, "must end in .json: vistok.apply knows a setting by that")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError("--out", out, "must be a file in a folder that exists")
