"""Reads a system's card and hyper-parameters from the text of its file, so that no system has to be imported for it."""

from __future__ import annotations

import ast
import contextlib
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from vistok.catalogue.card import Card, Kind, Mechanism, Modality

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_FILLED_IN = ("slug", "family", "hyper")
_TUPLES = ("needs", "departures", "mechanism")
_CHOICES = {"kind": get_args(Kind), "mechanism": get_args(Mechanism), "modality": get_args(Modality)}


class CardError(ValueError):
    """A system's file does not state its card as the catalogue can read it. The message names file and line."""


@dataclass(frozen=True)
class Hyper:
    """One hyper-parameter, as the field of the system's class is written."""

    name: str
    type: str
    """The annotation's text, e.g. "tuple[int, ...]"."""
    default: Any
    description: str = ""
    """The string that follows the field, "" if there is none."""


@dataclass(frozen=True)
class Source:
    """What the text of one system's file says."""

    card: Card
    class_name: str
    """The system's class: the last public class of the file."""
    hyper: tuple[Hyper, ...]
    has_claim: bool
    """Whether the file defines ``claim(trial)``."""


def read(path: Path, *, slug: str, family: str, shown: str) -> Source | None:
    """The card in the file at ``path``, or None where the file states none (a helper of the family).

    ``shown`` is the file's name in messages. Raises CardError where there is a card that cannot be read.
    """
    text = path.read_text(encoding="utf-8")
    if "CARD" not in text:
        return None
    return _Reader(text, shown).source(slug, family)


class _Reader:
    def __init__(self, text: str, shown: str) -> None:
        self.shown = shown
        try:
            self.body = _parse(text)
        except SyntaxError as error:
            raise CardError(f"{shown}:{error.lineno}: not Python: {error.msg}") from error
        self.classes = {node.name: node for node in self.body if isinstance(node, ast.ClassDef)}

    def source(self, slug: str, family: str) -> Source | None:
        call = self._card_call()
        if call is None:
            return None
        public = [name for name in self.classes if not name.startswith("_")]
        if not public:
            raise self._error(call, "has a CARD but no public class that carries the system")
        hyper = tuple(self._hyper(self.classes[public[-1]]).values())
        card = self._card(call, slug, family, {h.name: h.default for h in hyper})
        has_claim = any(isinstance(node, ast.FunctionDef) and node.name == "claim" for node in self.body)
        return Source(card, public[-1], hyper, has_claim)

    def _error(self, node: ast.expr | ast.stmt, message: str) -> CardError:
        return CardError(f"{self.shown}:{node.lineno}: {message}")

    def _card_call(self) -> ast.Call | None:
        """The call in ``CARD = Card(...)`` or ``CARD: Card = Card(...)``."""
        for node in self.body:
            match node:
                case ast.Assign(targets=[ast.Name(id="CARD")], value=value):
                    pass
                case ast.AnnAssign(target=ast.Name(id="CARD"), value=value):
                    pass
                case _:
                    continue
            match value:
                case ast.Call(func=ast.Name(id="Card") | ast.Attribute(attr="Card")):
                    return value
            raise self._error(node, "CARD must be written as CARD = Card(...)")
        return None

    def _card(self, call: ast.Call, slug: str, family: str, hyper: dict[str, Any]) -> Card:
        if call.args:
            raise self._error(call.args[0], "Card takes keyword arguments only, e.g. title=...")
        known = [f.name for f in fields(Card) if f.name not in _FILLED_IN]
        given: dict[str, Any] = {}
        for keyword in call.keywords:
            if keyword.arg not in known:
                raise self._error(keyword.value, f"Card has no argument {keyword.arg!r}; it has {', '.join(known)}")
            given[keyword.arg] = self._literal(keyword.value, f"Card({keyword.arg}=...)")
            wanted = tuple if keyword.arg in _TUPLES else str
            strings = given[keyword.arg] if wanted is tuple else (given[keyword.arg],)
            if not isinstance(given[keyword.arg], wanted) or not all(isinstance(s, str) for s in strings):
                right = "a tuple of strings" if wanted is tuple else "a string"
                raise self._error(keyword.value, f"{keyword.arg}: got {given[keyword.arg]!r}, must be {right}")
        tags = {"kind": (given.get("kind"),), "modality": (given.get("modality", "image"),)}
        for name, values in {**tags, "mechanism": given.get("mechanism", ())}.items():
            for value in values:
                if value not in _CHOICES[name]:
                    raise self._error(call, f"{name}: got {value!r}, must be one of {', '.join(_CHOICES[name])}")
        if missing := [name for name in ("title", "site", "claim") if not given.get(name)]:
            raise self._error(call, f"the card must say its {', '.join(missing)}")
        given.setdefault("paper", "")
        if not given["paper"] and given["kind"] not in ("control", "measurement"):
            raise self._error(call, "the card must say its paper (only a control has none)")
        if not given.get("mechanism") and given["kind"] not in ("control", "measurement"):
            raise self._error(call, f"the card must say its mechanism: {', '.join(_CHOICES['mechanism'])}")
        return Card(**given, slug=slug, family=family, hyper=hyper)

    def _hyper(self, node: ast.ClassDef) -> dict[str, Hyper]:
        """Fields of a dataclass by name, those of its bases in the same file first."""
        if not any(ast.unparse(d).split("(")[0].rpartition(".")[2] == "dataclass" for d in node.decorator_list):
            raise self._error(node, f"class {node.name} must be a dataclass: its fields are the hyper-parameters")
        found: dict[str, Hyper] = {}
        for base in reversed(node.bases):
            if isinstance(base, ast.Name) and base.id in self.classes:
                found |= self._hyper(self.classes[base.id])
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            match field:
                case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=value):
                    kind = ast.unparse(annotation)
                case _:
                    continue
            if "ClassVar" in kind or name.startswith("_"):
                continue
            if value is None:
                raise self._error(field, f"{node.name}.{name} needs a default: the value its paper uses")
            match after:
                case ast.Expr(value=ast.Constant(value=str() as text)):
                    description = " ".join(text.split())
                case _:
                    description = ""
            found[name] = Hyper(name, kind, self._literal(value, f"{node.name}.{name}"), description)
        return found

    def _literal(self, node: ast.expr, what: str) -> Any:
        try:
            return _value(node)
        except (ValueError, ArithmeticError) as error:
            text = ast.unparse(node)
            raise self._error(
                node, f"{what} must be a literal, got {text if len(text) <= 60 else text[:57] + '...'}"
            ) from error


