"""Solids: unions of a few turned balls, boxes, cylinders, tori and capsules, whose inside is known everywhere.

A solid is a signed distance; from it come points of the surface with normals, what is inside, and views.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi, sin, sqrt

import numpy as np
from numpy.typing import NDArray

from .draw import Dice
from .sampling import _whole_number

Reals = NDArray[np.float64]

KINDS = ("ball", "box", "cylinder", "torus", "capsule")
VIEWS = ("+x", "-x", "+y", "-y", "+z", "-z")
"""Where the viewer stands; rows of a view fall along the next axis but one, columns rise along the next."""
REACH = 0.95
"""No part of a solid is farther from the origin."""
_STREAM = 103  # of Dice: the tasks of `make` have 0 .. 7, objects 101
_LIGHT = np.array([0.48, 0.6, 0.64])


@dataclass(frozen=True, eq=False)
class Part:
    """One body of a solid. ``sizes``: its three lengths, of which a ball uses one, all others but the box two.

    turn: (3, 3), from the world to the body's own axes. centre: (3,). colour: (3,) in [0, 1].
    """

    kind: str
    sizes: tuple[float, float, float]
    turn: Reals
    centre: Reals
    colour: Reals

    def distance(self, points: Reals) -> Reals:
        """(N,): signed distances of ``points`` (N, 3), below 0 inside."""
        x, y, z = ((points - self.centre) @ self.turn.T).T
        a, b, c = self.sizes
        if self.kind == "ball":
            return np.asarray(np.sqrt(x * x + y * y + z * z) - a)
        if self.kind == "torus":
            return np.asarray(np.hypot(np.hypot(x, y) - a, z) - b)
        if self.kind == "capsule":
            return np.asarray(np.sqrt(x * x + y * y + (z - np.clip(z, -a, a)) ** 2) - b)
        away = (abs(x) - a, abs(y) - b, abs(z) - c) if self.kind == "box" else (np.hypot(x, y) - a, abs(z) - b)
        outside = np.sqrt(sum(np.maximum(d, 0) ** 2 for d in away))
        return np.asarray(outside + np.minimum(np.maximum.reduce(away), 0))

    @property
    def radius(self) -> float:
        """Of a ball around ``centre`` that holds the body."""
        a, b, c = self.sizes
        return {"ball": a, "torus": a + b, "capsule": a + b, "cylinder": sqrt(a * a + b * b)}.get(
            self.kind, sqrt(a * a + b * b + c * c)
        )


@dataclass(frozen=True, eq=False)
class Solid:
    """The union of ``parts``, inside the cube from -1 to 1."""

    parts: tuple[Part, ...]
    seed: int

    def distance(self, points: Reals) -> Reals:
        """(N,): signed distances of ``points`` (N, 3), below 0 inside; exact outside, a bound inside a union."""
        return np.asarray(np.min([part.distance(points) for part in self.parts], axis=0))

    def inside(self, points: Reals) -> NDArray[np.bool_]:
        """(N,) bool: whether ``points`` (N, 3) are in the solid."""
        return np.asarray(self.distance(points) < 0)

    def colours(self, points: Reals) -> Reals:
        """(N, 3) in [0, 1]: that of the nearest part."""
        nearest = np.argmin([part.distance(points) for part in self.parts], axis=0)
        return np.stack([part.colour for part in self.parts])[nearest]

    def normals(self, points: Reals, step: float = 1e-4) -> Reals:
        """(N, 3): directions of length 1 in which the distance grows fastest."""
        moves = step * np.concatenate([np.eye(3), -np.eye(3)])
        ahead, behind = self.distance((points[None] + moves[:, None]).reshape(-1, 3)).reshape(2, 3, -1)
        rise = (ahead - behind).T
        return np.asarray(rise / np.maximum(np.linalg.norm(rise, axis=1, keepdims=True), 1e-12))

    def surface(self, n: int, seed: int = 0) -> tuple[Reals, Reals]:
        """(n, 3) points of the surface and (n, 3) normals of length 1.

        Points of the cube that walk to the surface along the distance: they cover it all, but not quite evenly.
        """
        n = _whole_number("n", n, 1, 2**20)
        dice = _generator(self.seed, seed)
        found = np.empty((0, 3))
        while len(found) < n:
            points = dice.uniform(-1, 1, (2 * n, 3))
            for _ in range(8):
                points = points - self.distance(points)[:, None] * self.normals(points)
            found = np.concatenate([found, points[abs(self.distance(points)) < 1e-4]])
        return found[:n], self.normals(found[:n])

    def samples(self, n: int, seed: int = 0, near: float = 0.05) -> tuple[Reals, NDArray[np.bool_]]:
        """(n, 3) points to learn the inside from and (n,) whether they are: half anywhere in the cube, half near the
        surface (normal noise of standard deviation ``near``)."""
        dice = _generator(self.seed, seed, 1)
        close = self.surface(n - n // 2, seed)[0]
        points = np.concatenate([dice.uniform(-1, 1, (n // 2, 3)), close + dice.normal(0, near, close.shape)])
        return points, self.inside(points)

    def occupied(self, n: int) -> NDArray[np.bool_]:
        """(n, n, n) bool, by x, y, z: whether the centres of the cube's cells are inside."""
        return self.inside(cells(n)).reshape(n, n, n)

    def view(self, side: str, size: int) -> tuple[Reals, Reals]:
        """What is seen from ``side`` (one of ``VIEWS``), without perspective: (size, size, 3) in [0, 1], lit, on black;
        and (size, size) depths from the cube's face, infinite where nothing is seen. ValueError for another side."""
        if side not in VIEWS:
            raise ValueError(f"side: got {side!r}; must be one of {', '.join(VIEWS)}")
        axis, sign = "xyz".index(side[1]), 1.0 if side[0] == "+" else -1.0
        centres = (np.arange(size) + 0.5) / size * 2 - 1
        points = np.empty((size * size, 3))
        points[:, axis] = sign
        points[:, (axis + 1) % 3] = np.tile(centres, size)
        points[:, (axis + 2) % 3] = np.repeat(-centres, size)
        depth = np.zeros(size * size)
        for _ in range(64):
            depth += np.maximum(self.distance(points), 0)
            points[:, axis] = sign * (1 - depth)
        seen = (depth < 2) & (self.distance(points) < 1e-3)
        light = 0.35 + 0.65 * np.abs(self.normals(points) @ _LIGHT)
        picture = np.where(seen[:, None], self.colours(points) * light[:, None], 0.0)
        return picture.reshape(size, size, 3), np.where(seen, depth, np.inf).reshape(size, size)


