"""Dense truth for training: what each patch of a picture shows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .types import Picture
from .vocabulary import CHARACTER_LABELS, COLOUR_LABELS, SHAPE_LABELS

_SHAPE = {name: i for i, name in enumerate(SHAPE_LABELS)}
_COLOUR = {name: i for i, name in enumerate(COLOUR_LABELS)}
_CHARACTER = {name: i for i, name in enumerate(CHARACTER_LABELS)}
LAST_INDEX = 9
_SHARE = 0.3  # a shape must cover this much of a patch (a line, being thin, a third of that)


def patch_labels(picture: Picture, grid: int | tuple[int, int]) -> dict[str, NDArray[np.uint8]]:
    """Labels of the patches of a (rows, columns) grid over the picture.

    Returns {"shape", "colour", "character", "index"}, each (rows, columns) uint8: indices into ``SHAPE_LABELS``,
    ``COLOUR_LABELS``, ``CHARACTER_LABELS``, and the character's place in its text from 1 to ``LAST_INDEX``;
    0 = nothing. shape and colour are those of the object, bar or line with the most pixels in the patch; for words,
    colour is the ink of the text whose character cell holds the patch's centre. character is the one whose cell
    (glyph and half the gap on either side) holds the centre.
    Raises ValueError where the grid is finer than the pixels or not positive.
    """
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    size = picture.size
    if not (1 <= rows <= size and 1 <= columns <= size):
        raise ValueError(
            f"grid: {grid} does not fit a picture of {size} x {size} pixels; each side must be 1 .. {size}"
        )
    result = {name: np.zeros((rows, columns), np.uint8) for name in ("shape", "colour", "character", "index")}
    row_edges = np.arange(rows) * size // rows
    column_edges = np.arange(columns) * size // columns
    area = (size / rows) * (size / columns)
    best = np.zeros((rows, columns), np.float32)
    for thing in picture.things:
        kind = thing.kind
        if kind in ("object", "bar", "line"):
            pixels = np.add.reduceat(thing.mask, row_edges, axis=0, dtype=np.float32)
            pixels = np.add.reduceat(pixels, column_edges, axis=1)
            wins = (pixels > best) & (pixels >= area * (_SHARE / 3 if kind == "line" else _SHARE))
            best[wins] = pixels[wins]
            result["shape"][wins] = _SHAPE[thing.attributes["shape"] if kind == "object" else kind]
            result["colour"][wins] = _COLOUR[thing.attributes["colour"]]
        for index, (character, (x0, y0, x1, y1)) in enumerate(thing.attributes.get("cells", ()), start=1):
            # Patch i has its centre at (i + 0.5) * size / rows.
            top, bottom = np.ceil(np.array((y0, y1)) * rows / size - 0.5).astype(int)
            left, right = np.ceil(np.array((x0, x1)) * columns / size - 0.5).astype(int)
            top, left = max(top, 0), max(left, 0)
            result["character"][top:bottom, left:right] = _CHARACTER[character]
            result["index"][top:bottom, left:right] = min(index, LAST_INDEX)
            if kind == "word":
                result["colour"][top:bottom, left:right] = _COLOUR[thing.attributes["colour"]]
    return result
