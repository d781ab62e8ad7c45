"""Pictures of the world as files: PNGs and one JSON line for each, with questions, answers and evidence."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .sampling import sample
from .types import Mask, Picture

LINES = "pictures.jsonl"


def encode_mask(mask: Mask) -> dict[str, list[int]]:
    """Run lengths of a mask in row-major order, the first run being of False: ``{"size": [H, W], "counts": [..]}``."""
    flat = np.concatenate(([False], mask.ravel()))
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate(([0], changes, [mask.size])))
    return {"size": list(mask.shape), "counts": counts.tolist()}


def decode_mask(runs: dict[str, list[int]]) -> Mask:
    """The mask of ``encode_mask``; ValueError where the runs do not add up to its size."""
    counts, (height, width) = runs["counts"], runs["size"]
    if sum(counts) != height * width:
        raise ValueError(f"runs: they add up to {sum(counts)} pixels; must be {height} x {width}")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(height, width)


def describe(picture: Picture) -> dict[str, Any]:
    """All that is known about a picture, ready for JSON; masks as runs."""
    return {
        "task": picture.task,
        "seed": picture.seed,
        "size": picture.size,
        "caption": picture.caption,
        "things": [
            {
                "kind": t.kind,
                "attributes": dict(t.attributes),
                "box": t.box,
                "depth": t.depth,
                "mask": encode_mask(t.mask),
            }
            for t in picture.things
        ],
        "questions": [
            {
                "family": q.family,
                "text": q.text,
                "answer": q.answer,
                "choices": q.choices,
                "evidence": encode_mask(q.evidence),
            }
            for q in picture.questions
        ],
    }


def _replace(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Writes under a temporary name beside the path, then renames: a file is whole or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            fill(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_samples(
    folder: str | os.PathLike[str],
    task: str,
    n: int,
    seed: int = 0,
    size: int = 112,
    *,
    split: str = "train",
    questions: int = 8,
    max_objects: int = 5,
) -> Path:
    """Writes n pictures as ``<task>-<number>.png`` and, last, one line for each in ``pictures.jsonl``; returns that.

    Arguments as in ``sample``. A line holds ``describe(picture)`` and ``"image"``, the PNG's name. Files of the same
    names are replaced, each at once; other files in the folder are left alone.
    """
    stream = sample(task, n, seed, size, split=split, questions=questions, max_objects=max_objects)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, picture in enumerate(stream):
        name = f"{picture.task}-{number:06d}.png"
        image = picture.pil()
        _replace(target / name, lambda file, image=image: image.save(file, format="PNG"))  # type: ignore[misc]
        lines.append(json.dumps({"image": name, **describe(picture)}, separators=(",", ":")) + "\n")
    _replace(target / LINES, lambda file: file.writelines(line.encode() for line in lines))
    return target / LINES
