"""A sweep as data: a TOML file says what to vary and expands to cells, each known by a hash of what it is.

    name = "quick"
    models = ["vistok-tiny"]
    methods = ["fastervlm", "holov", "aim-merge+fastv"]
    keep = [0.25, 0.11]
    tasks = ["scenes", "words"]
    n = 64

Also ``protocols`` (["single"]), ``precisions`` (["float32"]), ``seeds`` ([0]) and tables ``[hyper.NAME]`` with the
hyper-parameters of a method. The dense model, random and uniform tokens are in every sweep, and every method is held
against the dense model once with all tokens kept.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from vistok import catalogue
from vistok.host.keep import Keep, check_keep
from vistok.world import TASKS

from .corruptions import CORRUPTIONS
from .measure import DENSE

CONTROLS = ("random", "uniform")
IDENTITY = "identity"
"""The protocol of the check that a method with all tokens kept is the dense model."""
PROTOCOLS = ("single", "detail", "long-answer", *(f"{kind}-{level}" for kind in CORRUPTIONS for level in range(1, 6)))
"""How a picture is asked about: a question; one that hangs on little; a description; a question on a worse picture."""
PRECISIONS = ("float32", "bfloat16", "float16")
VERSION = 1
"""Of what a cell's rows mean; a new one runs all cells again."""


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    model: str
    method: str
    """A system, several with "+" between them, or "dense"."""
    keep: Keep
    task: str
    protocol: str
    precision: str
    n: int
    """Questions, one a picture."""
    seed: int
    hyper: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> str:
        """Its content as 20 hexadecimal digits; the same on every machine."""
        text = json.dumps([VERSION, asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]


@dataclass(frozen=True)
class Sweep:
    """What is varied. Raises ValueError for a value that means nothing, naming it."""

    name: str
    models: tuple[str, ...]
    methods: tuple[str, ...]
    keep: tuple[Keep, ...]
    tasks: tuple[str, ...]
    protocols: tuple[str, ...] = ("single",)
    precisions: tuple[str, ...] = ("float32",)
    seeds: tuple[int, ...] = (0,)
    n: int = 64
    hyper: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, known in (("tasks", (*TASKS, "all")), ("protocols", PROTOCOLS), ("precisions", PRECISIONS)):
            if wrong := [value for value in getattr(self, name) if value not in known]:
                raise ValueError(f"{name}: got {wrong[0]!r}, must be among {', '.join(known)}")
        for keep in self.keep:
            check_keep(keep)
        reducers = {card.slug for card in catalogue.methods("reduce")}
        for method in (*self.methods, *self.hyper):
            if wrong := [part for part in method.split("+") if part not in reducers]:
                raise ValueError(f"methods: got {wrong[0]!r}, must be a reducer (`vistok systems` lists them)")
        for method, values in self.hyper.items():
            names = [hyper.name for hyper in catalogue.hyper_of(method)]
            if wrong := [name for name in values if name not in names]:
                raise ValueError(f"hyper.{method}: got {wrong[0]!r}, must be among {', '.join(names)}")
        if self.n < 1:
            raise ValueError(f"n: got {self.n}, must be 1 or more")

    @classmethod
    def read(cls, path: Path) -> Sweep:
        """The sweep of a TOML file. Raises ValueError naming the file and the entry that is wrong or missing."""
        try:
            given = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: is no TOML file: {error}") from error
        given.setdefault("name", path.stem)
        known = {f.name: f for f in fields(cls)}
        if wrong := [name for name in given if name not in known]:
            raise ValueError(f"{path}: got {wrong[0]!r}, must be among {', '.join(known)}")
        if missing := [name for name in ("models", "methods", "keep", "tasks") if not given.get(name)]:
            raise ValueError(f"{path}: {missing[0]} is missing, must be a list")
        values: dict[str, Any] = {}
        for name, value in given.items():
            listed = str(known[name].type).startswith("tuple")
            if listed and not isinstance(value, list):
                raise ValueError(f"{path}: {name}: got {value!r}, must be a list")
            values[name] = tuple(value) if listed else value
        try:
            return cls(**values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error

    def cells(self) -> list[Cell]:
        """All measurements: per model, precision, task, protocol and seed the dense model first; checks before all."""
        methods = list(dict.fromkeys([*CONTROLS, *self.methods]))
        found = [
            Cell(model, method, 1.0, self.tasks[0], IDENTITY, precision, 4, self.seeds[0], self._hyper(method))
            for model in self.models
            for precision in self.precisions
            for method in methods
        ]
        for model in self.models:
            for precision in self.precisions:
                for task in self.tasks:
                    for protocol in self.protocols:
                        for seed in self.seeds:
                            where = (task, protocol, precision, self.n, seed)
                            found.append(Cell(model, DENSE, 1.0, *where))
                            found += [
                                Cell(model, method, keep, *where, self._hyper(method))
                                for keep in self.keep
                                for method in methods
                            ]
        return found

    def _hyper(self, method: str) -> tuple[tuple[str, Any], ...]:
        return tuple(sorted(self.hyper.get(method, {}).items()))
