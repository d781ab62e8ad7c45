"""Every system of this checkout: its card can be read, tells what it must, and its class is what the card says."""

from __future__ import annotations

import importlib
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

import vistok
from vistok import catalogue
from vistok.catalogue.registry import FAMILIES

NAMES = catalogue.names()
FIRST = {
    *("fastervlm", "vtc-cls", "fopru", "holov", "hiprune", "mmtok", "todre", "apet", "visiondrop"),
    *("recoverable-compression", "random", "uniform", "pool"),
}


def test_the_first_systems_are_there():
    assert set(NAMES) >= FIRST


def test_every_file_that_states_a_card_is_found():
    root = Path(vistok.__file__).parent
    files = [p for f in FAMILIES for p in (root / f).glob("[!_]*.py") if "\nCARD" in p.read_text()]
    assert sorted(p.stem.replace("_", "-") for p in files) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_card_is_complete(name):
    card = vistok.card(name)
    assert card.slug == name
    assert card.title and card.site and card.claim
    assert card.paper or card.kind in ("control", "measurement")
    assert card.repository == "" or card.repository.count("/") == 1
    assert callable(catalogue.claim_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_defaults_read_from_the_text_are_those_of_the_class(name):
    """Also where a base class in another file brings fields: those must be stated again, or the card misses them."""
    made = vistok.create(name)
    actual = {f.name: getattr(made, f.name) for f in fields(made) if f.init}
    assert vistok.card(name).hyper == actual
    assert all(f.default is not MISSING for f in fields(made) if f.init)


@pytest.mark.parametrize("name", NAMES)
def test_module_states_the_same_card(name):
    """The card that the module builds when it runs differs only in what the registry fills in."""
    stated = importlib.import_module(catalogue.module_of(name)).CARD
    read = vistok.card(name)
    for field in (
        "title",
        "kind",
        "site",
        "paper",
        "repository",
        "needs",
        "mechanism",
        "modality",
        "score",
        "select",
        "claim",
        "departures",
    ):
        assert getattr(stated, field) == getattr(read, field)