def cells(n: int) -> Reals:
    """(n^3, 3): centres of the cells of the cube from -1 to 1, by x, then y, then z."""
    centres = (np.arange(_whole_number("n", n, 1, 512)) + 0.5) / n * 2 - 1
    return np.stack(np.meshgrid(centres, centres, centres, indexing="ij"), -1).reshape(-1, 3)


def make_solid(seed: int, most: int = 3) -> Solid:
    """A solid of 1 .. ``most`` parts. seed: 0 .. 2**64 - 1 (``derive_seed`` gives streams that never share one).

    Raises ValueError, naming the argument.
    """
    seed, most = _whole_number("seed", seed, 0, 2**64 - 1), _whole_number("most", most, 1, 8)
    dice = Dice(seed, _STREAM)
    parts = []
    for _ in range(dice.between(1, most)):
        kind = dice.pick(KINDS)
        a, b, c = (dice.uniform(0.2, 0.45) for _ in range(3))
        sizes = (a, min(b, 0.6 * a), c) if kind == "torus" else (a, b, c)
        part = Part(kind, sizes, _turn(dice), np.zeros(3), np.array([dice.uniform(0.25, 1) for _ in range(3)]))
        far = REACH - part.radius
        centre = far * np.array([dice.uniform(-1, 1) for _ in range(3)]) / sqrt(3)
        parts.append(Part(kind, sizes, part.turn, centre, part.colour))
    return Solid(tuple(parts), seed)


def _turn(dice: Dice) -> Reals:
    """(3, 3): a rotation, all alike likely (Shoemake's quaternions)."""
    u, v, t = dice.uniform(), 2 * pi * dice.uniform(), 2 * pi * dice.uniform()
    x, y, z, w = sqrt(1 - u) * sin(v), sqrt(1 - u) * cos(v), sqrt(u) * sin(t), sqrt(u) * cos(t)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.array(rows)


def _generator(*entropy: int) -> np.random.Generator:
    words = [part for number in entropy for part in (number & 0xFFFFFFFF, number >> 32)]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([_STREAM, *words])))
