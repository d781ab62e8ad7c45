"""Bar and line charts with a labelled value axis and known values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .draw import Canvas, Colour, Dice, bounds, ground
from .glyph import fit, width_of, write
from .question import COUNTS, Asker
from .types import Drawn, Mask, Question, Thing
from .vocabulary import COLOUR_NAMES, COLOURS

ON_LIGHT = ("red", "green", "blue", "yellow", "purple", "orange", "cyan")
STEPS = (1, 2, 5, 10, 20, 25, 50)
_LABEL = 0.085  # height of the axis labels as a share of the side


@dataclass(frozen=True)
class Axis:
    """Value axis: ticks at 0, step .. step * ticks; plot area in pixels."""

    step: int
    ticks: int
    left: int
    right: int
    top: int
    bottom: int

    def y(self, value: float) -> float:
        """Pixel row of a value."""
        return self.bottom - (self.bottom - self.top) * value / (self.step * self.ticks)

    @property
    def names(self) -> tuple[str, ...]:
        """All tick labels, zero first."""
        return tuple(str(self.step * i) for i in range(self.ticks + 1))


def _axis(dice: Dice, canvas: Canvas, ink: Colour, faint: Colour) -> tuple[Axis, list[Thing]]:
    size = canvas.size
    step, ticks = dice.pick(STEPS), dice.between(3, 5)
    style = dice.pick(("regular", "bold", "narrow"))
    height = max(5, round(_LABEL * size))
    margin = max(1, round(0.025 * size))
    names = [str(step * i) for i in range(ticks + 1)]
    squeeze = fit(names[-1], style, height, 0.2 * size)
    widest = max(width_of(name, style, height, squeeze) for name in names)
    left = 2 * margin + widest + max(1, round(0.02 * size))
    half = (height + 1) // 2
    axis = Axis(step, ticks, left, size - margin, margin + half, size - margin - half)
    line = max(1, round(size / 112))
    grid = dice.chance(0.7)
    things = []
    for i, name in enumerate(names):
        y = round(axis.y(step * i))
        if grid or i == 0:
            canvas.fill(y, left, y + line, axis.right, faint if i else ink)
        else:
            canvas.fill(y, left - 2 * line, y + line, left, ink)
        x = margin + widest - width_of(name, style, height, squeeze)
        label = write(canvas, name, y - height // 2, x, height, ink, style, squeeze)
        attributes = {"text": name, "value": step * i, "cells": label.cells}
        things.append(Thing("tick", attributes, label.box, label.mask, 0))
    canvas.fill(axis.top - line, left - line, axis.bottom + line, left, ink)
    return axis, things


def draw(dice: Dice, size: int) -> tuple[NDArray[np.uint8], str, Axis, list[Thing], list[Thing]]:
    """Image, kind ("bar" or "line"), axis, marks from left to right, tick labels."""
    light = dice.chance(0.55)
    canvas = Canvas(ground(dice, size, *((206, 226) if light else (28, 46)), strength=6, noise=6))
    ink: Colour = (22, 22, 26) if light else (236, 236, 236)
    faint: Colour = (168, 168, 172) if light else (92, 92, 96)
    axis, ticks = _axis(dice, canvas, ink, faint)
    palette = dice.shuffled(ON_LIGHT if light else COLOUR_NAMES)
    if dice.chance(0.62):
        return canvas.image, "bar", axis, _bars(dice, canvas, axis, palette), ticks
    return canvas.image, "line", axis, _lines(dice, canvas, axis, palette), ticks


def _value(dice: Dice, axis: Axis) -> tuple[float, int]:
    """A value within 15% of a step of its nearest tick, so that the nearest tick is plain to see."""
    at = dice.between(1, axis.ticks)
    value = axis.step * (at + dice.uniform(-0.15, 0.15 if at < axis.ticks else 0.0))
    return round(value, 3), axis.step * at


def _bars(dice: Dice, canvas: Canvas, axis: Axis, palette: list[str]) -> list[Thing]:
    count = dice.between(2, 5)
    slot = (axis.right - axis.left) / count
    thick = slot * dice.uniform(0.55, 0.8) if count > 2 else slot * dice.uniform(0.35, 0.6)
    things = []
    for i in range(count):
        value, tick = _value(dice, axis)
        left = axis.left + (i + 0.5) * slot - thick / 2
        x0, x1 = round(left) + 1, round(left + thick)
        y0 = round(axis.y(value))
        mask = canvas.fill(y0, x0, axis.bottom, x1, dice.tinted(COLOURS[palette[i]], 8))
        mask.setflags(write=False)
        attributes = {"colour": palette[i], "value": value, "tick": tick, "x": (x0 + x1) / 2 / canvas.size}
        things.append(Thing("bar", attributes, bounds(mask), mask, 0))
    return things


def _lines(dice: Dice, canvas: Canvas, axis: Axis, palette: list[str]) -> list[Thing]:
    count, points = (2 if dice.chance(0.4) else 1), dice.between(3, 5)
    width = max(1.6, canvas.size * 0.024)
    pad = canvas.size * 0.06
    xs = [axis.left + pad + (axis.right - axis.left - 2 * pad) * i / (points - 1) for i in range(points)]
    series = [[_value(dice, axis) for _ in range(points)] for _ in range(count)]
    if count == 2:  # two lines never share a point, so that both stay visible
        for i in range(points):
            while series[1][i][1] == series[0][i][1]:
                series[1][i] = _value(dice, axis)
    drawn: list[tuple[list[tuple[float, int]], str, Mask]] = []
    for number, values in enumerate(series):
        path = [(x, axis.y(value)) for x, (value, _) in zip(xs, values, strict=True)]
        alpha = canvas.stroke(path, width)
        for x, y in path:
            np.maximum(alpha, canvas.stroke([(x, y), (x, y)], 2.3 * width), out=alpha)
        mask = canvas.paint(alpha, 0, 0, dice.tinted(COLOURS[palette[number]], 8))
        drawn = [(v, c, m & ~mask) for v, c, m in drawn]
        drawn.append((values, palette[number], mask))
    things = []
    for depth, (values, colour, mask) in enumerate(reversed(drawn)):
        mask.setflags(write=False)
        attributes = {"colour": colour, "values": tuple(v for v, _ in values), "ticks": tuple(t for _, t in values)}
        things.append(Thing("line", attributes, bounds(mask), mask, depth))
    return things


def caption(kind: str, marks: list[Thing]) -> str:
    """Every bar with its nearest tick, or every line with those of its points."""
    parts = []
    for mark in marks:
        ticks = (mark.attributes["tick"],) if kind == "bar" else mark.attributes["ticks"]
        parts.append(" ".join([mark.attributes["colour"], *map(str, ticks)]))
    return f"{kind} chart : " + " , ".join(parts) + " ."


class ChartAsker(Asker):
    """Chart values and comparisons, with a few existence, counting, colour and relation questions."""

    def __init__(self, dice: Dice, size: int, kind: str, axis: Axis, marks: list[Thing], ticks: list[Thing]) -> None:
        super().__init__(dice, size)
        self.kind, self.axis, self.marks, self.ticks = kind, axis, marks, ticks
        self.colours = [mark.attributes["colour"] for mark in marks]

    def value(self) -> Question | None:
        """The nearest tick of a bar, or of the first, last, highest or lowest point of a line."""
        mark = self.dice.pick(self.marks)
        if self.kind == "bar":
            text, answer = self.phrase("value", mark.attributes["colour"]), mark.attributes["tick"]
        else:
            values = mark.attributes["ticks"]
            which, answer = self.dice.pick(
                (("first", values[0]), ("last", values[-1]), ("highest", max(values)), ("lowest", min(values)))
            )
            text = self.phrase(f"line {which}", mark.attributes["colour"])
        return self.ask("chart", text, str(answer), [mark, *self.ticks], self.axis.names)

    def extreme(self) -> Question | None:
        """The tallest or shortest bar (clear by most of a step); the line that ends highest."""
        if len(self.marks) < 2:
            return None
        if self.kind == "line":
            best = max(self.marks, key=lambda m: m.attributes["ticks"][-1])
            return self.ask("chart", self.phrase("line ends"), best.attributes["colour"], self.marks, COLOUR_NAMES)
        tallest = self.dice.chance(0.5)
        order = sorted(self.marks, key=lambda m: m.attributes["tick"], reverse=tallest)
        if order[0].attributes["tick"] == order[1].attributes["tick"]:
            return None
        text = self.phrase("tallest" if tallest else "shortest")
        return self.ask("chart", text, order[0].attributes["colour"], self.marks, COLOUR_NAMES)

    def compare(self) -> Question | None:
        """Balanced yes/no: one bar against another; the last point of a line against its first."""
        wanted = self.wanted("chart")
        if self.kind == "line":
            mark = self.dice.pick(self.marks)
            first, last = mark.attributes["ticks"][0], mark.attributes["ticks"][-1]
            if first == last or (last > first) != wanted:
                return None
            return self.yes_no("chart", self.phrase("line rises", mark.attributes["colour"]), wanted, [mark])
        low, high = sorted(self.dice.shuffled(self.marks)[:2], key=lambda m: m.attributes["tick"])
        if low.attributes["tick"] == high.attributes["tick"]:
            return None
        one, other = (high, low) if wanted else (low, high)
        text = self.phrase("taller", one.attributes["colour"], other.attributes["colour"])
        return self.yes_no("chart", text, wanted, [one, other])

    def existence(self) -> Question | None:
        """Balanced: is there a bar or line of a colour."""
        wanted = self.wanted("existence")
        mark = self.dice.pick(self.marks)
        colour = mark.attributes["colour"]
        if not wanted:
            colour = self.dice.pick([c for c in COLOUR_NAMES if c not in self.colours])
        return self.yes_no("existence", self.there_is(f"{colour} {self.kind}"), wanted, [mark] if wanted else ())

    def counting(self) -> Question | None:
        """How many bars or lines; how many points a line has."""
        if self.kind == "line" and self.dice.chance(0.6):
            mark = self.dice.pick(self.marks)
            text = self.phrase("line points", mark.attributes["colour"])
            return self.ask("counting", text, str(len(mark.attributes["ticks"])), [mark], COUNTS)
        return self.count(self.phrase("count", f"{self.kind}s"), self.marks)

    def reading(self) -> Question | None:
        """The highest number on the axis."""
        top = self.ticks[-1]
        return self.ask("reading", self.phrase("axis top"), top.attributes["text"], [top])

    def colour(self) -> Question | None:
        """The colour of the bar at a place, counted from the left; of the only line."""
        if self.kind == "line":
            if len(self.marks) > 1:
                return None
            return self.ask("colour", self.phrase("colour of", "line"), self.colours[0], self.marks, COLOUR_NAMES)
        at = self.dice.below(len(self.marks))
        place = "last" if at == len(self.marks) - 1 else ("first", "second", "third", "fourth")[at]
        text = self.phrase("colour of", f"{place} bar")
        return self.ask("colour", text, self.colours[at], [self.marks[at]], COLOUR_NAMES)

    def relation(self) -> Question | None:
        """Left or right between two bars."""
        if self.kind == "line":
            return None
        first, second = self.dice.shuffled(self.marks)[:2]
        left = first.attributes["x"] < second.attributes["x"]
        truth = self.wanted("relation")
        asked = "left" if left == truth else "right"
        names = [f"{m.attributes['colour']} bar" for m in (first, second)]
        return self.yes_no("relation", self.phrase(f"is {asked}", *names), truth, [first, second])

    def questions(self, n: int) -> tuple[Question, ...]:
        """n questions; values come up twice a turn."""
        makers = (self.value, self.extreme, self.compare, self.value, self.existence, self.counting)
        return self.collect(n, (*makers, self.colour, self.relation, self.reading))


def make(dice: Dice, ask: Dice, size: int, questions: int) -> Drawn:
    """(image, questions, things, caption) of a bar or line chart."""
    image, kind, axis, marks, ticks = draw(dice, size)
    asked = ChartAsker(ask, size, kind, axis, marks, ticks).questions(questions)
    return image, asked, (*marks, *ticks), caption(kind, marks)
