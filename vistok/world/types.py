"""What the world is made of: things, questions, pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Mask = NDArray[np.bool_]
Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Thing:
    """One thing that a picture shows.

    kind: "object" (scenes), "word" (words), "bar", "line", "tick" (charts), "field" (forms).
    attributes: what is true of it, for example ``{"shape": "star", "colour": "red", "size": "small"}``,
        ``{"text": "KITE", "colour": "white"}``, ``{"colour": "red", "value": 41.3, "tick": 40}``. Things with rendered
        text carry ``"cells"``: a tuple of ``(character, (x0, y0, x1, y1))`` in pixels.
    box: (x0, y0, x1, y1) in pixels, the bounds of ``mask`` (x1, y1 exclusive).
    mask: (H, W) bool, the *visible* pixels (for text: the ink), read-only.
    depth: 0 is nearest to the viewer; a thing hides those of greater depth where they overlap.
    """

    kind: str
    attributes: Mapping[str, Any]
    box: Box
    mask: Mask
    depth: int = 0


@dataclass(frozen=True, eq=False)
class Question:
    """One question with its exact answer.

    evidence: (H, W) bool, read-only: the pixels that answer it. For an answer "no" and for a count of zero it is the
    whole picture (nothing less shows an absence); for a "yes" all things that match; for a positive count all counted
    things; for a comparison the things compared; for a chart value the bar or line and the labels of the value axis;
    for a form the whole row, key and value.
    choices: the possible answers where they are few and known, else empty.
    also: other answers that count as right; no question of the world has any.
    """

    family: str
    text: str
    answer: str
    evidence: Mask
    choices: tuple[str, ...] = ()
    also: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture and the whole truth about it. image: (H, W, 3) uint8 RGB; caption: dense, in reading order."""

    image: NDArray[np.uint8]
    questions: tuple[Question, ...]
    things: tuple[Thing, ...]
    caption: str
    task: str
    seed: int

    @property
    def size(self) -> int:
        """Side of the square picture in pixels."""
        return int(self.image.shape[0])

    def pil(self) -> Image.Image:
        """The picture as an RGB ``PIL.Image``."""
        return Image.fromarray(self.image)


Drawn = tuple[NDArray[np.uint8], tuple[Question, ...], tuple[Thing, ...], str]
"""What the maker of a task returns: image, questions, things, caption."""
