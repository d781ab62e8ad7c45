"""Letters: glyph bitmaps in several styles, from the font that Pillow carries and a 5 x 7 one: no system fonts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .draw import Canvas, Colour, Floats, bounds
from .types import Box, Mask
from .vocabulary import CHARACTERS

STYLES = ("regular", "bold", "slanted", "narrow", "pixel")
# Our own 5 x 7 font: seven rows a character in the order of CHARACTERS, one bit a pixel, the leftmost highest.
PIXEL_FONT = bytes.fromhex(
    "0e11111f111111 1e11111e11111e 0e11101010110e 1c12111111121c 1f10101e10101f 1f10101e101010 0e11101713110f"
    "1111111f111111 0e04040404040e 0702020202120c 11121418141211 1010101010101f 111b1515111111 11111915131111"
    "0e11111111110e 1e11111e101010 0e11111115120d 1e11111e141211 0f10100e01011e 1f040404040404 1111111111110e"
    "111111110a0a04 11111115151b11 11110a040a1111 11110a04040404 1f01020408101f"
    "0e11131519110e 040c040404040e 0e11010204081f 1f02040201110e 02060a121f0202 1f101e0101110e 0608101e11110e"
    "1f010204080808 0e11110e11110e 0e11110f01020c"
)
_EM = 96  # glyphs are drawn once this large, then shrunk


@lru_cache(maxsize=1)
def _outline_font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_EM)


@lru_cache(maxsize=512)
def _master(style: str, character: str) -> NDArray[np.uint8]:
    """(h, w) uint8: the glyph drawn large, cut left and right to its ink, top and bottom to the capital height."""
    if style == "pixel":
        rows = PIXEL_FONT[CHARACTERS.index(character) * 7 :][:7]
        cut = np.array([[row >> bit & 1 for bit in (4, 3, 2, 1, 0)] for row in rows], np.uint8) * np.uint8(255)
        columns = np.flatnonzero(cut.any(0))
        return np.kron(cut[:, columns[0] : columns[-1] + 1], np.ones((12, 12), np.uint8))
    font = _outline_font()
    image = Image.new("L", (3 * _EM, 2 * _EM))
    draw = ImageDraw.Draw(image)
    draw.text(
        (_EM, _EM + _EM // 2), character, fill=255, font=font, anchor="ls", stroke_width=4 if style == "bold" else 0
    )
    if style == "slanted":
        # x of the source = x + 0.22 (y - baseline): the top leans to the right.
        image = image.transform(image.size, Image.Transform.AFFINE, (1, 0.22, -0.22 * 1.5 * _EM, 0, 1, 0))
    glyph = np.asarray(image)
    top, bottom = _capital_rows(style)
    cut = glyph[top:bottom]
    columns = np.flatnonzero((cut > 100).any(0))
    return np.ascontiguousarray(cut[:, columns[0] : columns[-1] + 1])


@lru_cache(maxsize=8)
def _capital_rows(style: str) -> tuple[int, int]:
    image = Image.new("L", (3 * _EM, 2 * _EM))
    ImageDraw.Draw(image).text(
        (_EM, _EM + _EM // 2),
        "O",
        fill=255,
        font=_outline_font(),
        anchor="ls",
        stroke_width=4 if style == "bold" else 0,
    )
    rows = np.flatnonzero((np.asarray(image) > 100).any(1))
    return int(rows[0]), int(rows[-1]) + 1


@lru_cache(maxsize=16384)
def glyph(style: str, character: str, height: int, squeeze: int = 100) -> Floats:
    """(height, w) float32 coverage of one character; ``squeeze`` is its width in percent of the natural one."""
    master = _master(style, character)
    share = height / master.shape[0] * squeeze / 100 * (0.82 if style == "narrow" else 1.0)
    width = max(1, round(master.shape[1] * share))
    small = Image.fromarray(master).resize((width, height), Image.Resampling.BOX)
    # A little gain keeps thin strokes legible when the letters are small.
    return np.clip(np.asarray(small, np.float32) * np.float32(1.25 / 255), 0, 1)


@dataclass(frozen=True, eq=False)
class Ink:
    """A line of text on the canvas: its ink mask, its box and the cell of each character (pixels)."""

    mask: Mask
    box: Box
    cells: tuple[tuple[str, Box], ...]


def gap(height: int) -> int:
    """Pixels between two characters of that height."""
    return max(1, round(height * 0.16))


def width_of(text: str, style: str, height: int, squeeze: int = 100) -> int:
    """Width of a line in pixels."""
    return sum(glyph(style, c, height, squeeze).shape[1] for c in text) + gap(height) * (len(text) - 1)


def fit(text: str, style: str, height: int, room: float) -> int:
    """The largest squeeze of 100, 90, 80, 70, 60 percent at which the text is at most ``room`` pixels wide."""
    for squeeze in (100, 90, 80, 70):
        if width_of(text, style, height, squeeze) <= room:
            return squeeze
    return 60


def write(
    canvas: Canvas, text: str, top: int, left: int, height: int, colour: Colour, style: str, squeeze: int = 100
) -> Ink:
    """Writes a line of upper-case letters and digits with its top left corner at (top, left)."""
    space = gap(height)
    plane = np.zeros((height, width_of(text, style, height, squeeze)), np.float32)
    cells = []
    x = 0
    for character in text:
        bitmap = glyph(style, character, height, squeeze)
        end = x + bitmap.shape[1]
        plane[:, x:end] = bitmap
        cells.append((character, (left + x - space / 2, float(top), left + end + space / 2, float(top + height))))
        x = end + space
    mask = canvas.paint(plane, top, left, colour)
    mask.setflags(write=False)
    return Ink(mask, bounds(mask), tuple(cells))
