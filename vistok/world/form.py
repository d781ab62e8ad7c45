"""Forms and receipts: two to four rows of a printed key and its value."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .draw import Canvas, Colour, Dice, bounds, ground
from .glyph import fit, width_of, write
from .question import Asker
from .text import number
from .types import Drawn, Question, Thing
from .vocabulary import KEYS, NUMBER_KEYS, PLACE_WORDS

ORDER = ("first", "second", "third", "fourth")


def draw(dice: Dice, size: int) -> tuple[NDArray[np.uint8], list[Thing]]:
    """Image and fields, from top to bottom. The mask of a field is the ink of key and value."""
    dark = dice.chance(0.25)
    canvas = Canvas(ground(dice, size, 70, 130, strength=14, noise=8))
    level = dice.between(14, 34) if dark else dice.between(226, 248)
    paper: Colour = (level, level, level)
    ink: Colour = dice.tinted((238, 238, 238) if dark else (26, 26, 34), 10)
    rule: Colour = (96, 96, 96) if dark else (178, 178, 178)
    margin = max(1, round(dice.uniform(0.012, 0.03) * size))
    rows = dice.between(2, 4)
    height = max(6, round(dice.uniform(0.088, 0.104) * size))
    key_style = dice.pick(("regular", "bold", "narrow", "pixel"))
    value_style = key_style if dice.chance(0.5) else dice.pick(("regular", "bold", "narrow", "pixel", "slanted"))
    top_edge = margin
    bottom_edge = size - margin if rows == 4 or dice.chance(0.5) else round(size * (0.36 + 0.18 * rows))
    canvas.fill(top_edge, margin, bottom_edge, size - margin, paper)
    ruled = dice.chance(0.5)
    line = max(1, size // 160)
    inner = margin + max(2, round(0.025 * size))
    band = (bottom_edge - top_edge) / rows
    aligned = dice.chance(0.6)  # values at the right edge, else in a column of their own
    things = []
    keys = dice.shuffled(KEYS)[:rows]
    values: set[str] = set()
    for row, key in enumerate(keys):
        value = number(dice) if key in NUMBER_KEYS else dice.pick(PLACE_WORDS)
        while value in values:
            value = number(dice) if key in NUMBER_KEYS else dice.pick(PLACE_WORDS)
        values.add(value)
        top = round(top_edge + row * band + (band - height) / 2 + dice.uniform(-0.1, 0.1) * (band - height))
        if ruled and row:
            edge = round(top_edge + row * band)
            canvas.fill(edge, inner, edge + line, size - inner, rule)
        key_squeeze = fit(key, key_style, height, 0.43 * size)
        left_ink = write(canvas, key, top, inner, height, ink, key_style, key_squeeze)
        squeeze = fit(value, value_style, height, 0.43 * size)
        width = width_of(value, value_style, height, squeeze)
        x = size - inner - width if aligned else min(round(0.53 * size), size - inner - width)
        right_ink = write(canvas, value, top, x, height, ink, value_style, squeeze)
        mask = left_ink.mask | right_ink.mask
        mask.setflags(write=False)
        cells = left_ink.cells + right_ink.cells
        attributes = {"key": key, "text": value, "cells": cells, "value_box": right_ink.box, "key_box": left_ink.box}
        things.append(Thing("field", attributes, bounds(mask), mask, 0))
    return canvas.image, things


def caption(things: list[Thing]) -> str:
    """Every row, key first."""
    return " ; ".join(f"{t.attributes['key']} {t.attributes['text']}" for t in things) + " ."


class FormAsker(Asker):
    """Key-value questions first, then existence of a field, counting and reading by place."""

    def __init__(self, dice: Dice, size: int, things: list[Thing]) -> None:
        super().__init__(dice, size)
        self.things = things

    def value(self) -> Question | None:
        """The value of a field named by its key."""
        thing = self.dice.pick(self.things)
        text = self.phrase("field", thing.attributes["key"].lower())
        return self.ask("key-value", text, thing.attributes["text"], [thing])

    def which(self) -> Question | None:
        """The key of a field named by its value."""
        thing = self.dice.pick(self.things)
        text = self.phrase("which field", thing.attributes["text"])
        names = tuple(key.lower() for key in KEYS)
        return self.ask("key-value", text, thing.attributes["key"].lower(), [thing], names)

    def nth(self) -> Question | None:
        """The key or the value of the first, second .. field."""
        at = self.dice.below(len(self.things))
        thing = self.things[at]
        if self.dice.chance(0.5):
            return self.ask("reading", self.phrase("nth value", ORDER[at]), thing.attributes["text"], [thing])
        names = tuple(key.lower() for key in KEYS)
        return self.ask("reading", self.phrase("nth field", ORDER[at]), thing.attributes["key"].lower(), [thing], names)

    def existence(self) -> Question | None:
        """Balanced: is there a field of that name."""
        wanted = self.wanted("existence")
        thing = self.dice.pick(self.things)
        key = thing.attributes["key"]
        if not wanted:
            here = {t.attributes["key"] for t in self.things}
            key = self.dice.pick([k for k in KEYS if k not in here])
        text = self.there_is(f"{key.lower()} field")
        return self.yes_no("existence", text, wanted, [thing] if wanted else ())

    def counting(self) -> Question | None:
        """How many fields."""
        return self.count(self.phrase("count", "fields"), self.things)

    def relation(self) -> Question | None:
        """Above or below between two fields."""
        first, second = self.dice.shuffled(self.things)[:2]
        above = self.things.index(first) < self.things.index(second)
        truth = self.wanted("relation")
        asked = "above" if above == truth else "below"
        names = [f"{t.attributes['key'].lower()} field" for t in (first, second)]
        return self.yes_no("relation", self.phrase(f"is {asked}", *names), truth, [first, second])

    def questions(self, n: int) -> tuple[Question, ...]:
        """n questions; values come up twice a turn."""
        makers = (self.value, self.existence, self.which, self.value, self.nth, self.relation, self.counting)
        return self.collect(n, makers)


def make(dice: Dice, ask: Dice, size: int, questions: int) -> Drawn:
    """(image, questions, things, caption) of a form."""
    image, things = draw(dice, size)
    return image, FormAsker(ask, size, things).questions(questions), tuple(things), caption(things)
