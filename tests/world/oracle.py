"""Answers questions of the world anew, from things and pixels, by parsing the text: no code shared with it."""

from __future__ import annotations

import re

import numpy as np

from vistok.world import Picture, Thing

COLOURS = ["red", "green", "blue", "yellow", "purple", "orange", "cyan", "white"]
SHAPES = ["circle", "square", "triangle", "star", "cross", "diamond", "heart", "ring"]
PLURAL = {f"{s}s": s for s in SHAPES} | {"crosses": "cross"}


def centre(thing: Thing) -> tuple[float, float]:
    """(x, y) of the visible pixels, as shares of the side."""
    y, x = np.nonzero(thing.mask)
    return x.mean() / thing.mask.shape[0], y.mean() / thing.mask.shape[0]


def side_holds(side: str, first: Thing, second: Thing) -> bool:
    (ax, ay), (bx, by) = centre(first), centre(second)
    return {"left": ax < bx, "right": ax > bx, "above": ay < by, "below": ay > by}[side]


def matching(picture: Picture, name: str) -> list[Thing]:
    """The things that a noun phrase can mean."""
    words = name.split()
    kinds = {
        "object": "object", "bar": "bar", "line": "line", "field": "field", "word": "word", "number": "word",
        "text": "word",
    }  # fmt: skip
    kind = next((kinds[w] for w in words if w in kinds), "object")
    found = [t for t in picture.things if t.kind == kind]
    for word in words:
        if word in COLOURS:
            found = [t for t in found if t.attributes["colour"] == word]
        elif word in SHAPES:
            found = [t for t in found if t.attributes["shape"] == word]
        elif word in ("word", "number"):
            found = [t for t in found if t.attributes["text"].isdigit() == (word == "number")]
        elif re.fullmatch("[A-Z0-9]+", word):
            found = [t for t in found if t.attributes["text"] == word]
        elif word in ("leftmost", "rightmost", "topmost", "lowest"):
            axis, sign = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "lowest": (1, -1)}[word]
            found = sorted(found, key=lambda t: sign * centre(t)[axis])[:1]
        elif word in ("top", "middle", "bottom"):
            order = sorted(found, key=lambda t: centre(t)[1])
            found = [order[{"top": 0, "middle": 1, "bottom": -1}[word]]]
        elif word in ("first", "second", "third", "fourth", "last"):
            order = sorted(found, key=lambda t: centre(t)[0 if kind == "bar" else 1])
            found = [order[{"first": 0, "second": 1, "third": 2, "fourth": 3, "last": -1}[word]]]
        elif kind == "field" and word not in kinds:
            found = [t for t in found if t.attributes["key"].lower() == word]
    return found


def one(picture: Picture, name: str) -> Thing:
    """The one thing that a phrase means; the reference must be unique."""
    found = matching(picture, name)
    assert len(found) == 1, f"{name!r} means {len(found)} things in: {picture.caption}"
    return found[0]


def tick_of(picture: Picture, row: float) -> str:
    """The tick label whose centre is nearest to a pixel row."""
    ticks = [t for t in picture.things if t.kind == "tick"]
    return min(ticks, key=lambda t: abs((t.box[1] + t.box[3]) / 2 - row)).attributes["text"]


def bar_tick(picture: Picture, bar: Thing) -> str:
    return tick_of(picture, bar.box[1])


