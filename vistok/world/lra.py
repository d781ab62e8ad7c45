"""Tasks on long sequences, drawn with their answers: after the Long Range Arena, at any length.

Source: Tay et al., arXiv 2011.04006, google-research/long-range-arena. ListOps is the published generator. The others
stand in for data sets that cannot be passed on: curves for Pathfinder, handwritten digits for CIFAR-10, reviews made of
clauses for IMDb, pairs of documents that share a code word or do not for the ACL anthology. In all but the digits a
count of the tokens tells nothing of the answer, or little. Equal seeds give equal data; no two rows are equal, so that
parts of one call have nothing in common.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from vistok.world.real import digits

Ints = NDArray[np.int64]
Points = NDArray[np.float64]
MIN, MAX, MED, SM, END = range(10, 15)
"""Tokens of ListOps after the ten digits: four operators, and the end of an operator's arguments."""
OPERATORS: dict[int, Callable[[list[int]], int]] = {
    MIN: min,
    MAX: max,
    MED: lambda values: int(np.median(values)),
    SM: lambda values: sum(values) % 10,
}
SHARE = 0.25
"""Of the nodes above the greatest depth that are operators."""
NOUNS, GOOD, BAD = ("plot", "cast", "tone", "shot"), ("good", "fine", "warm"), ("poor", "dull", "cold")
FILLER = ("the", "and", "then", "of", "so", "it", "was", "in")
MARKS, NOISE = b"abcd", b"efghijklmnopqrst"


@dataclass(frozen=True)
class Sequences:
    """Rows and their answers."""

    tokens: Ints
    """(n, L), or (n, 2, L) for pairs; -1 is padding, at the end."""
    labels: Ints
    """(n,)"""
    classes: int
    vocabulary: int
    """Tokens are 0 .. vocabulary - 1."""

    def __getitem__(self, rows: slice) -> Sequences:
        return Sequences(self.tokens[rows], self.labels[rows], self.classes, self.vocabulary)


def listops(n: int, min_len: int, max_len: int, seed: int, depth: int = 10, max_args: int = 10) -> Sequences:
    """``n`` expressions of ``min_len`` to ``max_len`` tokens, brackets of operators left out, and their values 0 .. 9.

    The published task: 501 to 1999 tokens, trees of ``depth`` 10 at most, 2 to 10 arguments. Trees of other lengths are
    thrown away. Answers are not balanced. Raises ValueError where too few trees are as long as asked for.
    """
    dice = random.Random(seed)
    found: dict[tuple[int, ...], int] = {}
    for _ in range(1000 * n + 100_000):
        if len(found) == n:
            break
        tokens: list[int] = []
        value = _grow(dice, tokens, 1, depth, max_args, max_len)
        if value is not None and min_len <= len(tokens) <= max_len:
            found[tuple(tokens)] = value
    if len(found) < n:
        raise ValueError(f"min_len, max_len: got {min_len}, {max_len}, which only {len(found)} of {n} trees had")
    table = np.full((n, max_len), -1, np.int64)
    for row, expression in zip(table, found, strict=True):
        row[: len(expression)] = expression
    return Sequences(table, np.array(list(found.values()), np.int64), 10, 15)


def _grow(dice: random.Random, tokens: list[int], at: int, depth: int, max_args: int, most: int) -> int | None:
    """Append a tree to ``tokens``; its value, or None as soon as it is longer than ``most``."""
    if at >= depth or dice.random() > SHARE:
        tokens.append(dice.randrange(10))
        return tokens[-1] if len(tokens) <= most else None
    operator = dice.choice((MIN, MAX, MED, SM))
    tokens.append(operator)
    values = []
    for _ in range(dice.randint(2, max_args)):
        value = _grow(dice, tokens, at + 1, depth, max_args, most)
        if value is None:
            return None
        values.append(value)
    tokens.append(END)
    return OPERATORS[operator](values)


