"""Orders of a grid's tokens along a curve, so that tokens side by side in the sequence are near on the grid too."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import torch

from vistok.core.attention.layout import TileOrder

Vector = tuple[int, ...]


def z_order(height: int, width: int) -> TileOrder:
    """Nested quads (Morton): runs of 4^i tokens are squares of side 2^i, as long as 2^i divides both sides.

    What is larger stands in raster order; where both sides are odd all does.
    """
    if height < 1 or width < 1:
        raise ValueError(f"height, width: got {height}, {width}, must be 1 or more")
    common = math.gcd(height, width)
    bits = (common & -common).bit_length() - 1
    y, x = torch.arange(height)[:, None], torch.arange(width)
    place = (y >> bits) * (width >> bits) + (x >> bits)
    for bit in reversed(range(bits)):
        place = place * 4 + (y >> bit & 1) * 2 + (x >> bit & 1)
    place = place.flatten()
    return TileOrder(place.argsort(), place)


@lru_cache(maxsize=16)  # a second for each 100,000 tokens
def hilbert_order(shape: tuple[int, ...]) -> TileOrder:
    """A curve of Hilbert's kind through a grid of any ``shape``, of one to three axes: a step to a neighbour each time,
    but for a few diagonal ones where sides are odd.

    A box is halved along its long sides, and the halves are passed so that each begins where the one before ends, until
    it is a line (Cerveny, "gilbert").
    """
    if not 1 <= len(shape) <= 3 or min(shape) < 1:
        raise ValueError(f"shape: got {shape}, must be one to three lengths, 1 or more")
    sides = [*shape, *(1,) * (3 - len(shape))]
    axes = [tuple(length if i == axis else 0 for i in range(3)) for axis, length in enumerate(sides)]
    axes.sort(key=lambda axis: -sum(axis))  # the longest first, as the halving expects
    points = torch.tensor([*_pass((0, 0, 0), axes[0], axes[1], axes[2])])
    order = (points[:, 0] * sides[1] + points[:, 1]) * sides[2] + points[:, 2]
    return TileOrder(order, order.argsort())


def _pass(at: Vector, a: Vector, b: Vector, c: Vector) -> Iterator[Vector]:
    """Points of the box at ``at`` with signed sides, from that corner to the other end of ``a``."""
    w, h, d = (abs(sum(side)) for side in (a, b, c))
    for along, rest in ((a, h * d), (b, w * d), (c, w * h)):
        if rest == 1:
            step = _unit(along)
            yield from (_sum(at, tuple(i * s for s in step)) for i in range(abs(sum(along))))
            return
    a2, b2, c2 = (_half(side) for side in (a, b, c))
    da, db, dc = (_unit(side) for side in (a, b, c))
    far_a = _sum(at, _less(a, da))
    if 2 * w > 3 * h and 2 * w > 3 * d:
        yield from _pass(at, a2, b, c)
        yield from _pass(_sum(at, a2), _less(a, a2), b, c)
    elif 3 * h > 4 * d:
        yield from _pass(at, b2, c, a2)
        yield from _pass(_sum(at, b2), a, _less(b, b2), c)
        yield from _pass(_sum(far_a, _less(b2, db)), _minus(b2), c, _minus(_less(a, a2)))
    elif 3 * d > 4 * h:
        yield from _pass(at, c2, a2, b)
        yield from _pass(_sum(at, c2), a, b, _less(c, c2))
        yield from _pass(_sum(far_a, _less(c2, dc)), _minus(c2), _minus(_less(a, a2)), b)
    else:
        yield from _pass(at, b2, c2, a2)
        yield from _pass(_sum(at, b2), c, a2, _less(b, b2))
        corner = _sum(at, _less(b2, db), _less(c, dc))
        yield from _pass(corner, a, _minus(b2), _minus(_less(c, c2)))
        yield from _pass(_sum(far_a, b2, _less(c, dc)), _minus(c), _minus(_less(a, a2)), _less(b, b2))
        yield from _pass(_sum(far_a, _less(b2, db)), _minus(b2), c2, _minus(_less(a, a2)))


def _half(side: Vector) -> Vector:
    """Half of a side, made even where the side is longer than two, so that the curve can turn without a diagonal."""
    length = sum(side)
    half = abs(length) // 2
    half += half % 2 if abs(length) > 2 else 0
    return tuple((1 if length > 0 else -1) * half * bool(s) for s in side)


def _unit(side: Vector) -> Vector:
    return tuple((s > 0) - (s < 0) for s in side)


def _sum(*vectors: Vector) -> Vector:
    return tuple(map(sum, zip(*vectors, strict=True)))


def _less(x: Vector, y: Vector) -> Vector:
    return tuple(i - j for i, j in zip(x, y, strict=True))


def _minus(x: Vector) -> Vector:
    return tuple(-i for i in x)
