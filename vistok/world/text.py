"""Words: one to three words or numbers in several styles, inks and plates."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .draw import Canvas, Colour, Dice, ground
from .glyph import STYLES, fit, width_of, write
from .question import Asker
from .types import Drawn, Question, Thing
from .vocabulary import CHARACTERS, COLOUR_NAMES, COLOURS, SIDES, WORDS

ON_DARK = ("red", "green", "yellow", "orange", "cyan", "white")
ON_LIGHT = ("red", "green", "blue", "purple")
LETTERS = CHARACTERS[:26]
PLACES = {1: (), 2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
LENGTHS = tuple("23456")


def number(dice: Dice, shortest: int = 2, longest: int = 4) -> str:
    """A number without leading zero."""
    digits = dice.between(shortest, longest)
    return str(dice.between(1, 9)) + "".join(str(dice.below(10)) for _ in range(digits - 1))


def string(dice: Dice) -> str:
    """A common word, a string of random letters, or a number."""
    kind = dice.uniform()
    if kind < 0.4:
        return dice.pick(WORDS)
    if kind < 0.65:
        return "".join(dice.pick(LETTERS) for _ in range(dice.between(3, 6)))
    return number(dice)


def draw(dice: Dice, size: int) -> tuple[NDArray[np.uint8], list[Thing]]:
    """Image and things, from top to bottom."""
    dark = dice.chance(0.6)
    canvas = Canvas(ground(dice, size, *((34, 58) if dark else (196, 226)), strength=14, noise=10))
    count = dice.between(1, 3)
    things: list[Thing] = []
    texts: list[str] = []
    used: set[str] = set()
    for row in range(count):
        text = string(dice)
        while text in texts:
            text = string(dice)
        texts.append(text)
        plated = dice.chance(0.5)
        on_dark = dice.chance(0.5) if plated else dark
        colour = dice.pick([c for c in (ON_DARK if on_dark else ON_LIGHT) if c not in used])
        used.add(colour)
        style = dice.pick(STYLES)
        share = dice.uniform(0.090, 0.128)
        height = max(6, round(share * size))
        squeeze = fit(text, style, height, 0.86 * size)
        width = width_of(text, style, height, squeeze)
        pad = max(2, round(0.03 * size))
        left = pad + 1 + round(dice.uniform() * max(0, size - 2 * pad - 2 - width))
        band = size / count
        top = round(row * band + pad + dice.uniform() * max(0.0, band - 2 * pad - height))
        if plated:
            level = dice.between(12, 34) if on_dark else dice.between(222, 246)
            plate: Colour = (level, level, level)
            canvas.fill(top - pad, left - pad, top + height + pad, left + width + pad, plate)
        ink = write(canvas, text, top, left, height, dice.tinted(COLOURS[colour], 8), style, squeeze)
        noun = "number" if text.isdigit() else "word"
        attributes = {
            "text": text,
            "colour": colour,
            "noun": noun,
            "style": style,
            "x": (left + width / 2) / size,
            "y": (top + height / 2) / size,
            "cells": ink.cells,
        }
        things.append(Thing("word", attributes, ink.box, ink.mask, 0))
    return canvas.image, things


def caption(things: list[Thing]) -> str:
    """Every text with its colour, from top to bottom."""
    return " ; ".join(f"{t.attributes['colour']} text {t.attributes['text']}" for t in things) + " ."


class TextAsker(Asker):
    """Reading first, then colour, existence, counting and relation over the texts of one picture."""

    def __init__(self, dice: Dice, size: int, things: list[Thing]) -> None:
        super().__init__(dice, size)
        self.things = things

    def _name(self, thing: Thing, colour: bool = True) -> str:
        """A reference to a text that says nothing about its letters (nor its colour, if not ``colour``)."""
        noun = thing.attributes["noun"]
        names = []
        if colour:
            names += [f"{thing.attributes['colour']} text", f"{thing.attributes['colour']} {noun}"]
        if len(self.things) > 1:
            names.append(f"{PLACES[len(self.things)][self.things.index(thing)]} text")
        if sum(t.attributes["noun"] == noun for t in self.things) == 1:
            names.append(noun)
        return self.dice.pick(names)

    def reading(self) -> Question | None:
        """The whole text."""
        thing = self.dice.pick(self.things)
        return self.ask("reading", self.phrase("says", self._name(thing)), thing.attributes["text"], [thing])

    def letter(self) -> Question | None:
        """The first or last letter of a word."""
        thing = self.dice.pick([t for t in self.things if t.attributes["noun"] == "word"] or self.things)
        if thing.attributes["noun"] != "word":
            return None
        first = self.dice.chance(0.5)
        text = self.phrase("first letter" if first else "last letter", self._name(thing))
        return self.ask("reading", text, thing.attributes["text"][0 if first else -1], [thing])

    def colour(self) -> Question | None:
        """The colour of a text named by its letters or its place."""
        thing = self.dice.pick(self.things)
        name = f"{thing.attributes['noun']} {thing.attributes['text']}"
        if self.dice.chance(0.4):
            name = self._name(thing, colour=False)
        return self.ask("colour", self.phrase("colour of", name), thing.attributes["colour"], [thing], COLOUR_NAMES)

    def existence(self) -> Question | None:
        """Balanced: a noun with its ink, or a text. A "no" changes ink, noun, one character or all of it."""
        wanted = self.wanted("existence")
        thing = self.dice.pick(self.things)
        text, colour, noun = (thing.attributes[key] for key in ("text", "colour", "noun"))
        half = self.dice.chance(0.5)
        if self.dice.chance(0.5):
            if not wanted and half:
                noun = "number" if noun == "word" else "word"
            elif not wanted:
                colour = self.dice.pick(COLOUR_NAMES)
            asked = self.there_is(f"{colour} {noun}")
            found = [t for t in self.things if (t.attributes["colour"], t.attributes["noun"]) == (colour, noun)]
        else:
            if not wanted and half:
                at = self.dice.below(len(text))
                text = text[:at] + self.dice.pick("123456789" if noun == "number" else LETTERS) + text[at + 1 :]
            elif not wanted:
                text = string(self.dice)
            asked = self.phrase("exists text", text)
            found = [t for t in self.things if t.attributes["text"] == text]
        if bool(found) != wanted:
            return None
        return self.yes_no("existence", asked, wanted, found)

    def counting(self) -> Question | None:
        """How many texts, words, numbers, or characters in one text."""
        kind = self.dice.below(4)
        if kind == 0:
            thing = self.dice.pick(self.things)
            text = self.phrase("letters", self._name(thing))
            return self.ask("counting", text, str(len(thing.attributes["text"])), [thing], LENGTHS)
        noun = ("", "text", "word", "number")[kind]
        found = [t for t in self.things if kind == 1 or t.attributes["noun"] == noun]
        return self.count(self.phrase("count", noun + "s"), found)

    def relation(self) -> Question | None:
        """Above or below between two texts."""
        if len(self.things) < 2:
            return None
        first, second = self.dice.shuffled(self.things)[:2]
        side = "above" if first.attributes["y"] < second.attributes["y"] else "below"
        if self.dice.chance(0.5):
            names = [f"{t.attributes['colour']} text" for t in (first, second)]
        else:
            names = [f"{t.attributes['noun']} {t.attributes['text']}" for t in (first, second)]
        if self.dice.chance(0.5):
            return self.ask("relation", self.phrase("where", *names), side, [first, second], SIDES[2:])
        truth = self.wanted("relation")
        asked = side if truth else ("below" if side == "above" else "above")
        return self.yes_no("relation", self.phrase(f"is {asked}", *names), truth, [first, second])

    def questions(self, n: int) -> tuple[Question, ...]:
        """n questions; a third of the turns read the text."""
        makers = (self.reading, self.colour, self.existence, self.letter, self.reading, self.counting, self.relation)
        return self.collect(n, makers)


def make(dice: Dice, ask: Dice, size: int, questions: int) -> Drawn:
    """(image, questions, things, caption) of a picture with one to three texts."""
    image, things = draw(dice, size)
    return image, TextAsker(ask, size, things).questions(questions), tuple(things), caption(things)
