"""Curves with intervals as plain numbers and SVG paths, for a template to write out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 42, 12, 12, 40
"""Margins around the plot, in units of the SVG."""
WIDE = 5
"""From this ratio of the largest to the smallest cost on, the axis is logarithmic."""
NEAR = 0.02
"""Costs that differ by less, as a share, stand beside each other instead of on each other."""
STEP, ROOM = 5.0, 56.0
"""Distance of two that stand beside each other, and how far all of them may spread."""
COLOURS = 6
SHAPES = (
    "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "m-3.6-3.6h7.2v7.2h-7.2z",
    "m0-4.8l4.5 8h-9z",
    "m0-5.2l4.6 5.2-4.6 5.2-4.6-5.2z",
    "m0 4.8l4.5-8h-9z",
)
"""Paths around their start: circle, square, triangle, diamond, triangle upside down."""
PLUS = "m-5.5-1.6h3.9v-3.9h3.2v3.9h3.9v3.2h-3.9v3.9h-3.2v-3.9h-3.9z"
RING = "m-8 0a8 8 0 1 0 16 0a8 8 0 1 0-16 0z"


@dataclass(frozen=True)
class Point:
    """One setting in a plot. ``low`` and ``high``: the interval of ``gain``, where it is known."""

    series: str
    cost: float
    gain: float
    low: float | None = None
    high: float | None = None
    told: str = ""
    """What is shown when a pointer rests on it."""


def looks(names: Sequence[str], controls: Sequence[str]) -> dict[str, dict[str, str]]:
    """{series: {"style": class, "shape": path}}. ``controls`` are drawn as such; of the others, no two among 30 share
    both colour and shape."""
    found = {}
    for number, name in enumerate(name for name in names if name not in controls):
        found[name] = {"style": f"c{number % COLOURS}", "shape": SHAPES[number % len(SHAPES)]}
    for number, name in enumerate(controls):
        found[name] = {"style": f"k{number}", "shape": PLUS if number == 0 else SHAPES[number - 1]}
    return found


def chart(points: Sequence[Point], front: Sequence[Point], *, beside: bool, joined: bool = True) -> dict[str, Any]:
    """The plot of ``points`` (at least one), costs to the right and gains (shares of 1) upwards: {"x_ticks", "y_ticks":
    [(place, label)], "series": [{"name", "line", "points": [{"x", "y", "low", "high", "told", "front"}]}], "front": a
    path}.

    ``front``: those of the points that no other beats, the cheapest first. ``beside``: points of (nearly) the same cost
    are moved apart, each series always to the same side. ``joined``: the points of a series lie on a line.
    """
    costs = [point.cost for point in points]
    across, x_ticks = _axis(min(costs), max(costs), LEFT, WIDTH - RIGHT, 0.07)
    ends = [end for p in points for end in (p.gain, p.low, p.high) if end is not None]
    low, high = max(0.0, min(ends) - 0.02), min(1.0, max(ends) + 0.02)
    if high - low < 0.1:
        low, high = max(0.0, high - 0.1), max(high, 0.1)
    up, y_ticks = _linear(low, high, HEIGHT - BOTTOM, TOP)
    names = list(dict.fromkeys(point.series for point in points))
    moved = _moved(names, [across(cost) for cost in _levels(costs)]) if beside else dict.fromkeys(names, 0.0)

    def place(point: Point) -> tuple[float, float]:
        return round(across(point.cost) + moved[point.series], 1), round(up(point.gain), 1)

    series = []
    for name in names:
        mine = sorted((point for point in points if point.series == name), key=lambda point: point.cost)
        drawn = [
            {
                "x": place(point)[0],
                "y": place(point)[1],
                "low": None if point.low is None else round(up(point.low), 1),
                "high": None if point.high is None else round(up(point.high), 1),
                "told": point.told,
                "front": point in front,
            }
            for point in mine
        ]
        line = (
            " ".join(f"{place(point)[0]:g},{place(point)[1]:g}" for point in mine) if joined and len(mine) > 1 else ""
        )
        series.append({"name": name, "line": line, "points": drawn})
    return {
        "x_ticks": [(round(across(value), 1), f"{value:g}") for value in x_ticks],
        "y_ticks": [(round(up(value), 1), f"{100 * value:g}") for value in y_ticks],
        "series": series,
        "front": _stairs([place(point) for point in front]),
    }


def _stairs(places: Sequence[tuple[float, float]]) -> str:
    """What can be had for a cost or less, as a path."""
    if not places:
        return ""
    (x, y), *rest = places
    return f"M{x:g} {y:g}" + "".join(f"H{x:g}V{y:g}" for x, y in rest) + f"H{WIDTH - RIGHT}"


def _levels(costs: Sequence[float]) -> list[float]:
    """Costs without those that lie near one below."""
    found: list[float] = []
    for cost in sorted(costs):
        if not found or cost > found[-1] * (1 + NEAR):
            found.append(cost)
    return found


def _moved(names: Sequence[str], levels: Sequence[float]) -> dict[str, float]:
    """How far each series is moved to the side."""
    gaps = [after - before for before, after in pairwise(levels)]
    step = min(STEP, min([ROOM, *(0.7 * gap for gap in gaps)]) / len(names))
    return {name: (number - (len(names) - 1) / 2) * step for number, name in enumerate(names)}


def _axis(
    low: float, high: float, start: float, end: float, pad: float
) -> tuple[Callable[[float], float], list[float]]:
    """A scale with some room at both ends, and its ticks; logarithmic where the values are far apart."""
    if low > 0 and high / low >= WIDE:
        ends = math.log(low), math.log(high)
        room = pad * (ends[1] - ends[0])
        place, _ = _linear(ends[0] - room, ends[1] + room, start, end)
        powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
        inside = [tick for tick in ticks if ends[0] - room <= math.log(tick) <= ends[1] + room]
        return lambda value: place(math.log(value)), inside
    room = pad * (high - low) or 0.1 * abs(high) or 1.0
    return _linear(low - room, high + room, start, end)


def _linear(low: float, high: float, start: float, end: float) -> tuple[Callable[[float], float], list[float]]:
    """A scale from ``low`` at ``start`` to ``high`` at ``end``, and round values within."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough)
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ticks = [round(number * step, 9) for number in numbers]
    return lambda value: start + (value - low) / (high - low) * (end - start), ticks