def line_ticks(picture: Picture, line: Thing) -> list[str]:
    """Nearest ticks of the first and the last point, and of the highest and lowest, read off the pixels."""
    columns = np.flatnonzero(line.mask.any(0))
    reach = max(2, line.mask.shape[0] // 40)
    ends = [np.nonzero(line.mask[:, c])[0].mean() for c in (columns[0] + reach, columns[-1] - reach)]
    rows = np.flatnonzero(line.mask.any(1))
    return [tick_of(picture, row) for row in (*ends, rows[0] + reach, rows[-1] - reach)]


def answer(picture: Picture, text: str) -> str | None:
    """The answer to a question, or None where this oracle cannot read it."""
    if m := re.fullmatch(r"is there the text ([A-Z0-9]+)\?", text):
        return "yes" if matching(picture, f"text {m[1]}") else "no"
    if m := re.fullmatch(r"is there an? (.+)\?", text):
        return "yes" if matching(picture, m[1]) else "no"
    if m := re.fullmatch(r"how many characters does the (.+) have\?", text):
        return str(len(one(picture, m[1]).attributes["text"]))
    if m := re.fullmatch(r"how many (.+) are there\?", text):
        words = [PLURAL.get(w, w[:-1] if w.endswith("s") and w not in SHAPES else w) for w in m[1].split()]
        return str(len(matching(picture, " ".join(words))))
    if text == "what colour is the line?":
        return one(picture, "line").attributes["colour"]
    if m := re.fullmatch(r"what colour is the (tallest|shortest) bar\?", text):
        bars = [t for t in picture.things if t.kind == "bar"]
        best = (min if m[1] == "tallest" else max)(bars, key=lambda t: t.box[1])
        return best.attributes["colour"]
    if m := re.fullmatch(r"what (colour|shape) is the (.+)\?", text):
        return one(picture, m[2]).attributes[m[1]]
    if m := re.fullmatch(r"where is the (.+) relative to the (.+)\?", text):
        first, second = centre(one(picture, m[1])), centre(one(picture, m[2]))
        dx, dy = first[0] - second[0], first[1] - second[1]
        if picture.task == "words":
            dx = 0.0
        return ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
    if m := re.fullmatch(r"is the (.+) bar taller than the (.+) bar\?", text):
        first, second = one(picture, f"{m[1]} bar"), one(picture, f"{m[2]} bar")
        return "yes" if first.box[1] < second.box[1] else "no"
    if m := re.fullmatch(r"is the last value of the (.+) line higher than the first\?", text):
        first, last, _, _ = line_ticks(picture, one(picture, f"{m[1]} line"))
        return "yes" if int(last) > int(first) else "no"
    if m := re.fullmatch(r"is the (.+) (left of|right of|above|below) the (.+)\?", text):
        holds = side_holds(m[2].split()[0], one(picture, m[1]), one(picture, m[3]))
        return "yes" if holds else "no"
    if m := re.fullmatch(r"what is the (first|last) letter of the (.+)\?", text):
        return one(picture, m[2]).attributes["text"][0 if m[1] == "first" else -1]
    if m := re.fullmatch(r"(?:what is the value of the|how high is the) (.+ bar)\?", text):
        return bar_tick(picture, one(picture, m[1]))
    if text == "what is the highest number on the axis?":
        return max((t.attributes["text"] for t in picture.things if t.kind == "tick"), key=int)
    if m := re.fullmatch(r"what is the (first|last|highest|lowest) value of the (.+ line)\?", text):
        at = ("first", "last", "highest", "lowest").index(m[1])
        return line_ticks(picture, one(picture, m[2]))[at]
    if text == "which line ends highest?":
        lines = [t for t in picture.things if t.kind == "line"]
        return max(lines, key=lambda t: int(line_ticks(picture, t)[1])).attributes["colour"]
    if m := re.fullmatch(r"how many points does the (.+ line) have\?", text):
        return str(len(one(picture, m[1]).attributes["ticks"]))
    if m := re.fullmatch(r"which field says ([A-Z0-9]+)\?", text):
        return one(picture, f"field {m[1]}").attributes["key"].lower()
    if m := re.fullmatch(r"(?:what is the (.+ field) called|which is the (.+ field))\?", text):
        return one(picture, m[1] or m[2]).attributes["key"].lower()
    if m := re.fullmatch(r"(?:what is the value of the (.+ field)|what does the (.+ field) say)\?", text):
        return one(picture, m[1] or m[2]).attributes["text"]
    if m := re.fullmatch(r"(?:what does the (.+) say|what is the (.+))\?", text):
        name = m[1] or m[2]
        return one(picture, name if picture.task == "words" else f"{name} field").attributes["text"]
    return None
