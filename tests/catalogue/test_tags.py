"""Queries and the map against a plain filter, and what cards say of their systems against what those ask for."""

from __future__ import annotations

import itertools

import pytest

import vistok
from vistok import catalogue
from vistok.catalogue.tags import TAGS, grid, query, values_of

CARDS = catalogue.systems()
ATTENTION = {
    *("cls_attention", "wide_cls_attention", "cls_logits", "received_attention", "given_attention"),
    *("encoder_attention", "llm_attention", "llm_received", "llm_importance"),
}


@pytest.mark.parametrize(("a", "b"), list(itertools.combinations(TAGS, 2)))
def test_query_is_a_filter(a, b):
    for x, y in itertools.product(TAGS[a], TAGS[b]):
        plain = [c for c in CARDS if x in values_of(c, a) and y in values_of(c, b)]
        assert query(**{a: x, b: y}) == plain
    assert query(**{a: None}) == CARDS


@pytest.mark.parametrize(("rows", "columns"), list(itertools.permutations(TAGS, 2)))
def test_map_has_every_cell_and_every_tagged_system(rows, columns):
    cells = grid(CARDS, rows, columns)
    assert list(cells) == list(TAGS[rows]) and all(list(found) == list(TAGS[columns]) for found in cells.values())
    for row, found in cells.items():
        for column, slugs in found.items():
            assert slugs == [c.slug for c in query(**{rows: row, columns: column})]
    listed = {slug for found in cells.values() for slugs in found.values() for slug in slugs}
    assert listed == {c.slug for c in CARDS if values_of(c, rows) and values_of(c, columns)}


@pytest.mark.parametrize("asked", [{"kind": "free"}, {"mechanism": "magic"}, {"site": "x"}])
def test_what_does_not_exist_is_said(asked):
    (name,) = asked
    with pytest.raises(ValueError, match=f"{'tag' if name == 'site' else name}: got"):
        query(**asked)
    with pytest.raises(ValueError, match="tag: got 'site'"):
        values_of(CARDS[0], "site")


@pytest.mark.parametrize("name", [c.slug for c in catalogue.methods("reduce") if c.kind != "control"])
def test_mechanism_is_what_the_reducer_asks_for(name):
    """A method whose card is silent on attention, or on the question, must not be given them; and the reverse."""
    reducer, mechanism = vistok.create(name), vistok.card(name).mechanism
    asks = {*reducer.needs, *reducer.layer_needs}
    reads_text = "text" in asks or reducer.layer_needs.get("llm_attention") in ("text", "last")
    assert ("attention" in mechanism) == bool(asks & ATTENTION)
    assert ("query" in mechanism) == reads_text
