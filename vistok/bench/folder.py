"""A folder of pictures with a JSONL of questions about them.

A folder has a file pictures.jsonl, one picture a line, as ``vistok world sample`` writes it:

    {"image": "cat.jpg", "questions": [{"text": "what is on the mat?", "answer": "cat", "box": [12, 40, 90, 130]}]}

Of a question only "text" must be there. "answers" lists several that all count as right, "family" says of what kind it
is, "box" (x0, y0, x1, y1 in pixels of the upright picture, x1 and y1 exclusive) or the world's "evidence" where the
answer is seen. A line {"image": .., "question": .., "answer": ..} asks one question. docs/data.md says more.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from vistok.world import Question, decode_mask
from vistok.world.files import LINES

from .measure import Case
from .pictures import Unusable, check_file, open_picture

if TYPE_CHECKING:
    from PIL import Image

FAMILY = "question"
"""Of a question that names none."""
FORM = '{"image": file, "questions": [{"text": ..}]}'


@dataclass(frozen=True)
class _Asked:
    """One question of a JSONL; ``where`` it stands: file, line and, of several, the number."""

    where: str
    image: str
    path: Path
    text: str
    answers: tuple[str, ...]
    family: str
    about: Mapping[str, Any]


def read_folder(folder: Path, n: int | None = None, seed: int = 0) -> list[Case]:
    """The questions of a folder with pictures.jsonl, as ``Source.cases``. Raises Unusable naming file, line and key."""
    asked = _asked(folder)[1]
    pictures: dict[Path, Image.Image] = {}
    cases = []
    for index in chosen(len(asked), n, seed):
        one = asked[index]
        if one.path not in pictures:
            try:
                pictures[one.path] = open_picture(one.path)
            except Unusable as error:
                raise Unusable(f"{one.where}, image {one.image!r}", error.right) from error
        picture = pictures[one.path]
        evidence = _evidence(one, picture.size)
        cases.append(case_of(picture, one.text, one.answers, one.family, evidence, one.image))
    return cases


def digest_folder(folder: Path) -> str:
    """20 hexadecimal digits of every byte of the JSONL and of the pictures that it names. Raises Unusable."""
    lines, asked = _asked(folder)
    digest = hashlib.sha256(lines)
    for path in dict.fromkeys(one.path for one in asked):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:20]


def _asked(folder: Path) -> tuple[bytes, list[_Asked]]:
    """The JSONL of a folder, and its questions; every picture is a file that is there."""
    path = folder / LINES
    if not path.is_file():
        raise Unusable(folder, f"must be a folder with a file {LINES}")
    lines, asked = path.read_bytes(), []
    for number, line in enumerate(lines.split(b"\n"), 1):
        where = f"{path}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            entry = json.loads(text) if text else None
        except (ValueError, RecursionError) as error:
            raise Unusable(where, f"must be {FORM} ({error})") from error
        if not text:
            continue
        if not isinstance(entry, dict):
            raise Unusable(where, f"must be {FORM}")
        if "questions" not in entry and "question" in entry:
            entry["questions"] = [{**entry, "text": text_of(entry, "question", where)}]
        if missing := [key for key in ("image", "questions") if key not in entry]:
            raise Unusable(where, f"must be {FORM}; {missing[0]} is missing")
        image, questions = text_of(entry, "image", where), entry["questions"]
        if not isinstance(questions, list) or not all(isinstance(one, dict) for one in questions):
            raise Unusable(f"{where}, questions", f"must be a list as in {FORM}")
        file = _within(folder, image, f"{where}, image {image!r}")
        for place, about in enumerate(questions, 1):
            which = f"{where}, question {place}" if len(questions) > 1 else where
            text = text_of(about, "text", which)
            answers = answers_of(_several(about, which), which)
            family = FAMILY if about.get("family") is None else text_of(about, "family", which)
            asked.append(_Asked(which, image, file, text, answers, family, about))
    if not asked:
        raise Unusable(path, "must have at least one question")
    return lines, asked


def _within(folder: Path, name: str, where: str) -> Path:
    """The file ``name`` of ``folder``, links followed; it must be there and not lie outside."""
    relative, outside = PurePath(name), "must be a file inside the folder, by a path relative to it"
    if relative.anchor or ".." in relative.parts:
        raise Unusable(where, outside)
    try:
        path = (folder / relative).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise Unusable(where, f"{outside}; it is a link to {path}")
        check_file(path)
    except Unusable as error:
        raise Unusable(where, error.right) from error
    except (OSError, ValueError, RuntimeError) as error:  # a null byte, a ring of links
        raise Unusable(where, f"cannot be read ({error})") from error
    return path


def text_of(entry: Mapping[str, Any], key: str, where: str) -> str:
    """The text that must stand under ``key``."""
    if key not in entry:
        raise Unusable(where, f"must be {FORM}; {key} is missing")
    value = entry[key]
    if not isinstance(value, str) or not value.strip():
        raise Unusable(f"{where}, {key} {brief(value)}", "must be a text that is not empty")
    return value


def _several(about: Mapping[str, Any], where: str) -> list[Any]:
    """The answer of a question, then its answers."""
    others = about.get("answers")
    if others is not None and not isinstance(others, list):
        raise Unusable(f"{where}, answers {brief(others)}", "must be a list of answers that all count as right")
    return [about.get("answer"), *(others or [])]


def _evidence(one: _Asked, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool; no pixel where nothing is said of them. ``size``: width and height of the picture."""
    width, height = size
    mask = np.zeros((height, width), dtype=bool)
    box, runs = one.about.get("box"), one.about.get("evidence")
    if box is not None:
        numbers = isinstance(box, list) and len(box) == 4 and all(type(edge) in (int, float) for edge in box)
        if not numbers or not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
            right = f"must be [x0, y0, x1, y1] in pixels, x0 < x1 and y0 < y1, within {width} x {height}"
            raise Unusable(f"{one.where}, box {brief(box)}", right)
        mask[math.floor(box[1]) : math.ceil(box[3]), math.floor(box[0]) : math.ceil(box[2])] = True
    elif runs is not None:
        try:
            # The size first: runs of another could be as long as they like.
            if runs["size"] != [height, width] or any(type(run) is not int or run < 0 for run in runs["counts"]):
                raise ValueError(f"must be of a picture of [{height}, {width}]")
            mask = decode_mask(runs)
        except (ValueError, LookupError, TypeError) as error:
            right = f"must be as vistok.world.encode_mask writes it ({error})"
            raise Unusable(f"{one.where}, evidence", right) from error
    return mask


def chosen(total: int, n: int | None, seed: int) -> list[int]:
    """Which of ``total`` questions are asked, ascending. By hashes: the same on every machine and in every version."""
    if n is not None and n < 1:
        raise ValueError(f"n: got {n}, must be 1 or more")
    drawn = sorted(range(total), key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())
    return sorted(drawn[:n])


def answers_of(given: Sequence[Any], where: str) -> tuple[str, ...]:
    """Different answers as texts; a None is none."""
    for answer in given:
        if type(answer) not in (str, int, float, type(None)) or answer == "":
            raise Unusable(f"{where}, answer {brief(answer)}", "must be a text that is not empty, or a number")
    return tuple(dict.fromkeys(str(answer) for answer in given if answer is not None))


def case_of(
    picture: Image.Image, text: str, answers: tuple[str, ...], family: str, evidence: np.ndarray, name: str
) -> Case:
    """A case; its truth is known where there is an answer."""
    truth = Question(family, text, answers[0], evidence, also=answers[1:]) if answers else None
    return Case(picture, text, truth, name)


def brief(value: Any) -> str:
    """What an error says it got."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
