"""Dense truth a pixel: which class of thing each pixel shows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .types import Picture
from .vocabulary import SHAPES

MAP_CLASSES = ("ground", *SHAPES)
"""What the numbers of ``class_map`` stand for."""


def class_map(picture: Picture) -> NDArray[np.uint8]:
    """(H, W) uint8: for each pixel of a scene the place in ``MAP_CLASSES`` of the visible object's shape, 0 for none.

    Raises ValueError for a picture of another task than "scenes".
    """
    if picture.task != "scenes":
        raise ValueError(f"picture: got one of {picture.task!r}; must be one of 'scenes', whose things have shapes")
    result = np.zeros(picture.image.shape[:2], np.uint8)
    for thing in picture.things:
        result[thing.mask] = MAP_CLASSES.index(thing.attributes["shape"])
    return result
