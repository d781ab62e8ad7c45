"""One object over clutter: what a classifier looks for, and exactly where it is.

A handwritten digit or a drawn shape covers 10 to 30% of the picture, whole and in front of everything. Behind it is a
photograph or a texture, and fragments that belong to no class: pieces cut out of objects, strokes, scraps of other
photographs. What a method for vision transformers keeps can be held against the object's mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray

from .draw import Canvas, Colour, Dice, Floats, bounds, ground, shape_alpha
from .real import crop, digit_alpha, digit_grey, is_test
from .sampling import _whole_number, check_size, derive_seed
from .types import Picture, Thing
from .vocabulary import SHAPES

OBJECTS = (*"0123456789", *SHAPES)
"""The classes, in the order of their labels."""
COVERAGE = (0.10, 0.30)
"""Least and largest share of the picture that an object covers."""
_STREAM = 101  # of Dice: the tasks of `make` have 0 .. 7
_WIDEST = 0.94  # of the picture's side
_CONTRAST = (58, 120)  # grey levels between an object and what is behind it


@cache
def _shape_share(shape: str) -> float:
    """Pixels of a shape over its radius squared."""
    return float((shape_alpha(shape, 40, 0) >= 0.5).sum()) / 40**2


def _alpha(dice: Dice, label: int, size: int, test: bool) -> Floats:
    """Coverage of an object of class ``label``, fitted to a drawn share of the picture inside ``COVERAGE``."""
    low, high = (round(share * size * size) for share in COVERAGE)
    pixels = dice.uniform(COVERAGE[0] + 0.01, COVERAGE[1] - 0.01) * size * size
    turn = dice.between(-3, 3)
    if label >= 10:
        shape = OBJECTS[label]
        radius = min(round((pixels / _shape_share(shape)) ** 0.5), int(_WIDEST * size) // 2 - 1)
        while True:
            alpha = shape_alpha(shape, radius, turn)
            covered = int((alpha >= 0.5).sum())
            if low <= covered <= high:
                return alpha
            radius += 1 if covered < low else -1
    widest = int(_WIDEST * size)
    while True:  # one writer's 1 may be too thin to cover a tenth at any size: then another's
        grey = digit_grey(dice, label, test)
        side = widest // 2
        for _ in range(6):
            alpha = digit_alpha(grey, side, 4.0 * turn)
            covered = int((alpha >= 0.5).sum())
            if low <= covered <= high and abs(covered / pixels - 1) < 0.1:
                return alpha
            wanted = min(widest, round(side * (pixels / max(covered, 1)) ** 0.5))
            if wanted == side:
                break
            side = wanted
        if low <= covered <= high:
            return alpha


def contrasting(dice: Dice, behind: NDArray[np.uint8], where: NDArray[np.bool_]) -> Colour:
    """A colour whose mean is well apart from that of ``behind`` (H, W, 3) at ``where`` (H, W)."""
    level = float(behind[where].mean()) if where.any() else 128.0
    apart = dice.uniform(*_CONTRAST)
    up = level + apart <= 245 and (level - apart < 10 or dice.chance(0.5))
    wanted = level + apart if up else level - apart
    spread = [dice.uniform(-70, 70) for _ in range(3)]
    middle = sum(spread) / 3
    red, green, blue = (min(255, max(0, round(wanted + s - middle))) for s in spread)
    return red, green, blue


def fragment(dice: Dice, canvas: Canvas, test: bool) -> None:
    """Paints one thing of no class: a piece of an object, a stroke, or a scrap of a photograph."""
    size = canvas.size
    kind = dice.below(3)
    side = round(dice.uniform(0.10, 0.24) * size)
    top, left = dice.between(-side // 3, size - 2 * side // 3), dice.between(-side // 3, size - 2 * side // 3)
    if kind == 0:  # a window of at most a third of an object's width: no class can be read off it
        label = dice.below(len(OBJECTS))
        if label < 10:
            whole = digit_alpha(digit_grey(dice, label, test), 4 * side, 0.0)
        else:
            whole = shape_alpha(OBJECTS[label], 2 * side, 0)
        y, x = dice.below(whole.shape[0] - side), dice.below(whole.shape[1] - side)
        alpha = whole[y : y + side, x : x + side]
    elif kind == 1:
        x, y = left + side / 2, top + side / 2
        points = [(x, y)]
        for _ in range(dice.between(1, 3)):
            x, y = x + dice.uniform(-1, 1) * side, y + dice.uniform(-1, 1) * side
            points.append((x, y))
        alpha, top, left = canvas.stroke(points, dice.uniform(0.015, 0.05) * size), 0, 0
    else:
        rows, columns, inner_rows, inner_columns = canvas.clip(top, left, side, side)
        canvas.image[rows, columns] = crop(dice, side, test, least=0.1)[inner_rows, inner_columns]
        return
    rows, columns, inner_rows, inner_columns = canvas.clip(top, left, *alpha.shape)
    colour = contrasting(dice, canvas.image[rows, columns], alpha[inner_rows, inner_columns] >= 0.5)
    canvas.paint(alpha, top, left, colour)


def clutter(dice: Dice, size: int, test: bool) -> Canvas:
    """A photograph or a texture with 3 to 8 fragments on it."""
    if dice.chance(0.65):
        base = crop(dice, size, test).astype(np.float32)
        level, strength = np.float32(dice.uniform(70, 180)), np.float32(dice.uniform(0.4, 0.85))
        canvas = Canvas(np.clip((base - base.mean()) * strength + level, 0, 255).astype(np.uint8))
    else:
        canvas = Canvas(ground(dice, size, 60, 190, strength=40.0, noise=16.0))
    for _ in range(dice.between(3, 8)):
        fragment(dice, canvas, test)
    return canvas


def make_object(seed: int, size: int = 96) -> Picture:
    """A picture with one ``Thing``: kind "object", attributes ``class`` (its name in ``OBJECTS``) and ``label`` (its
    place there); its mask covers 10 to 30% of the picture. No questions; the caption is the name.

    seed: 0 .. 2**64 - 1; the label is ``seed % len(OBJECTS)``, so that the pictures of a stream go through the classes
    in turn. Seeds from 2**63 on ("test") show other photographs and other writers' digits than those below ("train").
    The same (seed, size) gives the same bytes with the pinned Pillow. size: side in pixels, 64 .. 672.
    Raises ValueError, naming the argument, and ModuleNotFoundError or FileNotFoundError where scikit-image or
    scikit-learn is absent (extra ``bench`` installs them).
    """
    seed = _whole_number("seed", seed, 0, 2**64 - 1)
    size = check_size(size)
    dice, test, label = Dice(seed, _STREAM), is_test(seed), seed % len(OBJECTS)
    canvas = clutter(dice, size, test)
    alpha = _alpha(dice, label, size, test)
    inked = np.argwhere(alpha >= 0.5)
    (y0, x0), (y1, x1) = inked.min(0), inked.max(0) + 1
    top, left = dice.between(0, size - int(y1 - y0)) - int(y0), dice.between(0, size - int(x1 - x0)) - int(x0)
    rows, columns, inner_rows, inner_columns = canvas.clip(top, left, *alpha.shape)
    colour = contrasting(dice, canvas.image[rows, columns], alpha[inner_rows, inner_columns] >= 0.5)
    mask = canvas.paint(alpha, top, left, colour)
    grain = dice.noise(size, size).astype(np.float32) * np.float32(dice.uniform(0.0, 12.0) / 128)
    image = np.clip(canvas.image.astype(np.float32) + grain[:, :, None], 0, 255).astype(np.uint8)
    mask.setflags(write=False)
    thing = Thing("object", {"class": OBJECTS[label], "label": label}, bounds(mask), mask)
    return Picture(image, (), (thing,), OBJECTS[label], "objects", seed)


def sample_objects(n: int, seed: int = 0, size: int = 96, *, split: str = "train", start: int = 0) -> Iterator[Picture]:
    """Yields n pictures of ``make_object`` with the seeds of a stream (``derive_seed``), from number ``start`` on."""
    n = _whole_number("n", n, 0, 2**32 - 1)
    check_size(size)
    derive_seed(seed, start, split)
    return (make_object(derive_seed(seed, number, split), size) for number in range(start, start + n))
