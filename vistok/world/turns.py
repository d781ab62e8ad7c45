"""Two-turn dialogues: two questions about different regions of one picture."""

from __future__ import annotations

from .types import Picture, Question


def dialogue(picture: Picture) -> tuple[Question, Question]:
    """Two of the picture's questions whose evidence overlaps least, in the order in which they were asked.

    Least: the smallest intersection over union; the earliest pair among equals. In scenes of two or more objects it is
    as a rule zero; where the picture shows one thing only, both turns may be about it.
    Raises ValueError where the picture has fewer than two questions.
    """
    asked = picture.questions
    if len(asked) < 2:
        raise ValueError(f"picture: it has {len(asked)} questions; a dialogue needs at least 2")
    pairs = ((first, second) for i, first in enumerate(asked) for second in asked[i + 1 :])
    return min(pairs, key=_overlap)


def _overlap(pair: tuple[Question, Question]) -> float:
    first, second = pair
    return float((first.evidence & second.evidence).sum() / max(1, (first.evidence | second.evidence).sum()))
