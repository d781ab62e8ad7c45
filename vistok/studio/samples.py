"""Pictures that the studio offers, each with a name that a link can hold: ``world:scenes:28`` or ``photo:coffee``."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from vistok.bench.compare import sample_cases
from vistok.bench.measure import Case
from vistok.bench.pictures import Unusable, world_picture
from vistok.world import photos

if TYPE_CHECKING:
    from PIL import Image

    from vistok.world import Question

OWN = ""
"""The name of a picture that somebody brought along: no link can hold it."""


@cache
def samples() -> dict[str, Case]:
    """The sample of ``vistok compare``, each picture with a question, by name."""
    return {case.name if ":" in case.name else f"photo:{case.name}": case for case in sample_cases()}


def picture(name: str) -> tuple[Image.Image, tuple[Question, ...]]:
    """The picture called ``name`` and the questions whose answer is known. Raises Unusable for any other name."""
    drawn = world_picture(name)
    if drawn is not None:
        return drawn.pil(), drawn.questions
    kind, _, called = name.partition(":")
    found = _photographs().get(called) if kind == "photo" else None
    if found is None:
        names = ", ".join(name for name in samples() if name.startswith("photo:"))
        raise Unusable(name or "nothing", f"must be world:TASK:NUMBER or one of {names or 'no photographs here'}")
    return found, ()


def case(name: str, image: Image.Image | None, question: str) -> Case:
    """What is asked: of the picture ``name``, or of ``image`` where it is somebody's own; with the truth where the
    question is one of the picture's own. Raises Unusable."""
    if name == OWN and image is None:
        raise Unusable("picture", "choose a sample, draw a scene, or drop a picture of your own")
    shown, known = (image, ()) if name == OWN and image is not None else picture(name)
    asked = " ".join(question.split())
    if not asked:
        raise Unusable("question", "ask something about the picture")
    truth = next((one for one in known if one.text.casefold() == asked.casefold()), None)
    return Case(shown, truth.text if truth else asked, truth, name or "your picture")


@cache
def _photographs() -> dict[str, Image.Image]:
    """Those of the sample's size, by name; {} where the package that has them is absent."""
    try:
        return {photo.name: photo.pil() for photo in photos(224)}
    except (ModuleNotFoundError, FileNotFoundError):
        return {}
