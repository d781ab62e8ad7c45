"""Systems by what their cards say: a filter, and the map of what there is and what is missing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

from vistok.catalogue.card import Card, Kind, Mechanism, Modality
from vistok.catalogue.registry import FAMILIES, systems

TAGS: dict[str, tuple[str, ...]] = {
    "family": FAMILIES,
    "kind": get_args(Kind),
    "mechanism": get_args(Mechanism),
    "modality": get_args(Modality),
}
"""What systems can be filtered and grouped by, and the values of each."""


def values_of(card: Card, tag: str) -> tuple[str, ...]:
    """The values of ``tag`` that ``card`` carries: one, or for "mechanism" any number. ValueError for another tag."""
    if tag not in TAGS:
        raise ValueError(f"tag: got {tag!r}, must be one of {', '.join(TAGS)}")
    value = getattr(card, tag)
    return value if isinstance(value, tuple) else (value,)


def query(**tags: str | None) -> list[Card]:
    """The systems that carry all of ``tags``, for example ``query(mechanism="similarity", modality="image")``.

    A tag that is None does not matter. Raises ValueError for a tag or a value that does not exist.
    """
    asked = {tag: value for tag, value in tags.items() if value is not None}
    for tag, value in asked.items():
        if tag not in TAGS:
            raise ValueError(f"tag: got {tag!r}, must be one of {', '.join(TAGS)}")
        if value not in TAGS[tag]:
            raise ValueError(f"{tag}: got {value!r}, must be one of {', '.join(TAGS[tag])}")
    return [card for card in systems() if all(value in values_of(card, tag) for tag, value in asked.items())]


def grid(cards: Iterable[Card], rows: str = "mechanism", columns: str = "modality") -> dict[str, dict[str, list[str]]]:
    """Slugs by two tags: {row: {column: [slug, ...]}} with every value of both, so that an empty list is a gap.

    A system of several mechanisms stands in the cell of each; one of none (a control) in no cell.
    """
    cells: dict[str, dict[str, list[str]]] = {row: {column: [] for column in TAGS[columns]} for row in TAGS[rows]}
    for card in cards:
        for row in values_of(card, rows):
            for column in values_of(card, columns):
                cells[row][column].append(card.slug)
    return cells
