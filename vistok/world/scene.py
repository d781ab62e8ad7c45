"""Scenes: coloured shapes on textured grounds, with visible masks and depth order."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .draw import Canvas, Dice, Floats, bounds, ground, shape_alpha
from .question import Asker, article
from .types import Drawn, Mask, Question, Thing
from .vocabulary import COLOUR_NAMES, COLOURS, PLURALS, SHAPES, SIDES, SIZES

_REFERENCE = 112  # placement is decided at this size, so that one seed gives one layout at every size
_VISIBLE = 0.66  # a margin over the promised 60%, for rounding at other sizes


@dataclass(frozen=True)
class Placed:
    """An object before it is drawn; x, y, radius as shares of the side; turn in steps of 4 degrees."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    turn: int

    def mask(self, size: int) -> tuple[Floats, int, int]:
        """Coverage patch, top, left at a picture size."""
        radius = max(4, round(SIZES[self.size] * size))
        alpha = shape_alpha(self.shape, radius, self.turn)
        return alpha, round(self.y * size) - radius - 1, round(self.x * size) - radius - 1


def _place(dice: Dice, count: int) -> list[Placed]:
    """Draws objects back to front so that each stays visible by two thirds."""
    placed: list[Placed] = []
    masks: list[Mask] = []
    areas: list[int] = []
    canvas = Canvas(np.zeros((_REFERENCE, _REFERENCE, 3), np.uint8))
    while len(placed) < count:
        shape, colour = dice.pick(SHAPES), dice.pick(COLOUR_NAMES)
        if placed and dice.chance(0.45):  # shared attributes make counts above one and hard negatives
            twin = dice.pick(placed)
            if dice.chance(0.5):
                shape = twin.shape
            else:
                colour = twin.colour
        sizes = ("small",) if count > 6 else ("small", "medium") if count > 4 else tuple(SIZES)
        size = dice.pick(sizes)
        margin = SIZES[size] + 0.01
        for _ in range(24):
            x, y = dice.uniform(margin, 1 - margin), dice.uniform(margin, 1 - margin)
            # Mostly apart; touching and overlapping neighbours are the exception.
            apart = 0.95 if dice.chance(0.8) else 0.6
            if any((x - p.x) ** 2 + (y - p.y) ** 2 < (apart * (SIZES[size] + SIZES[p.size])) ** 2 for p in placed):
                continue
            new = Placed(shape, colour, size, x, y, dice.between(-3, 3))
            alpha, top, left = new.mask(_REFERENCE)
            rows, columns, inner_rows, inner_columns = canvas.clip(top, left, *alpha.shape)
            mask = np.zeros((_REFERENCE, _REFERENCE), np.bool_)
            mask[rows, columns] = alpha[inner_rows, inner_columns] >= 0.5
            rest = [old & ~mask for old in masks]
            if any(int(r.sum()) < _VISIBLE * area for r, area in zip(rest, areas, strict=True)):
                continue
            # Neighbours of one colour must not melt into one blob.
            if any(p.colour == colour and r.sum() < a for p, r, a in zip(placed, rest, areas, strict=True)):
                continue
            masks = [*rest, mask]
            areas.append(int(mask.sum()))
            placed.append(new)
            break
        else:
            if placed:
                break
    return placed


def draw(dice: Dice, size: int, max_objects: int) -> tuple[NDArray[np.uint8], list[Thing]]:
    """Image and things, nearest first."""
    placed = _place(dice, dice.between(1, max_objects))
    canvas = Canvas(ground(dice, size, 62, 138))
    masks: list[Mask] = []
    for item in placed:
        alpha, top, left = item.mask(size)
        mask = canvas.paint(alpha, top, left, dice.tinted(COLOURS[item.colour], 9))
        masks = [*(old & ~mask for old in masks), mask]
    things = []
    for depth, (item, mask) in enumerate(zip(reversed(placed), reversed(masks), strict=True)):
        mask.setflags(write=False)
        attributes = {"shape": item.shape, "colour": item.colour, "size": item.size, "x": item.x, "y": item.y}
        things.append(Thing("object", attributes, bounds(mask), mask, depth))
    return canvas.image, things


def caption(things: list[Thing]) -> str:
    """All objects in reading order (four bands, then left to right)."""
    order = sorted(things, key=lambda t: (int(t.attributes["y"] * 4), t.attributes["x"]))
    return " , ".join(f"{article(t.attributes['colour'])} {_name(t)}" for t in order) + " ."


def _name(thing: Thing) -> str:
    return f"{thing.attributes['colour']} {thing.attributes['shape']}"


