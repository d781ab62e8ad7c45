"""Drawing with numpy: dice, textured grounds, anti-aliased shapes and strokes, and a canvas that knows its masks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .types import Box, Mask

T = TypeVar("T")
Floats = NDArray[np.float32]
Colour = tuple[int, int, int]


class Dice:
    """Cheap seeded draws: numbers come from a numpy Generator in blocks, since a scalar draw costs microseconds."""

    def __init__(self, *entropy: int) -> None:
        words = [part for number in entropy for part in (number & 0xFFFFFFFF, number >> 32)]
        # Noise has a generator of its own: its length depends on the picture's size, and the layout must not.
        self._numbers, self._noise = (
            np.random.Generator(np.random.PCG64(np.random.SeedSequence([*words, stream]))) for stream in (0, 1)
        )
        self._block: list[float] = []

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A float in [low, high)."""
        if not self._block:
            self._block = self._numbers.random(128).tolist()
        return low + (high - low) * self._block.pop()

    def below(self, n: int) -> int:
        """An integer in 0 .. n-1."""
        return int(self.uniform() * n)

    def between(self, low: int, high: int) -> int:
        """An integer in low .. high, both included."""
        return low + self.below(high - low + 1)

    def chance(self, share: float) -> bool:
        """True in that share of the cases."""
        return self.uniform() < share

    def pick(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """The items in random order (Fisher-Yates)."""
        result = list(items)
        for last in range(len(result) - 1, 0, -1):
            other = self.below(last + 1)
            result[last], result[other] = result[other], result[last]
        return result

    def noise(self, height: int, width: int) -> NDArray[np.int8]:
        """(height, width) int8, uniform in -128 .. 127."""
        return np.frombuffer(self._noise.bytes(height * width), np.int8).reshape(height, width)

    def tinted(self, colour: Colour, jitter: int) -> Colour:
        """The colour with each channel moved by at most ``jitter``, inside 0 .. 255."""
        red, green, blue = (min(255, max(0, c + self.between(-jitter, jitter))) for c in colour)
        return red, green, blue


@lru_cache(maxsize=8)
def _grid(size: int) -> tuple[Floats, Floats]:
    line = ((np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)).astype(np.float32)
    return line[:, None], line[None, :]


def ground(
    dice: Dice, size: int, low: int, high: int, strength: float = 22.0, noise: float = 12.0
) -> NDArray[np.uint8]:
    """A textured, muted background: (size, size, 3) uint8, mean brightness between low and high.

    Five kinds: flat, gradient, stripes, checks, blotches; each with noise of at most ``noise`` grey levels.
    """
    level = dice.between(low, high)
    base = np.array([level + dice.between(-16, 16) for _ in range(3)], np.float32)
    y, x = _grid(size)
    kind = dice.below(5)
    amplitude = dice.uniform(0.4, 1.0) * strength
    turn = dice.uniform(0.0, 2 * np.pi)
    plane: Floats
    across = np.float32(np.cos(turn)) * x + np.float32(np.sin(turn)) * y
    step = dice.uniform(4.0, 12.0)
    if kind == 0:
        plane = np.zeros((size, size), np.float32)
    elif kind == 1:
        plane = across - np.float32((np.cos(turn) + np.sin(turn)) / 2)
    elif kind == 2:
        # In double precision: the single-precision sine differs between processors in its last bit.
        plane = (np.sin(across.astype(np.float64) * (2 * np.pi * step)) * 0.7).astype(np.float32)
    elif kind == 3:
        plane = (((x * step).astype(np.int32) + (y * step).astype(np.int32)) & 1).astype(np.float32) - np.float32(0.5)
    else:
        small = Image.fromarray(dice.noise(7, 7).view(np.uint8))
        rough = np.asarray(small.resize((size, size), Image.Resampling.BICUBIC), np.float32)
        plane = rough / np.float32(128) - np.float32(1)
    plane = plane * np.float32(amplitude)
    plane += dice.noise(size, size) * np.float32(dice.uniform(0.1, 1.0) * noise / 128)
    image = plane[:, :, None] + base
    np.clip(image, 0, 255, out=image)
    return image.astype(np.uint8)


@lru_cache(maxsize=4096)
def shape_alpha(shape: str, radius: int, turn: int) -> Floats:
    """Coverage of a shape: (2r+3, 2r+3) float32 in 0 .. 1, from its signed distance; ``turn`` in steps of 4 degrees."""
    line = np.arange(-radius - 1, radius + 2, dtype=np.float32) / radius
    angle = np.deg2rad(4.0 * turn)
    x = np.cos(angle) * line[None, :] + np.sin(angle) * line[:, None]
    y = -np.sin(angle) * line[None, :] + np.cos(angle) * line[:, None]
    if shape == "circle":
        distance = np.hypot(x, y) - 0.95
    elif shape == "ring":
        distance = np.abs(np.hypot(x, y) - 0.74) - 0.24
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - 0.82
    elif shape == "diamond":
        distance = (np.abs(x) / 0.72 + np.abs(y)) * 0.58 - 0.58
    elif shape == "cross":
        far, near = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
        distance = np.maximum(far - 0.95, near - 0.3)
    elif shape == "triangle":
        distance = np.maximum(y - 0.66, (np.abs(x) * 1.75 - y) * 0.496 - 0.47)
    elif shape == "star":
        # Fold into one tenth of the star: a half-plane between an outer and an inner corner.
        phi = np.abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        r = np.hypot(x, y)
        outer, inner = np.array([1.0, 0.0]), 0.42 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
        edge = inner - outer
        normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
        distance = (r * np.cos(phi) - outer[0]) * normal[0] + r * np.sin(phi) * normal[1]
    elif shape == "heart":
        u, v = x * 1.18, -y * 1.15 + 0.12
        value = (u * u + v * v - 1) ** 3 - u * u * v**3
        distance = np.cbrt(value) * 0.4
    else:
        raise ValueError(f"shape: {shape!r} is not one of the world's shapes")
    return np.clip(0.5 - distance * radius, 0, 1).astype(np.float32)


class Canvas:
    """An RGB picture under construction. All coordinates are in pixels; what sticks out is cut."""

    def __init__(self, image: NDArray[np.uint8]) -> None:
        self.image = image
        self.size = image.shape[0]

    def clip(self, top: int, left: int, height: int, width: int) -> tuple[slice, slice, slice, slice]:
        """Slices of the picture and of a patch laid at (top, left)."""
        y0, x0 = max(top, 0), max(left, 0)
        y1, x1 = min(top + height, self.size), min(left + width, self.size)
        y1, x1 = max(y0, y1), max(x0, x1)
        return slice(y0, y1), slice(x0, x1), slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)

    def paint(self, alpha: Floats, top: int, left: int, colour: Colour) -> Mask:
        """Blends a colour in by ``alpha`` (h, w); returns the (size, size) mask of pixels with alpha >= 0.5."""
        rows, columns, inner_rows, inner_columns = self.clip(top, left, *alpha.shape)
        part = alpha[inner_rows, inner_columns]
        area = self.image[rows, columns].astype(np.float32)
        area += (np.array(colour, np.float32) - area) * part[:, :, None]
        self.image[rows, columns] = (area + np.float32(0.5)).astype(np.uint8)
        mask = np.zeros((self.size, self.size), np.bool_)
        mask[rows, columns] = part >= 0.5
        return mask

    def fill(self, top: int, left: int, bottom: int, right: int, colour: Colour) -> Mask:
        """Fills a rectangle (bottom, right exclusive); returns its mask."""
        rows, columns, _, _ = self.clip(top, left, bottom - top, right - left)
        self.image[rows, columns] = colour
        mask = np.zeros((self.size, self.size), np.bool_)
        mask[rows, columns] = True
        return mask

    def stroke(self, points: Sequence[tuple[float, float]], width: float) -> Floats:
        """Coverage (size, size) float32 of a polyline of (x, y) points with round ends; nothing is painted."""
        plane = np.zeros((self.size, self.size), np.float32)
        half = width / 2
        pad = half + 1
        for (ax, ay), (bx, by) in pairwise(points):
            rows, columns, _, _ = self.clip(
                int(min(ay, by) - pad),
                int(min(ax, bx) - pad),
                int(abs(by - ay) + 2 * pad + 2),
                int(abs(bx - ax) + 2 * pad + 2),
            )
            y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + np.float32(0.5 - ay)
            x = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] + np.float32(0.5 - ax)
            dx, dy = np.float32(bx - ax), np.float32(by - ay)
            along = np.clip((x * dx + y * dy) / max(float(dx * dx + dy * dy), 1e-6), 0, 1)
            distance = np.sqrt((x - along * dx) ** 2 + (y - along * dy) ** 2)
            part = plane[rows, columns]
            np.maximum(part, np.clip(half + 0.5 - distance, 0, 1), out=part)
        return plane


def bounds(mask: Mask) -> Box:
    """(x0, y0, x1, y1) of the true pixels, x1 and y1 exclusive; zeros when there are none."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if rows.size == 0:
        return (0.0, 0.0, 0.0, 0.0)
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


@lru_cache(maxsize=8)
def whole(size: int) -> Mask:
    """The mask of the whole picture, read-only and shared."""
    mask = np.ones((size, size), np.bool_)
    mask.setflags(write=False)
    return mask


def union(masks: Sequence[Mask], size: int) -> Mask:
    """Union of masks, read-only; the mask itself when there is one; the whole picture when there is none."""
    if not masks:
        return whole(size)
    if len(masks) == 1:
        return masks[0]
    result = masks[0] | masks[1]
    for mask in masks[2:]:
        result |= mask
    result.setflags(write=False)
    return result
