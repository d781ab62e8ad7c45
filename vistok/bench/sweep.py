"""A sweep as data: a TOML file says what to vary and expands to cells, each known by a hash of what it is.

    name = "quick"
    models = ["vistok-tiny"]
    methods = ["fastervlm", "holov", "aim-merge+fastv"]
    keep = [0.25, 0.11]
    tasks = ["scenes", "words"]
    n = 64

Also ``protocols`` (["single"]), ``precisions`` (["float32"]), ``weights`` and ``caches`` (["none"]: as the precision
is; all combinations with ``keep`` are measured), ``seeds`` ([0]), ``probabilities`` (false: whether the probability
of answers is measured, which takes twice the time), tables ``[hyper.NAME]`` with the hyper-parameters of a method, and
``[data.NAME]`` with pictures and questions of your own, asked as the task NAME (docs/data.md).

A method is the name of a system, several with "+" between them, or one whose steps are swapped
(``vistok.host.recipe``): "holov:select=max_sum:merge=nearest". The dense model, random and uniform tokens are in every
sweep, and every method is held against the dense model once with all tokens kept.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

from vistok import catalogue
from vistok.host.keep import Keep, check_keep
from vistok.world import TASKS

from .compression import CACHES
from .corruptions import CORRUPTIONS
from .data import Source
from .measure import DENSE

CONTROLS = ("random", "uniform")
IDENTITY = "identity"
"""The protocol of the check that a method with all tokens kept is the dense model."""
PROTOCOLS = (
    "single", "detail", "long-answer", "reuse-first", "reselect", "two-pictures",
    *(f"{kind}-{level}" for kind in CORRUPTIONS for level in range(1, 6)),
)  # fmt: skip
"""How a picture is asked about: a question; one that hangs on little; a description; the second question of a dialogue,
with the tokens chosen for the first one or anew (the dense model keeps all); a question about one of two pictures; a
question on a worse picture."""
PRECISIONS = ("float32", "bfloat16", "float16")
WEIGHTS = ("none", "int8", "int4")
VERSION = 2
"""Of what a cell's rows mean; a new one runs all cells again."""


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    model: str
    method: str
    """As in a sweep, or "dense"."""
    keep: Keep
    task: str
    protocol: str
    precision: str
    n: int
    """Pictures, one question each."""
    seed: int
    hyper: tuple[tuple[str, Any], ...] = ()
    weights: str = "none"
    cache: str = "none"
    probabilities: bool = False
    data: str = ""
    """Digest of the user's own pictures and questions; empty for the world."""
    source: Source | None = field(default=None, compare=False)
    """Where these are; not part of what the cell is."""

    @property
    def key(self) -> str:
        """Its content as 20 hexadecimal digits; the same on every machine."""
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "source"}
        return hashlib.sha256(json.dumps([VERSION, content], sort_keys=True).encode()).hexdigest()[:20]


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
    weights: tuple[str, ...] = ("none",)
    caches: tuple[str, ...] = ("none",)
    seeds: tuple[int, ...] = (0,)
    n: int = 64
    probabilities: bool = False
    hyper: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("models", "keep", "tasks"):
            if not getattr(self, name):
                raise ValueError(f"{name}: got none, must be at least one")
        known = {
            "tasks": (*TASKS, "all", *self.data),
            "protocols": PROTOCOLS,
            "precisions": PRECISIONS,
            "weights": WEIGHTS,
            "caches": tuple(CACHES),
        }
        for name, values in known.items():
            if wrong := [value for value in getattr(self, name) if value not in values]:
                raise ValueError(f"{name}: got {wrong[0]!r}, must be among {', '.join(values)}")
        for keep in self.keep:
            check_keep(keep)
        reducers = {card.slug for card in catalogue.methods("reduce")}
        for method in (*self.methods, *self.hyper):
            if wrong := [part for part, _ in parts_of(method) if part not in reducers]:
                raise ValueError(f"methods: got {wrong[0]!r}, must be a reducer (`vistok systems` lists them)")
        for method, given in self.hyper.items():
            names = [hyper.name for hyper in catalogue.hyper_of(method)]
            if wrong := [name for name in given if name not in names]:
                raise ValueError(f"hyper.{method}: got {wrong[0]!r}, must be among {', '.join(names)}")
        if wrong := [name for name in self.data if name in (*TASKS, "all")]:
            raise ValueError(f"data: got {wrong[0]!r}, must not be the name of a task of the world")
        if self.n < 1:
            raise ValueError(f"n: got {self.n}, must be 1 or more")

    @classmethod
    def read(cls, path: Path) -> Sweep:
        """The sweep of a TOML file. Raises ValueError naming the file and the entry that is wrong or missing."""
        given = entries_of(path)
        try:
            return cls.of(given)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Sweep:
        """The sweep of the entries of a file. Raises ValueError naming the one that is wrong or missing."""
        known = {f.name: f for f in fields(cls)}
        if wrong := [name for name in given if name not in known]:
            raise ValueError(f"got {wrong[0]!r}, must be among {', '.join(known)}")
        if missing := [name for name in ("models", "methods", "keep", "tasks") if name not in given]:
            raise ValueError(f"{missing[0]} is missing, must be a list")
        values: dict[str, Any] = {}
        for name, value in given.items():
            listed = str(known[name].type).startswith("tuple")
            if listed and not isinstance(value, list):
                raise ValueError(f"{name}: got {value!r}, must be a list")
            values[name] = tuple(value) if listed else value
        return cls(**values)

    def cells(self) -> list[Cell]:
        """All measurements: checks first, then by place, of each the dense model first."""
        methods = list(dict.fromkeys([*CONTROLS, *self.methods]))
        sources = {name: Source.of(name, table) for name, table in self.data.items()}
        digests = {name: source.digest() for name, source in sources.items()}

        def theirs(task: str) -> dict[str, Any]:
            return {"data": digests.get(task, ""), "source": sources.get(task)}

        compressed = list(product(self.models, self.precisions, self.weights, self.caches))
        found = []
        for model, precision, weights, cache in compressed:
            task = self.tasks[0]
            how: dict[str, Any] = {"weights": weights, "cache": cache, **theirs(task)}
            found += [
                Cell(model, method, 1.0, task, IDENTITY, precision, 4, self.seeds[0], self._hyper(method), **how)
                for method in methods
            ]
        for (model, precision, weights, cache), task, protocol, seed in product(
            compressed, self.tasks, self.protocols, self.seeds
        ):
            how = {"weights": weights, "cache": cache, "probabilities": self.probabilities, **theirs(task)}
            asked = (task, protocol, precision, self.n, seed)
            found.append(Cell(model, DENSE, 1.0, *asked, **how))
            found += [
                Cell(model, method, keep, *asked, self._hyper(method), **how)
                for keep in self.keep
                for method in methods
            ]
        return found

    def _hyper(self, method: str) -> tuple[tuple[str, Any], ...]:
        return tuple(sorted(self.hyper.get(method.partition(":")[0], {}).items()))


def parts_of(method: str) -> list[tuple[str, dict[str, str]]]:
    """The systems that a method names, each with the steps that are swapped in it.

    >>> parts_of("aim-merge+holov:select=topk:merge=nearest")
    [('aim-merge', {}), ('holov', {'select': 'topk', 'merge': 'nearest'})]
    """
    found = []
    for part in method.split("+"):
        name, *steps = part.split(":")
        pairs = [step.partition("=") for step in steps]
        if wrong := [step for step, sign, value in pairs if not sign or not value]:
            raise ValueError(f"methods: got {method!r}, must say {wrong[0]}=STEP")
        found.append((name, {step: value for step, _, value in pairs}))
    return found


def entries_of(path: Path) -> dict[str, Any]:
    """What a TOML file says; its own name is the sweep's where it gives none. Raises ValueError."""
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is no TOML file: {error}") from error
    return {"name": path.stem, **given}
