"""Protocols: what pictures of the world, or the user's own cases, are made to ask.

Each takes pictures of the world (all their questions) or cases, and returns the cases that ``answer_all`` takes.
Nothing here draws lots but the noise, and that by its seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256

import numpy as np
from PIL import Image

from vistok.world import Picture, Question, dialogue
from vistok.zoo.tokenizer import CAPTION_PROMPT

from .corruptions import Corruption, boxed_mask, corrupt
from .measure import Case, cases_of

Given = Sequence[Picture | Case]

READING = ("reading", "key-value")
"""Families of questions whose answer is written in the picture."""
DETAIL_SHARE = 0.02
"""Of the picture: evidence that covers no more is a detail."""
WHICH = ("the first picture : ", "the second picture : ")
"""What comes before a question about one of two pictures."""


def single(given: Given) -> list[Case]:
    """One question after another, each with the picture before it. A picture of the world asks all its questions."""
    cases: list[Case] = []
    for one in given:
        cases += [one] if isinstance(one, Case) else cases_of([one])
    return cases


def multi_turn(given: Given) -> list[Case]:
    """Dialogues of two turns: cases with a first one, whose answer stands in the dialogue.

    A picture of the world asks the two of its questions whose evidence overlaps least, none where it has but one. The
    user's cases are taken two by two, in their order, of those with the same picture.
    ValueError where the answer to a first question is not known.
    """
    made = []
    mine: dict[bytes, list[Case]] = {}
    for one in given:
        if isinstance(one, Case):
            mine.setdefault(_print_of(one.picture), []).append(one)
        elif len(one.questions) > 1:
            first, second = dialogue(one)
            made.append(Case(one.pil(), second.text, second, one.task, first=(first.text, first.answer)))
    for cases in mine.values():
        for before, after in zip(cases[::2], cases[1::2], strict=False):
            if before.truth is None:
                raise ValueError(
                    f"given: the answer to {before.question!r} is not known, must be, to stand in a dialogue"
                )
            made.append(replace(after, first=(before.question, before.truth.answer)))
    return made


def detail(given: Given, share: float = DETAIL_SHARE) -> list[Case]:
    """The cases that hang on little: reading (families ``READING``), or evidence in at most ``share`` of the pixels.

    An absence, whose evidence is the whole picture, is none; neither is a case whose evidence is not known.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: got {share}, must be in (0, 1]")
    return [
        case
        for case in single(given)
        if case.truth is not None and (case.truth.family in READING or 0 < case.truth.evidence.mean() <= share)
    ]


def long_answer(given: Given, question: str = CAPTION_PROMPT) -> list[Case]:
    """Questions for a long text: of a picture of the world its dense caption, family "caption", with all things as
    evidence; the user's cases where the right text is known. Score the answers by ``chrf`` and ``exact_match``, and
    let them be long (``max_new_tokens``)."""
    cases = []
    for one in given:
        if isinstance(one, Case):
            cases += [one] if one.truth is not None else []
            continue
        shown = np.zeros(one.image.shape[:2], dtype=bool)
        for thing in one.things:
            shown |= thing.mask
        cases.append(Case(one.pil(), question, Question("caption", question, one.caption, shown), one.task))
    return cases


def two_pictures(given: Given) -> list[Case]:
    """Every case with a second picture beside its own: the next one in order that is another, the first after the last.

    The question says which picture it is about (``WHICH``): the first and the second in turn.
    ValueError where all pictures are the same.
    """
    cases = single(given)
    prints = [_print_of(case.picture) for case in cases]
    made = []
    for number, case in enumerate(cases):
        after = [*range(number + 1, len(cases)), *range(number)]
        other = next((cases[i].picture for i in after if prints[i] != prints[number]), None)
        if other is None:
            raise ValueError("given: got one picture, must be at least two different ones")
        place = number % 2
        made.append(replace(case, question=WHICH[place] + case.question, beside=other, place=place))
    return made


def robustness(given: Given, kind: Corruption, severity: int, seed: int = 0) -> list[Case]:
    """The same questions on worse pictures, see ``corrupt``; the evidence moves with the pixels.

    The noise of a picture depends on ``seed`` and on its pixels, not on its place among the others.
    """
    cases = []
    done: dict[bytes, Image.Image] = {}
    for case in single(given):
        key = _print_of(case.picture)
        if key not in done:
            done[key] = corrupt(case.picture, kind, severity, seed=[seed, *key[:8]])
        truth = case.truth
        if truth is not None and kind == "letterbox":
            truth = replace(truth, evidence=boxed_mask(truth.evidence, severity))
        cases.append(replace(case, picture=done[key], truth=truth))
    return cases


def _print_of(picture: Image.Image) -> bytes:
    """What tells a picture from another: its size and pixels."""
    return sha256(f"{picture.size} {picture.mode}".encode() + picture.tobytes()).digest()
