"""The registry on a package of its own, written to a temporary folder."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vistok.catalogue import CardError, Registry, UnknownSystem

CARD = 'CARD = Card(title="T", kind="control", site="S", paper="", claim="C")'
CLASS = "@dataclass(frozen=True)\nclass System:\n    share: float = 0.5\n"
FULL = '''
"""A docstring."""
from __future__ import annotations
import torch_that_is_not_installed  # reading the card must not run this
from vistok.catalogue import Card

CARD = Card(
    title="Title",
    kind="training-free",
    site="somewhere",
    paper="Someone, 2025 (arXiv 2501.00001)",
    repository="owner/name",
    mechanism=("attention", "query"),
    needs=("class-token attention", "question embeddings"),
    score="mean over heads",
    departures=("rounds " "up",),
    claim="It is "
    "better.",
)

class Helper:
    x: int = 1

@dataclass(frozen=True, kw_only=True)
class Base:
    layer: int = -2
    shared: str = "base"

@dataclass(frozen=True)
class System(Base):
    space: ClassVar[str] = "projected"
    depth: float = 9 / 24
    """Share of the
    depth."""
    layers: tuple[float, ...] = (9 / 24, -2)
    alpha: float | None = None
    parity: Literal["paper", "authors"] = "paper"
    "Whose behaviour."
    shared: str = "system"
    wrap: bool = False

    def select(self, evidence, keep): ...

class _Private: ...

def claim(trial): ...
'''
_numbers = itertools.count()


@pytest.fixture
def package(tmp_path: Path) -> Iterator[Callable[..., Registry]]:
    """``package({"reduce/some_file.py": text, ...})``: a registry over files of an importable package."""
    made = []

    def write(files: dict[str, str]) -> Registry:
        name = f"catalogue_fixture_{next(_numbers)}"
        for path, text in files.items():
            file = tmp_path / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            (file.parent / "__init__.py").touch()
            file.write_text(text)
        (tmp_path / name / "__init__.py").touch()
        made.append(name)
        return Registry(tmp_path / name, name)

    sys.path.insert(0, str(tmp_path))
    yield write
    sys.path.remove(str(tmp_path))
    for module in [m for m in sys.modules if m.partition(".")[0] in made]:
        del sys.modules[module]


IMPORTS = "from dataclasses import dataclass\nfrom vistok.catalogue import Card\n"


def test_card_is_read_from_text(package):
    card = package({"reduce/some_system.py": FULL}).card("some-system")
    assert (card.slug, card.family, card.title, card.kind) == ("some-system", "reduce", "Title", "training-free")
    assert card.needs == ("class-token attention", "question embeddings")
    assert card.departures == ("rounds up",)
    assert card.claim == "It is better."
    assert card.hyper == {
        "layer": -2,
        "shared": "system",
        "depth": 0.375,
        "layers": (0.375, -2),
        "alpha": None,
        "parity": "paper",
        "wrap": False,
    }


def test_hyper_parameters_keep_type_and_description(package):
    hyper = {h.name: h for h in package({"vit/some_system.py": FULL}).hyper_of("some-system")}
    assert hyper["depth"].type == "float"
    assert hyper["depth"].description == "Share of the depth."
    assert hyper["layers"].type == "tuple[float, ...]"
    assert hyper["parity"].type == "Literal['paper', 'authors']"
    assert hyper["parity"].description == "Whose behaviour."
    assert hyper["alpha"].description == ""


def test_annotated_card_and_qualified_call(package):
    text = 'CARD: Card = card.Card(title="T", kind="control", site="S", paper="", claim="C")\n' + CLASS
    assert package({"reduce/a.py": text}).card("a").title == "T"


def test_order_families_and_helpers(package):
    system = f"{CARD}\n{CLASS}"
    registry = package(
        {
            "vit/a.py": system,
            "reduce/z.py": system,
            "reduce/b_c.py": system,
            "reduce/_private.py": system,
            "reduce/base.py": "class Base: ...  # no CARD = ...",
            "vit/base.py": "class Base: ...",
            "unknown_family/d.py": system,
        }
    )
    assert registry.names() == ["b-c", "z", "a"]
    assert [card.slug for card in registry.systems("reduce")] == ["b-c", "z"]
    assert registry.systems("text") == []
    with pytest.raises(ValueError, match=r"family: got 'unknown_family', must be one of reduce"):
        registry.systems("unknown_family")


@pytest.mark.parametrize("written", ["some-system", "some_system", " Some-System "])
def test_names_are_forgiving(package, written):
    assert package({"reduce/some_system.py": FULL}).card(written).slug == "some-system"


@pytest.mark.parametrize(
    ("wrong", "near"), [("fastrvlm", "fastervlm"), ("faster", "fastervlm"), ("hipurne", "hiprune")]
)
def test_unknown_name_suggests_the_nearest(package, wrong, near):
    files = {f"reduce/{name}.py": f"{CARD}\n{CLASS}" for name in ("fastervlm", "hiprune", "holov")}
    with pytest.raises(UnknownSystem, match=rf"unknown system '{wrong}': did you mean {near}"):
        package(files).card(wrong)


@pytest.mark.parametrize("name", ["", "base", "../reduce/a", "qqqqqq"])
def test_unknown_name_without_a_near_one(package, name):
    registry = package({"reduce/a.py": f"{CARD}\n{CLASS}", "reduce/base.py": ""})
    with pytest.raises(UnknownSystem, match="`vistok systems` lists all"):
        registry.card(name)


def test_same_name_in_two_families(package):
    system = f"{CARD}\n{CLASS}"
    with pytest.raises(CardError, match=r"vit/a.py: .*reduce/a.py has the same name"):
        package({"reduce/a.py": system, "vit/a.py": system}).names()
    helper_first = package({"reduce/a.py": "", "vit/a.py": system})
    assert helper_first.card("a").family == "vit"
    helper_last = package({"reduce/a.py": system, "vit/a.py": ""})
    assert helper_last.card("a").family == "reduce"


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (
            2,
            f"x = 1\n{CARD.replace(chr(34) + 'T' + chr(34), 'name')}\n{CLASS}",
            r"Card\(title=...\) must be a literal, got name",
        ),
        (1, f"{CARD.replace('paper=', 'papers=')}\n{CLASS}", "Card has no argument 'papers'; it has title, kind"),
        (1, f"{CARD.replace('control', 'magic')}\n{CLASS}", "kind: got 'magic', must be one of training-free"),
        (1, f"{CARD.replace('control', 'trained')}\n{CLASS}", "the card must say its paper"),
        (1, f"{CARD[:-1]}, mechanism=('magic',))\n{CLASS}", "mechanism: got 'magic', must be one of transformation"),
        (1, f"{CARD[:-1]}, modality='smell')\n{CLASS}", "modality: got 'smell', must be one of image"),
        (
            1,
            f"{CARD.replace('control', 'trained').replace('paper=' + chr(34), 'paper=' + chr(34) + 'P')}\n{CLASS}",
            "the card must say its mechanism: transformation",
        ),
        (1, f"{CARD.replace('site=' + chr(34) + 'S', 'site=' + chr(34))}\n{CLASS}", "the card must say its site"),
        (1, f"{CARD.replace('site=' + chr(34) + 'S' + chr(34), 'site=3')}\n{CLASS}", "site: got 3, must be a string"),
        (1, f"{CARD[:-1]}, needs='one')\n{CLASS}", "needs: got 'one', must be a tuple of strings"),
        (1, f"{CARD.replace('title=', '')}\n{CLASS}", "Card takes keyword arguments only"),
        (1, f"CARD = make_card()\n{CLASS}", r"CARD must be written as CARD = Card\(...\)"),
        (1, CARD, "has a CARD but no public class"),
        (2, f"{CARD}\nclass System:\n    x: int = 1", "class System must be a dataclass"),
        (4, f"{CARD}\n@dataclass\nclass System:\n    x: int", r"System.x needs a default"),
        (4, f"{CARD}\n@dataclass\nclass System:\n    x: int = f(1)", r"System.x must be a literal, got f\(1\)"),
        (4, f"{CARD}\n@dataclass\nclass System:\n    x: float = 1 / 0", r"System.x must be a literal, got 1 / 0"),
        (3, f"{CARD}\n\nclass System(:\n", "not Python"),
    ],
)
def test_unreadable_card_names_file_and_line(package, line, text, message):
    with pytest.raises(CardError, match=rf"reduce/bad_one.py:{line}: .*{message}"):
        package({"reduce/bad_one.py": text}).systems()


@pytest.mark.parametrize(
    "odd",
    [
        'HELP = """\nCARD = 3\nclass Wrong:\n    y: int = 1\n"""',
        "def claim_like():\n    return '''\nclass Wrong: pass\n'''",
        "@cache\ndef helper():\n    return 1",
        "if True:\n    x = 1\nelse:\n    x = 2",
        "table = {\n'a': 1,\n}",
        "def helper(\n    x,\n) -> int:\n    return x",
    ],
)
@pytest.mark.parametrize("place", ["before", "between", "after"])
def test_reading_only_what_matters_reads_the_same(package, odd, place):
    """Files whose text cannot be cut line by line give the same card as plain ones."""
    parts = {"before": (odd, CARD, CLASS), "between": (CARD, odd, CLASS), "after": (CARD, CLASS, odd)}[place]
    registry = package({"reduce/a.py": "\n".join(parts) + "\ndef claim(trial): ...\n"})
    assert registry.card("a").title == "T"
    assert [(h.name, h.default) for h in registry.hyper_of("a")] == [("share", 0.5)]
    with pytest.raises(NameError):  # claim_of imports the module, which the fixture left without its imports
        registry.claim_of("a")


def test_one_bad_file_does_not_hide_a_good_card(package):
    registry = package({"reduce/bad.py": "CARD = 3", "reduce/good.py": f"{CARD}\n{CLASS}"})
    assert registry.card("good").slug == "good"


def test_create_takes_hyper_parameters(package):
    registry = package({"reduce/a_b.py": f"{IMPORTS}{CARD}\n{CLASS}"})
    assert registry.create("a-b").share == 0.5
    assert registry.create("a-b", share=0.25).share == 0.25
    assert registry.module_of("a-b") == f"{registry.package}.reduce.a_b"


def test_create_refuses_unknown_hyper_parameters(package):
    registry = package(
        {"reduce/a.py": f"{IMPORTS}{CARD}\n{CLASS}", "reduce/b.py": f"{IMPORTS}{CARD}\n@dataclass\nclass B: ..."}
    )
    with pytest.raises(ValueError, match=r"shar: not a hyper-parameter of a; it has share \(did you mean share\?\)"):
        registry.create("a", shar=1)
    with pytest.raises(ValueError, match="x: not a hyper-parameter of b; it has none"):
        registry.create("b", x=1)
    with pytest.raises(UnknownSystem):
        registry.create("c")


def test_claim_of(package):
    registry = package(
        {
            "reduce/a.py": f"{IMPORTS}{CARD}\n{CLASS}\ndef claim(trial):\n    return trial + 1\n",
            "reduce/b.py": f"{IMPORTS}{CARD}\n{CLASS}",
        }
    )
    assert registry.claim_of("a")(1) == 2
    with pytest.raises(CardError, match=r"reduce/b.py: defines no claim\(trial\)"):
        registry.claim_of("b")


def test_two_hundred_systems_are_listed_in_time(package, tmp_path):
    """The whole catalogue of the design (about 220 systems of the size aimed at) in under 0.3 s of reading."""
    body = "\n\n".join(
        f"def helper_{i}(x):\n    y = [x * {i} + j for j in range({i})]\n    return sum(y), y" for i in range(18)
    )
    registry = package({f"reduce/system_{i}.py": f"{FULL}\n{body}" for i in range(220)})
    start = time.process_time()
    assert len(registry.systems()) == 220
    assert time.process_time() - start < 0.9  # 0.25 s measured; the slack is for a busy machine
