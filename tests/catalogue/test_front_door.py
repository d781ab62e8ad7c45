"""``import vistok`` is light, and its names lead to where they live."""

from __future__ import annotations

import subprocess
import sys

import pytest

import vistok

HEAVY = {"torch", "transformers", "timm", "numpy", "matplotlib", "PIL"}


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    "code",
    [
        "import vistok",
        "import vistok; vistok.systems(); dir(vistok)",
        "import vistok; [vistok.card(c.slug) for c in vistok.systems()]",
        "import vistok.cli.app",
    ],
)
def test_no_heavy_import(code):
    loaded = run(f"{code}\nimport sys; print(*sorted(sys.modules))").split()
    assert "vistok" in loaded
    assert not HEAVY & set(loaded)


def test_names_are_those_of_the_rooms():
    from vistok import catalogue

    assert vistok.systems is catalogue.systems
    assert vistok.card is catalogue.card
    assert vistok.create is catalogue.create
    assert set(vistok.__all__) <= set(dir(vistok))


def test_the_card_function_survives_the_import_of_the_card_module():
    from vistok.catalogue.card import Card

    assert callable(vistok.catalogue.card)
    assert vistok.catalogue.Card is Card


def test_unknown_name_says_what_there_is():
    with pytest.raises(AttributeError, match="'vistok' has no attribute 'aply'; it has apply, card, create"):
        _ = vistok.aply


def test_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert version("vistok") == vistok.__version__
