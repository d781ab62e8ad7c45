"""``vistok world sample``: pictures of the world as files, with their questions, answers and evidence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vistok.cli.console import Json, Seed, UserError, console, show_rows
from vistok.cli.options import check_folder
from vistok.world import LARGEST, SMALLEST, TASKS, write_samples

SHOWN = 8


def sample(
    out: Annotated[Path, typer.Option("--out", help="Folder for the PNGs and pictures.jsonl.")],
    task: Annotated[str, typer.Option("--task", help=f"{', '.join(TASKS)}, or all in turn.")] = "all",
    n: Annotated[int, typer.Option("--n", min=1, max=1_000_000, help="How many pictures.")] = 8,
    size: Annotated[int, typer.Option("--size", help=f"Side in pixels, {SMALLEST} to {LARGEST}.")] = 112,
    as_json: Json = False,
    seed: Seed = 0,
) -> None:
    """Write pictures of the world with their questions, answers and the pixels that answer them."""
    if task not in (*TASKS, "all"):
        raise UserError("--task", task, f"must be one of {', '.join(TASKS)}, all")
    if not SMALLEST <= size <= LARGEST:
        raise UserError("--size", size, f"must be from {SMALLEST} to {LARGEST}")
    if seed >= 2**31:
        raise UserError("--seed", seed, "must be below 2147483648")
    path = write_samples(check_folder(out), task, n, seed, size)
    with path.open(encoding="utf-8") as lines:
        rows = [_row(json.loads(line)) for line, _ in zip(lines, range(n if as_json else SHOWN), strict=False)]
    show_rows(rows, ["image", "task", "question", "answer"], as_json=as_json)
    more = f" The first {SHOWN} are listed." if n > SHOWN and not as_json else ""
    console().print(f"{n} pictures in {out}, all about them in {path}.{more}", markup=False, soft_wrap=True)


def _row(picture: dict[str, Any]) -> dict[str, Any]:
    """A picture's line without its masks, and its first question beside it."""
    asked = [{key: question[key] for key in ("family", "text", "answer")} for question in picture["questions"]]
    first = asked[0] if asked else {"text": "", "answer": ""}
    return {
        **{key: picture[key] for key in ("image", "task", "seed", "size", "caption")},
        "question": first["text"],
        "answer": first["answer"],
        "questions": asked,
    }