_STATEMENT = re.compile(r"\n(?=[A-Za-z_@\"'#])")
_METHOD = re.compile(r"\n[ \t]+(?:def |async def |@)")


def _parse(text: str) -> list[ast.stmt]:
    """The statements of a module that matter here, at their line numbers; SyntaxError if it is not Python.

    Parsing is what listing hundreds of systems spends its time on, and most of a file is the bodies of functions. So
    they, and all other statements that begin at a line's start, are blanked first: a quarter of the time. Where that
    cannot be done line by line (a string of several lines that goes on at a line's start) the whole text is parsed.
    """
    pieces = _STATEMENT.split(text)
    if not any(piece.count(quotes) % 2 for piece in pieces for quotes in ('"""', "'''")):
        with contextlib.suppress(SyntaxError):
            return ast.parse("\n".join(map(_without_bodies, pieces))).body
    return ast.parse(text).body


def _without_bodies(piece: str) -> str:
    """One statement of a module with as many lines, without the bodies of functions; blank if it is of no interest."""
    if piece.startswith("CARD"):
        return piece
    kept = ""
    if piece.startswith(("class ", "@")):
        method = _METHOD.search(piece)
        kept = piece[: method.start()] if method else piece
    elif piece.startswith("def claim("):
        kept = "def claim(): ..."
    return kept + "\n" * (piece.count("\n") - kept.count("\n"))


def _value(node: ast.expr) -> Any:
    """The value of a literal; arithmetic on numbers (9 / 24) counts as one. ValueError at anything else."""
    match node:
        case ast.Tuple(elts=elements):
            return tuple(_value(element) for element in elements)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            numbers = _value(left), _value(right)
            if not all(isinstance(n, int | float) for n in numbers):
                raise ValueError("arithmetic on something else than numbers")
            return _ARITHMETIC[type(op)](*numbers)
        case _:
            return ast.literal_eval(node)
