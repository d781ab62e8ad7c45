"""What no other setting beats: at least as accurate, and at most as costly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any


def front(rows: Sequence[Mapping[str, Any]], cost: str, gain: str = "accuracy") -> list[Mapping[str, Any]]:
    """The rows none of which has another with as much ``gain`` or more for as much ``cost`` or less, better in one of
    them; the cheapest first. Rows that are equal in both stay together; rows where one is not known (None) are left
    out. Only rows of one place may be compared."""
    known = [row for row in rows if row[cost] is not None and row[gain] is not None]
    found: list[Mapping[str, Any]] = []
    for _, group in groupby(sorted(known, key=lambda row: row[cost]), key=lambda row: row[cost]):
        same = list(group)
        best = max(row[gain] for row in same)
        if not found or best > found[-1][gain]:
            found += [row for row in same if row[gain] == best]
    return found
