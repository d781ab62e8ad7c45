"""Entry points: one picture from a seed, and streams of pictures that never share one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import index
from typing import SupportsIndex

from . import chart, form, scene, text
from .draw import Dice
from .types import Drawn, Picture
from .vocabulary import TASKS

SMALLEST, LARGEST = 64, 672
MOST_QUESTIONS = 16
SPLITS = ("train", "test")
_WRITTEN: dict[str, Callable[[Dice, Dice, int, int], Drawn]] = {
    "words": text.make,
    "charts": chart.make,
    "forms": form.make,
}


def _whole_number(name: str, value: SupportsIndex, low: int, high: int) -> int:
    """The value as an int; ValueError, naming the argument, unless it is a whole number in low .. high."""
    try:
        number = index(value)
    except TypeError:
        number = low - 1
    if isinstance(value, bool) or not low <= number <= high:
        raise ValueError(f"{name}: got {value!r}; must be a whole number from {low} to {high}")
    return number


def check_size(size: int) -> int:
    """The side of a picture; ValueError outside 64 .. 672."""
    return _whole_number("size", size, SMALLEST, LARGEST)


def make(task: str, seed: int, size: int = 112, questions: int = 8, max_objects: int = 5) -> Picture:
    """One picture with its truth.

    task: one of ``TASKS``. seed: 0 .. 2**64 - 1; the same (task, seed, size) gives the same bytes with the
    pinned Pillow (another FreeType may shade the edge of a letter differently).
    size: side in pixels, 64 .. 672; one seed shows the same content at every size. questions: how many to ask, 0 .. 16
    (fewer come back only where a picture has no more different ones). max_objects: scenes hold 1 .. max_objects
    objects, at most 8; other tasks ignore it.
    Seeds below 2**63 belong to the "train" streams of ``sample``, the others to "test".
    Raises ValueError, naming the argument.
    """
    if task not in TASKS:
        raise ValueError(f"task: {task!r} is unknown; must be one of {', '.join(TASKS)}")
    seed = _whole_number("seed", seed, 0, 2**64 - 1)
    size = check_size(size)
    questions = _whole_number("questions", questions, 0, MOST_QUESTIONS)
    max_objects = _whole_number("max_objects", max_objects, 1, 8)
    kind = TASKS.index(task)
    # Two streams, so that what is shown does not depend on what is asked.
    dice, ask = Dice(seed, 2 * kind), Dice(seed, 2 * kind + 1)
    if task == "scenes":
        image, asked, things, caption = scene.make(dice, ask, size, questions, max_objects)
    else:
        image, asked, things, caption = _WRITTEN[task](dice, ask, size, questions)
    return Picture(image, asked, things, caption, task, seed)


def derive_seed(seed: int, number: int, split: str = "train") -> int:
    """The 64-bit seed of picture ``number`` of a stream: bit 63 = split, bits 32..62 = seed, bits 0..31 = number.

    So streams of different seed or split never share a picture: "test" lies in 2**63 .. 2**64 - 1, "train" below.
    """
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is unknown; must be one of {', '.join(SPLITS)}")
    seed = _whole_number("seed", seed, 0, 2**31 - 1)
    number = _whole_number("number", number, 0, 2**32 - 1)
    return (SPLITS.index(split) << 63) | (seed << 32) | number


def sample(
    task: str,
    n: int,
    seed: int = 0,
    size: int = 112,
    *,
    split: str = "train",
    questions: int = 8,
    max_objects: int = 5,
    start: int = 0,
) -> Iterator[Picture]:
    """Yields n pictures with distinct seeds (see ``derive_seed``), from number ``start`` of the stream on.

    task "all" takes the tasks in turn. Arguments are checked at the call, not at the first picture.
    """
    if task != "all" and task not in TASKS:
        raise ValueError(f"task: {task!r} is unknown; must be 'all' or one of {', '.join(TASKS)}")
    n = _whole_number("n", n, 0, 2**32 - 1)
    check_size(size)
    _whole_number("questions", questions, 0, MOST_QUESTIONS)
    _whole_number("max_objects", max_objects, 1, 8)
    derive_seed(seed, start, split)
    derive_seed(seed, start + max(n - 1, 0), split)

    def stream() -> Iterator[Picture]:
        for number in range(start, start + n):
            which = TASKS[number % len(TASKS)] if task == "all" else task
            yield make(which, derive_seed(seed, number, split), size, questions, max_objects)

    return stream()
