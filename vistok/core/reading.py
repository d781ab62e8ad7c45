"""How far a text that was read is from what is written: edit distance, and the rates that are made of it."""

from __future__ import annotations

from collections.abc import Sequence


def edit_distance(a: Sequence[object], b: Sequence[object]) -> int:
    """Fewest insertions, deletions and replacements that turn ``a`` into ``b`` (Levenshtein); of texts or words."""
    if len(a) < len(b):
        a, b = b, a
    row = list(range(len(b) + 1))
    for i, one in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (one != other))
    return row[-1]


def similarity(a: str, b: str) -> float:
    """1 - edit distance over the longer length, in [0, 1] and symmetric; 1 only for equal texts (TokBench's T-NED)."""
    return 1 - edit_distance(a, b) / max(len(a), len(b), 1)


def character_error(read: str, written: str) -> float:
    """Edit distance over the length of what is written; above 1 where much was made up. An empty text counts as 1."""
    return edit_distance(read, written) / max(len(written), 1)


def word_error(read: str, written: str) -> float:
    """The same by words between spaces. Scripts without spaces have no words: use ``character_error`` for them."""
    return edit_distance(read.split(), written.split()) / max(len(written.split()), 1)
