"""The kept tokens of a picture, drawn over it."""

from __future__ import annotations

import colorsys
from collections.abc import Iterator
from typing import Literal

import numpy as np
from PIL import Image

from vistok.host.layout import Part
from vistok.host.pictures import Picture

DARK = 0.22
"""Brightness of what no kept token shows."""
DIM = 0.6
"""Brightness of what only the thumbnail of a picture in crops shows."""
TINT = 0.4
"""Share of a merged token's colour."""


def overlay(
    image: Image.Image, picture: Picture, fit: Literal["stretch", "crop"], frame: int | None = None
) -> Image.Image:
    """See ``Session.overlay``. RGB, the size of ``image``."""
    if fit not in ("stretch", "crop"):
        raise ValueError(f"fit: got {fit!r}, must be 'stretch' or 'crop'")
    frames = picture.frames
    if frames is None and frame is not None:
        raise ValueError(f"frame: got {frame}, but it is a picture and no video")
    if frames is not None and (frame is None or not 0 <= frame < frames):
        raise ValueError(f"frame: got {frame}, must be 0..{frames - 1}: which frame of the video the image shows")
    image = image.convert("RGB")
    width, height = image.size
    side = min(width, height)
    shown = ((width - side) // 2, (height - side) // 2, side, side) if fit == "crop" else (0, 0, width, height)
    pixels = np.asarray(image, dtype=np.float32)
    light = np.full((height, width), DARK, np.float32)
    colour = np.zeros((height, width, 3), np.float32)
    tinted = np.zeros((height, width, 1), np.float32)
    source = picture.source.cpu().numpy()
    sizes = np.bincount(source[source >= 0], minlength=max(picture.tokens_kept, 1))

    first = 0
    parts = list(_boxes(picture.layout.parts, width / height))
    for number, (grid, box) in enumerate(parts):
        slots = source[first : first + grid[0] * grid[1]].reshape(grid)
        first += grid[0] * grid[1]
        if frame not in (None, number):
            continue
        rows, columns = _pixels(box[1], box[3], shown[1], shown[3]), _pixels(box[0], box[2], shown[0], shown[2])
        cells = slots[_cells(rows, grid[0])[:, None], _cells(columns, grid[1])]
        region = np.ix_(rows, columns)
        full = DIM if frames is None and len(parts) > 1 and number == 0 else 1.0
        light[region] = np.maximum(light[region], np.where(cells >= 0, full, DARK))
        merged = (cells >= 0) & (sizes[np.maximum(cells, 0)] > 1)
        if full == 1.0:
            colour[region] = palette(len(sizes))[np.maximum(cells, 0)]
            tinted[region] = merged[..., None] * TINT
    drawn = pixels * light[..., None] * (1 - tinted) + colour * tinted
    return Image.fromarray(drawn.round().clip(0, 255).astype(np.uint8))


def _boxes(
    parts: tuple[Part, ...], aspect: float
) -> Iterator[tuple[tuple[int, int], tuple[float, float, float, float]]]:
    """Grid and box of each part. Tiles of unknown arrangement (all but the first) are laid out as the rows and columns
    whose ratio is nearest to the picture's ``aspect``."""
    tiles = [part for part in parts if part.box is None]
    splits = [(len(tiles) // c, c) for c in range(1, len(tiles) + 1) if len(tiles) % c == 0]
    rows, columns = min(splits, key=lambda s: abs(aspect - s[1] / s[0]), default=(1, 1))
    number = 0
    for part in parts:
        if part.box is not None:
            yield part.grid, part.box
        else:
            r, c = divmod(number, columns)
            number += 1
            yield part.grid, (c / columns, r / rows, (c + 1) / columns, (r + 1) / rows)


def _pixels(start: float, end: float, offset: int, size: int) -> np.ndarray:
    """Pixels whose centres lie in the share start..end of ``size`` pixels that begin at ``offset``."""
    return np.arange(round(start * size), round(end * size)) + offset


def _cells(pixels: np.ndarray, cells: int) -> np.ndarray:
    return np.arange(len(pixels)) * cells // max(len(pixels), 1)


def palette(count: int) -> np.ndarray:
    """(count, 3) colours that differ between neighbours in the list."""
    golden = 0.618034
    return np.array([colorsys.hsv_to_rgb(i * golden % 1, 0.75, 1.0) for i in range(count)], np.float32) * 255