class SceneAsker(Asker):
    """Existence, counting, colour, shape and relation over the objects of one scene."""

    def __init__(self, dice: Dice, size: int, things: list[Thing]) -> None:
        super().__init__(dice, size)
        self.things = things
        self.by: dict[str, list[Thing]] = defaultdict(list)
        for thing in things:
            shape, colour = thing.attributes["shape"], thing.attributes["colour"]
            for name in (shape, f"{colour} object", f"{colour} {shape}"):
                self.by[name].append(thing)

    def existence(self) -> Question | None:
        """Balanced yes/no. A "no" about a coloured shape mostly recombines what is there, or changes one attribute."""
        dice, wanted = self.dice, self.wanted("existence")
        kind = dice.below(4)
        thing = dice.pick(self.things).attributes
        shape, colour = thing["shape"], thing["colour"]
        if not wanted:
            other = dice.pick(self.things).attributes
            if kind >= 2 or dice.chance(0.2):
                shape, colour = dice.pick(SHAPES), dice.pick(COLOUR_NAMES)
            elif other["colour"] != colour:
                colour = other["colour"]
            elif dice.chance(0.5):
                shape = dice.pick(SHAPES)
            else:
                colour = dice.pick(COLOUR_NAMES)
        name = shape if kind == 2 else f"{colour} object" if kind == 3 else f"{colour} {shape}"
        if (name in self.by) != wanted:
            return None
        return self.yes_no("existence", self.there_is(name), wanted, self.by[name] if wanted else ())

    def counting(self) -> Question | None:
        """Asks for objects, a shape or a colour; the possible counts get even chances, zero a smaller one."""
        groups: dict[int, list[tuple[str, list[Thing]]]] = defaultdict(list)
        groups[len(self.things)].append(("objects", self.things))
        for shape in SHAPES:
            groups[len(self.by.get(shape, ()))].append((PLURALS[shape], self.by.get(shape, [])))
        for colour in COLOUR_NAMES:
            found = self.by.get(f"{colour} object", [])
            groups[len(found)].append((f"{colour} objects", found))
        numbers = sorted(groups)
        if 0 in groups and not self.dice.chance(0.5):
            numbers.remove(0)
        name, things = self.dice.pick(groups[self.dice.pick(numbers)])
        return self.count(self.phrase("count", name), things)

    def _extreme(self) -> tuple[str, Thing] | None:
        if len(self.things) < 2:
            return None
        axis, sign, word = self.dice.pick(
            (("x", 1, "leftmost"), ("x", -1, "rightmost"), ("y", 1, "topmost"), ("y", -1, "lowest"))
        )
        order = sorted(self.things, key=lambda t: sign * t.attributes[axis])
        if abs(order[0].attributes[axis] - order[1].attributes[axis]) < 0.08:
            return None
        return f"{word} object", order[0]

    def _one(self, key: str) -> tuple[str, Thing] | None:
        """A reference to one object that does not give away attribute ``key``."""
        if self.dice.chance(0.25):
            return self._extreme()
        names = []
        for thing in self.things:
            name = thing.attributes["shape"] if key == "colour" else f"{thing.attributes['colour']} object"
            if len(self.by[name]) == 1:
                names.append((name, thing))
        return self.dice.pick(names) if names else self._extreme()

    def colour(self) -> Question | None:
        """The colour of the only star, or of the leftmost object."""
        found = self._one("colour")
        if found is None:
            return None
        name, thing = found
        return self.ask("colour", self.phrase("colour of", name), thing.attributes["colour"], [thing], COLOUR_NAMES)

    def shape(self) -> Question | None:
        """The shape of the only red object, or of the leftmost one."""
        found = self._one("shape")
        if found is None:
            return None
        name, thing = found
        return self.ask("shape", self.phrase("shape of", name), thing.attributes["shape"], [thing], SHAPES)

    def relation(self) -> Question | None:
        """Left, right, above, below between two objects whose names are unique, with a clear margin."""
        unique = [t for t in self.things if len(self.by[_name(t)]) == 1]
        if len(unique) < 2:
            return None
        first, second = self.dice.shuffled(unique)[:2]
        dx = first.attributes["x"] - second.attributes["x"]
        dy = first.attributes["y"] - second.attributes["y"]
        across, along = (abs(dx), abs(dy)) if abs(dx) > abs(dy) else (abs(dy), abs(dx))
        if across < 0.15 or across < 1.5 * along:
            return None
        side = (SIDES[0] if dx < 0 else SIDES[1]) if abs(dx) > abs(dy) else (SIDES[2] if dy < 0 else SIDES[3])
        names = _name(first), _name(second)
        if self.dice.chance(0.6):
            return self.ask("relation", self.phrase("where", *names), side, [first, second], SIDES)
        truth = self.wanted("relation")
        asked = side if truth else {"left": "right", "right": "left", "above": "below", "below": "above"}[side]
        return self.yes_no("relation", self.phrase(f"is {asked}", *names), truth, [first, second])

    def questions(self, n: int) -> tuple[Question, ...]:
        """n questions, the five families in turn."""
        return self.collect(n, (self.existence, self.counting, self.colour, self.shape, self.relation))


def make(dice: Dice, ask: Dice, size: int, questions: int, max_objects: int) -> Drawn:
    """(image, questions, things, caption) of a scene with 1 .. max_objects objects."""
    image, things = draw(dice, size, max_objects)
    return image, SceneAsker(ask, size, things).questions(questions), tuple(things), caption(things)
