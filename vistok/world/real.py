"""Real material that pictures are composed of, parted for training and for test: photograph crops, handwritten digits.

What a test picture shows of it no training picture does: other photographs, and digits by other writers.
"""

from __future__ import annotations

import gzip
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .draw import Dice, Floats
from .photographs import _DIGITS, _PHOTOGRAPHS, _file

TEST_PHOTOGRAPHS = ("cat", "motorcycle", "retina", "temple")
TRAIN_DIGITS = 1400  # the file goes by writer: those after this row are by others
_SHORT = 256  # pixels of a photograph's shorter side, at most


def is_test(seed: int) -> bool:
    """Whether a 64-bit seed belongs to the "test" streams of ``derive_seed``."""
    return seed >> 63 == 1


@cache
def photographs(test: bool) -> tuple[Image.Image, ...]:
    """The photographs of one part, RGB, their shorter side 256 pixels at most.

    Raises ModuleNotFoundError or FileNotFoundError where scikit-image or scikit-learn is absent.
    """
    found = []
    for name, source in _PHOTOGRAPHS.items():
        if (name in TEST_PHOTOGRAPHS) == test:
            with Image.open(_file(*source)) as image:
                share = min(1.0, _SHORT / min(image.size))
                size = (round(image.width * share), round(image.height * share))
                found.append(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))
    return tuple(found)


def crop(dice: Dice, size: int, test: bool, *, least: float = 0.3) -> NDArray[np.uint8]:
    """(size, size, 3) uint8: a square of a photograph, at least ``least`` of its shorter side, perhaps mirrored."""
    image = dice.pick(photographs(test))
    side = dice.uniform(least, 1.0) * min(image.size)
    left, top = dice.uniform(0, image.width - side), dice.uniform(0, image.height - side)
    cut = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    pixels = np.array(cut)
    return np.ascontiguousarray(pixels[:, ::-1]) if dice.chance(0.5) else pixels


@cache
def digits(test: bool) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(N, 8, 8) grey pictures of handwritten digits, white on black, and which digits they are, (N,); of one part."""
    with gzip.open(_file(*_DIGITS), "rt") as lines:
        table = np.loadtxt(lines, delimiter=",")
    part = table[TRAIN_DIGITS:] if test else table[:TRAIN_DIGITS]
    grey = np.clip(part[:, :64] * (255 / 16), 0, 255).astype(np.uint8).reshape(-1, 8, 8)
    label = part[:, 64].astype(np.int64)
    for array in (grey, label):
        array.setflags(write=False)
    return grey, label


@cache
def _digits(test: bool) -> tuple[tuple[Image.Image, ...], ...]:
    """By digit: 8 x 8 grey pictures of one part, each in an empty margin of one pixel."""
    grey, label = digits(test)
    grey = np.pad(grey, ((0, 0), (1, 1), (1, 1)))
    return tuple(tuple(Image.fromarray(one) for one in grey[label == digit]) for digit in range(10))


def digit_grey(dice: Dice, digit: int, test: bool) -> Image.Image:
    """A handwritten ``digit``: (10, 10) grey, white on black."""
    return dice.pick(_digits(test)[digit])


def digit_alpha(grey: Image.Image, side: int, degrees: float) -> Floats:
    """Coverage (side, side) float32 in 0 .. 1 of a grey digit enlarged to ``side`` pixels, its edges made sharp."""
    drawn = grey.resize((side, side), Image.Resampling.BICUBIC).rotate(degrees, Image.Resampling.BILINEAR)
    value = np.asarray(drawn, np.float32) / np.float32(255)
    return np.clip((value - np.float32(0.55)) * np.float32(side / 8) + np.float32(0.5), 0, 1).astype(np.float32)
