"""CT-like slices of a chest that nobody has: ellipses of known density, one finding in some, a scanner's noise.

Densities are Hounsfield units (HU): air -1000, water 0, bone some hundreds. A monitor shows a ``window`` of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .sampling import _whole_number

FINDINGS = ("none", "nodule", "calcification", "effusion", "consolidation", "pneumothorax")
"""What a slice shows, in the order of its labels."""
WINDOWS = {"lung": (-600, 1500), "soft tissue": (40, 400), "bone": (400, 1800)}
"""Level and width of the usual windows, in HU."""
BIAS = 1024
"""Added to HU where slices are stored, so that air is above 0."""
SMALLEST, LARGEST = 16, 1024
_STREAM = 103
_NOISE = 12.0  # HU, standard deviation

Map = NDArray[np.float32]


@dataclass(frozen=True)
class Phantom:
    """One slice and its truth."""

    hu: NDArray[np.int16]
    """(H, W), in HU."""
    finding: int
    """Its place in ``FINDINGS``."""
    mask: NDArray[np.bool_]
    """(H, W): pixels of the finding; none of them where there is none."""


def make_phantom(seed: int, size: int = 64, finding: int | None = None) -> Phantom:
    """The slice number ``seed`` (0 .. 2**64 - 1) with ``size`` x ``size`` pixels; ``finding`` is drawn where None.

    The same arguments give the same bytes.
    """
    seed, size = _whole_number("seed", seed, 0, 2**64 - 1), _whole_number("size", size, SMALLEST, LARGEST)
    rng = np.random.default_rng([_STREAM, seed])
    drawn = int(rng.integers(len(FINDINGS)))
    label = drawn if finding is None else _whole_number("finding", finding, 0, len(FINDINGS) - 1)
    axis = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    sharp = size / 3.0  # of edges: a border is about two pixels wide

    def jitter(value: float, share: float = 0.06) -> float:
        return value * float(1 + share * rng.uniform(-1, 1))

    def ellipse(cx: float, cy: float, rx: float, ry: float) -> Map:
        """Coverage, 0 .. 1."""
        distance = (np.sqrt(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2) - 1) * min(rx, ry)
        return np.asarray(np.clip(0.5 - distance * sharp, 0, 1), np.float32)

    hu = np.full((size, size), -1000, np.float32)

    def lay(cover: Map, density: float | Map) -> None:
        hu[:] = hu * (1 - cover) + density * cover

    wide, high = jitter(0.9), jitter(0.72)
    body = ellipse(0, 0, wide, high)
    lay(body, -100)  # fat
    lay(ellipse(0, 0, 0.92 * wide, 0.9 * high), 45)  # muscle
    for angle in np.linspace(0, 2 * np.pi, 14, endpoint=False) + rng.uniform(0, 0.3):
        lay(ellipse(0.86 * wide * np.cos(angle), 0.83 * high * np.sin(angle), 0.06, 0.035), 500)  # ribs
    lay(ellipse(0, 0.62 * high, 0.13, 0.13), jitter(350, 0.2))  # spine
    lungs = []
    for side in (-1, 1):
        shape = (side * jitter(0.43) * wide, jitter(-0.03, 1), jitter(0.34) * wide, jitter(0.64) * high)
        cover = ellipse(*shape)
        waves = sum(
            (np.sin(a * x + b * y + c) for a, b, c in rng.uniform(-30, 30, (6, 3))), np.zeros((size, size))
        ).astype(np.float32)
        lay(cover, -840 + 14 * waves)  # vessels
        lungs.append((cover, shape))
    lay(ellipse(jitter(0.12, 0.5), jitter(0.08, 0.5), 0.2 * wide, 0.24 * high), 50)  # heart
    lay(ellipse(-0.04, jitter(0.36), 0.07, 0.07), 55)  # aorta

    side = int(rng.integers(2))
    cover, (cx, cy, rx, ry) = lungs[side]
    turn, away = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.55)
    px, py = cx + away * rx * np.cos(turn), cy + away * ry * np.sin(turn)
    radius, depth = float(rng.uniform(0.07, 0.12)), float(rng.uniform(0.15, 0.45))
    kind = FINDINGS[label]
    where = np.zeros((size, size), np.float32)
    if kind == "nodule":
        where = ellipse(px, py, radius, radius) * cover
        lay(where, 40)
    elif kind == "calcification":
        where = ellipse(px, py, radius, radius) * cover
        lay(where, 800)
    elif kind == "effusion":  # fluid, which lies at the back
        where = np.asarray(np.clip((y - (cy + depth * ry)) * sharp + 0.5, 0, 1) * cover)
        lay(where, 10)
    elif kind == "consolidation":  # no sharp border
        near = ((x - px) / (3.5 * radius)) ** 2 + ((y - py) / (3.5 * radius)) ** 2
        where = np.asarray(np.exp(-near) * cover, np.float32)
        lay(where, 0)
    elif kind == "pneumothorax":  # air around the lung that has shrunk
        inner = ellipse(cx - (1 if side else -1) * 0.2 * rx, cy, 0.68 * rx, 0.78 * ry)
        where = np.asarray(cover * (1 - inner), np.float32)
        lay(where, -1000)
        lay(ellipse(cx - (1 if side else -1) * 0.2 * rx, cy, 0.7 * rx, 0.8 * ry) * cover * (where < 0.5), -720)
    hu += rng.normal(0, _NOISE, hu.shape).astype(np.float32)
    mask = where >= 0.5
    mask.flags.writeable = False
    return Phantom(np.clip(np.rint(hu), -1024, 3071).astype(np.int16), label, mask)


def window(hu: NDArray[np.int16], level: float, width: float) -> Map:
    """``hu`` (...) as grey levels in [0, 1]: 0 up to ``level - width / 2``, 1 from ``level + width / 2`` on.

    Raises ValueError for a width that is not above 0.
    """
    if width <= 0:
        raise ValueError(f"width: got {width}, must be greater than 0")
    return np.asarray(np.clip((hu.astype(np.float32) - (level - width / 2)) / width, 0, 1), np.float32)


def to_stored(hu: NDArray[np.int16]) -> NDArray[np.int16]:
    """HU as they are stored, ``BIAS`` higher, so that a window can still be chosen when they are read."""
    return (hu + np.int16(BIAS)).astype(np.int16)


def from_stored(stored: NDArray[np.int16]) -> NDArray[np.int16]:
    """What ``to_stored`` was given."""
    return (stored - np.int16(BIAS)).astype(np.int16)
