"""Protocols: what pictures of the world, or the user's own cases, are made to ask.

Each takes pictures of the world (all their questions) or cases, and returns what is asked: cases for ``single``,
``detail``, ``long_answer`` and ``robustness``, which ``answer_all`` takes; ``Turns`` for ``multi_turn``, which
``answer_second`` asks; ``Several`` for ``two_pictures``, which ``ask_several`` asks. Nothing here draws lots but the
noise, and that by its seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image

from vistok.host import apply
from vistok.world import Picture, Question, dialogue
from vistok.zoo.asking import ask_again
from vistok.zoo.tokenizer import CAPTION_PROMPT

from .corruptions import Corruption, boxed_mask, corrupt
from .measure import Case, cases_of, is_dense

if TYPE_CHECKING:
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

Given = Sequence[Picture | Case]
Turn = Literal["reuse-first", "reselect", "keep-all"]
TURNS: tuple[Turn, ...] = ("reuse-first", "reselect", "keep-all")

READING = ("reading", "key-value")
"""Families of questions whose answer is written in the picture."""
DETAIL_SHARE = 0.02
"""Of the picture: evidence that covers no more is a detail."""
WHICH = ("the first picture : ", "the second picture : ")
"""What comes before a question about one of two pictures."""


@dataclass(frozen=True)
class Turns:
    """Two questions about one picture; the first with the answer that stands in the dialogue."""

    picture: Image.Image
    first: str
    answer: str
    second: Case


@dataclass(frozen=True)
class Several:
    """One question in a prompt of two pictures. ``truth.evidence`` lies in picture ``about``."""

    pictures: tuple[Image.Image, Image.Image]
    question: str
    about: int
    truth: Question | None = None
    name: str = ""


def single(given: Given) -> list[Case]:
    """One question after another, each with the picture before it. A picture of the world asks all its questions."""
    cases: list[Case] = []
    for one in given:
        cases += [one] if isinstance(one, Case) else cases_of([one])
    return cases


def multi_turn(given: Given) -> list[Turns]:
    """Dialogues of two turns.

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
            picture = one.pil()
            made.append(Turns(picture, first.text, first.answer, Case(picture, second.text, second, one.task)))
    for cases in mine.values():
        for before, after in zip(cases[::2], cases[1::2], strict=False):
            if before.truth is None:
                raise ValueError(
                    f"given: the answer to {before.question!r} is not known, must be, to stand in a dialogue"
                )
            made.append(Turns(before.picture, before.question, before.truth.answer, after))
    return made


def answer_second(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    method: Any,
    keep: float | int,
    dialogues: Sequence[Turns],
    turn: Turn = "reuse-first",
    *,
    batch_size: int = 32,
    max_new_tokens: int = 16,
) -> list[str]:
    """Greedy answers to the second questions.

    ``turn``: "reuse-first" answers with the tokens that ``method`` chose for the first question, "reselect" has it
    choose anew, "keep-all" is the dense model, whatever the method.
    """
    if turn not in TURNS:
        raise ValueError(f"turn: got {turn!r}, must be one of {', '.join(TURNS)}")
    whole = turn == "keep-all" or is_dense(method)
    with nullcontext() if whole else apply(model, method, keep=keep, reselect=turn == "reselect"):
        return ask_again(
            model,
            processor,
            [one.picture for one in dialogues],
            [(one.first, one.answer, one.second.question) for one in dialogues],
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
        )


def detail(given: Given, share: float = DETAIL_SHARE) -> list[Case]:
    """The cases that hang on little: reading (families ``READING``), or evidence in at most ``share`` of the pixels.

    An absence, whose evidence is the whole picture, is none; neither is a case whose truth is not known.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: got {share}, must be in (0, 1]")
    return [
        case
        for case in single(given)
        if case.truth is not None and (case.truth.family in READING or case.truth.evidence.mean() <= share)
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


def two_pictures(given: Given) -> list[Several]:
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
        about = number % 2
        pictures = (other, case.picture) if about else (case.picture, other)
        made.append(Several(pictures, WHICH[about] + case.question, about, case.truth, case.name))
    return made


def encode_several(
    processor: ProcessorMixin, pictures: Sequence[Sequence[Image.Image]], questions: Sequence[str]
) -> BatchFeature:
    """Model inputs of one batch, any number of pictures a row, all before the question; padded on the left."""
    processor.tokenizer.padding_side = "left"
    texts = []
    for shown, question in zip(pictures, questions, strict=True):
        content = [*({"type": "image"} for _ in shown), {"type": "text", "text": question}]
        texts.append(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
    return processor(
        images=[list(shown) for shown in pictures],
        text=texts,
        padding=True,
        return_tensors="pt",
        add_special_tokens=False,  # the template writes the first token itself
    )


@torch.inference_mode()
def ask_several(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pictures: Sequence[Sequence[Image.Image]],
    questions: Sequence[str],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 16,
) -> list[str]:
    """Greedy answers as of ``ask``, with several pictures in each prompt."""
    answers: list[str] = []
    for start in range(0, len(questions), batch_size):
        rows = slice(start, start + batch_size)
        inputs = encode_several(processor, pictures[rows], questions[rows]).to(model.device)
        made = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = made[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return answers


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