def listops_value(tokens: Iterable[int]) -> int:
    """The value of one expression, padding left out. Raises ValueError where it is not a whole one."""
    open_: list[tuple[int, list[int]]] = [(END, [])]
    for token in map(int, tokens):
        if token in OPERATORS:
            open_.append((token, []))
        elif token == END and len(open_) > 1 and open_[-1][1]:
            operator, values = open_.pop()
            open_[-1][1].append(OPERATORS[operator](values))
        elif 0 <= token < 10:
            open_[-1][1].append(token)
        elif token >= 0:
            raise ValueError(f"tokens: got {token} out of place, must be an expression")
    if len(open_) != 1 or len(open_[0][1]) != 1:
        raise ValueError("tokens: got a part of an expression or several, must be one")
    return open_[0][1][0]


def pathfinder(n: int, size: int, seed: int, distractors: int = 2) -> Sequences:
    """Pictures of dashed curves with two dots, (n, size * size) grey values 0 .. 255: 1 if one curve joins the dots.

    Rows 2i and 2i + 1 are a pair: the same curves, and the second dot at the other end of the first curve (1), or at an
    end of another curve (0) that is as far away. Beside the two long curves there are short ones.
    """
    if n % 2 or size < 12:
        raise ValueError(f"n, size: got {n}, {size}, must be even, and 12 or more")
    dice = np.random.default_rng(seed)
    pictures = np.empty((n, size, size), np.int64)
    seen = set[bytes]()
    while len(seen) < n:
        curves = _curves(dice, size, distractors)
        if curves is None:
            continue
        lines = np.zeros((size, size))
        for curve in curves:
            lines = np.maximum(lines, 0.5 * _drawn(curve[(np.arange(len(curve)) % 6) < 4], size, 0.5))
        pair = []
        for end in (curves[1][0], curves[0][-1]):
            dots = _drawn(np.stack([curves[0][0], end]), size, 1.2)
            pair.append(np.rint(255 * np.maximum(lines, dots)).astype(np.int64))
        if pair[0].tobytes() not in seen and pair[1].tobytes() not in seen:
            pictures[len(seen) : len(seen) + 2] = pair
            seen |= {p.tobytes() for p in pair}
    return Sequences(pictures.reshape(n, -1), np.arange(n) % 2, 2, 256)


