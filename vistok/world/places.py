"""Places seen again: one scene from several points of view, and which views are of the same scene.

A place is a piece of a photograph or a texture with landmarks on it. A view is a window on it, moved and nearer or
farther, under another light, with a passing thing or two in front that belong to no place.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .draw import Canvas, Dice, ground, shape_alpha
from .objects import contrasting, fragment
from .real import crop, digit_alpha, digit_grey, is_test
from .sampling import _whole_number, check_size
from .types import Picture
from .vocabulary import SHAPES

_PLACE, _VIEW = 111, 112  # streams of Dice
_WHOLE = 1.75  # side of a place, in sides of the picture
_WINDOW = 0.72  # side of a view in sides of the place, before it is changed
_SHIFT, _SCALE, _LIGHT = 0.13, 0.20, 0.35  # most change of a view at change = 1


@lru_cache(maxsize=64)
def _place(seed: int, size: int) -> NDArray[np.uint8]:
    """The whole place, (W, W, 3) uint8, read-only."""
    dice, test, whole = Dice(seed, _PLACE), is_test(seed), round(_WHOLE * size)
    if dice.chance(0.75):
        base = crop(dice, whole, test, least=0.5).astype(np.float32)
        canvas = Canvas((base * np.float32(0.7) + np.float32(dice.uniform(10, 60))).astype(np.uint8))
    else:
        canvas = Canvas(ground(dice, whole, 60, 190, strength=40.0))
    for _ in range(dice.between(4, 8)):
        if dice.chance(0.5):
            alpha = shape_alpha(dice.pick(SHAPES), round(dice.uniform(0.05, 0.11) * whole), dice.between(-3, 3))
        else:
            alpha = digit_alpha(digit_grey(dice, dice.below(10), test), round(dice.uniform(0.12, 0.26) * whole), 0.0)
        side = alpha.shape[0]
        top, left = dice.between(0, whole - side), dice.between(0, whole - side)
        behind = canvas.image[top : top + side, left : left + side]
        canvas.paint(alpha, top, left, contrasting(dice, behind, alpha >= 0.5))
    canvas.image.setflags(write=False)
    return canvas.image


def make_view(place: int, view: int, size: int = 96, change: float = 1.0) -> Picture:
    """View number ``view`` of the place with the 64-bit seed ``place``. No questions, no things; ``seed`` is the place.

    place: 0 .. 2**64 - 1; from 2**63 on ("test" of ``derive_seed``) with other photographs and digits than below.
    view: 0 .. 2**32 - 1; each differs in shift, scale, light and what passes by. change: how far views differ, 0 (only
    what passes by) to 1 (shifts of up to 13% of the place's side either way, scale by up to 1.2, light by up to 1.35).
    size: side in pixels, 64 .. 672. The same arguments give the same bytes with the pinned Pillow.
    Raises ValueError, naming the argument, and ModuleNotFoundError or FileNotFoundError where scikit-image or
    scikit-learn is absent.
    """
    place = _whole_number("place", place, 0, 2**64 - 1)
    view = _whole_number("view", view, 0, 2**32 - 1)
    size = check_size(size)
    if not 0 <= change <= 1:
        raise ValueError(f"change: got {change!r}; must be a number from 0 to 1")
    whole = _place(place, size)
    dice, side = Dice(place, _VIEW, view), float(whole.shape[0])
    window = side * _WINDOW * (1 + change * _SCALE) ** dice.uniform(-1, 1)
    left, top = (
        min(side - window, max(0.0, (side - window) / 2 + change * _SHIFT * side * dice.uniform(-1, 1)))
        for _ in range(2)
    )
    box = (left, top, left + window, top + window)
    canvas = Canvas(np.array(Image.fromarray(whole).resize((size, size), Image.Resampling.BILINEAR, box=box)))
    for _ in range(dice.between(0, 2)):
        fragment(dice, canvas, is_test(place))
    light = (1 + change * _LIGHT) ** dice.uniform(-1, 1)
    tint = np.array([light * (1 + change * dice.uniform(-0.08, 0.08)) for _ in range(3)], np.float32)
    image = canvas.image * tint + np.float32(change * dice.uniform(-15, 15))
    image += (dice.noise(size, size).astype(np.float32) * np.float32(dice.uniform(0, 8) / 128))[:, :, None]
    return Picture(np.clip(image, 0, 255).astype(np.uint8), (), (), "", "places", place)