def _curves(dice: np.random.Generator, size: int, distractors: int) -> list[Points] | None:
    """Curves that do not meet, two long ones first, whose beginnings are apart as are the ends of the first."""
    length = 5 * size // 4
    first = _curve(dice, dice.uniform(2, size - 2, 2), length, size)
    if first is None:
        return None
    apart = np.hypot(*(first[-1] - first[0]))
    for turn in dice.uniform(0, 2 * np.pi, 30):
        start = first[0] + apart * np.array([np.cos(turn), np.sin(turn)])
        second = _curve(dice, start, length, size)
        if second is not None and _apart(first, second) > 2.8:
            break
    else:
        return None
    found = [first, second]
    for start in dice.uniform(2, size - 2, (distractors, 2)):
        short = _curve(dice, start, length // 3, size)
        if short is not None and all(_apart(short, other) > 2.2 for other in found):
            found.append(short)
    return found


def _curve(dice: np.random.Generator, start: Points, steps: int, size: int) -> Points | None:
    """(steps, 2) points half a pixel apart from ``start`` on, bending gently; None if it leaves the picture."""
    heading = dice.uniform(0, 2 * np.pi) + np.cumsum(np.repeat(dice.normal(0, 0.4, steps // 4 + 1), 4)[:steps])
    moves = 0.5 * np.stack([np.cos(heading), np.sin(heading)], 1)
    points = start + np.cumsum(moves, 0) - moves[0]
    inside = points.min() > 1 and points.max() < size - 2
    return points if inside and np.hypot(*(points[-1] - points[0])) > steps / 5 else None


def _apart(some: Points, others: Points) -> float:
    return float(np.linalg.norm(some[:, None] - others, axis=2).min())


def _drawn(points: Points, size: int, radius: float) -> Points:
    """(size, size) in 0 .. 1: discs at ``points``, with soft borders."""
    grid = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), 2).reshape(-1, 1, 2)
    far = np.linalg.norm(grid - points, axis=2).min(1)
    return np.asarray(np.clip(radius + 0.5 - far, 0, 1)).reshape(size, size)


def pixels(side: int, test: bool) -> Sequences:
    """All handwritten digits of a part, (n, side * side) grey values 0 .. 255; ``side``: a multiple of 8."""
    if side < 8 or side % 8:
        raise ValueError(f"side: got {side}, must be a multiple of 8")
    pictures, labels = digits(test)
    large = pictures.repeat(side // 8, 1).repeat(side // 8, 2).astype(np.int64)
    return Sequences(large.reshape(len(large), -1), labels.astype(np.int64), 10, 256)


def text(n: int, length: int, seed: int, denied: float = 0.2) -> Sequences:
    """Reviews of ``length`` bytes: 1 if more of their clauses praise than blame.

    A clause is a noun, an adjective, and a "not" between them in a share ``denied`` of the clauses; there is one to 20
    bytes, an odd number, among filler words. With ``denied`` 0.5 words taken one by one tell nothing.
    """
    if length < 40:
        raise ValueError(f"length: got {length}, must be 40 or more")
    dice = random.Random(seed)
    found: list[bytes] = []
    seen = set[bytes]()
    clauses = (length // 20 - 1) // 2 * 2 + 1
    while len(found) < n:
        while sum(signs := [dice.choice((-1, 1)) for _ in range(clauses)]) * (1 if len(found) % 2 else -1) < 0:
            pass
        words = []
        for sign in signs:
            turned = dice.random() < denied
            adjective = dice.choice(GOOD if (sign > 0) != turned else BAD)
            words.append(f"{dice.choice(NOUNS)} {'not ' if turned else ''}{adjective}. ")
        while (left := length - sum(map(len, words))) > 0:
            words.insert(dice.randint(0, len(words)), f"{dice.choice(FILLER)} "[-left:])
        row = "".join(words).encode()
        if row not in seen:
            seen.add(row)
            found.append(row)
    table = np.frombuffer(b"".join(found), np.uint8).reshape(n, length).astype(np.int64)
    return Sequences(table, np.arange(n) % 2, 2, 256)


def retrieval(n: int, length: int, seed: int, topics: int = 4) -> Sequences:
    """Pairs of documents (n, 2, length) of bytes: 1 if both hold the same code word.

    A code word is one order of the letters a to d, once to 16 bytes, in noise of other letters, so that all documents
    have the same letters of code words. ``topics``: orders that are used, 24 at most.
    """
    orders = [bytes(order) for order in permutations(MARKS)]
    if not 2 <= topics <= len(orders) or length < 16:
        raise ValueError(f"topics, length: got {topics}, {length}, must be 2 to {len(orders)}, and 16 or more")
    orders = orders[:: len(orders) // topics][:topics]
    dice = random.Random(seed)
    found: list[bytes] = []
    seen = set[bytes]()
    while len(found) < n:
        first = dice.randrange(topics)
        other = first if len(found) % 2 else (first + dice.randrange(1, topics)) % topics
        pair = b""
        for topic in (first, other):
            words = [bytes([letter]) for letter in dice.choices(NOISE, k=length - 4 * (length // 16))]
            for _ in range(length // 16):
                words.insert(dice.randint(0, len(words)), orders[topic])
            pair += b"".join(words)
        if pair not in seen:
            seen.add(pair)
            found.append(pair)
    table = np.frombuffer(b"".join(found), np.uint8).reshape(n, 2, length).astype(np.int64)
    return Sequences(table, np.arange(n) % 2, 2, 256)
