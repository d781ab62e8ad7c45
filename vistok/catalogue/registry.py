"""Finds a system by the name of its file, reads its card without importing it, and builds it on demand."""

from __future__ import annotations

import difflib
import importlib
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from vistok.catalogue.card import Card, Claim
from vistok.catalogue.source import CardError, Hyper, Source, read

FAMILIES = (
    "reduce",
    "vit",
    "video",
    "connect",
    "attend",
    "tokenize",
    "generate",
    "pretrain",
    "ground",
    "segment",
    "text",
)


class UnknownSystem(LookupError):
    """No system has that name; the message suggests the nearest ones."""


class Registry:
    """The systems in the family folders under ``root``; ``package`` is the name that ``root`` is imported by.

    A system is a file ``<family>/<slug_with_underscores>.py`` that states a ``CARD``. Files without one, and files
    whose name begins with an underscore, belong to the family itself. Files are read when they are asked for, once.
    """

    def __init__(self, root: Path, package: str) -> None:
        self.root = root
        self.package = package
        self._read: dict[str, Source | None] = {}

    def names(self) -> list[str]:
        """Slugs of all systems, by family in the order of ``FAMILIES``, then by name."""
        return [slug for slug in self._paths if self._source(slug)]

    def systems(self, family: str | None = None) -> list[Card]:
        """Cards of all systems, or of those of one family. Raises ValueError for a family that does not exist."""
        if family is not None and family not in FAMILIES:
            raise ValueError(f"family: got {family!r}, must be one of {', '.join(FAMILIES)}")
        wanted = [slug for slug, path in self._paths.items() if family in (None, path.parent.name)]
        return [source.card for slug in wanted if (source := self._source(slug))]

    def methods(self, family: str) -> list[Card]:
        """Cards of the systems of a family that can be put into a model: all but its measurements."""
        return [card for card in self.systems(family) if card.kind != "measurement"]

    def card(self, name: str) -> Card:
        """The card of the system ``name`` (its slug; underscores and capitals are forgiven). Raises UnknownSystem."""
        return self.source(name).card

    def hyper_of(self, name: str) -> tuple[Hyper, ...]:
        """The hyper-parameters of the system ``name`` with type, default and description. Raises UnknownSystem."""
        return self.source(name).hyper

    def create(self, name: str, **hyper: Any) -> Any:
        """An instance of the system ``name``; ``hyper`` overrides the defaults of its paper.

        Raises UnknownSystem, or ValueError for a hyper-parameter that the system does not have.
        """
        source = self.source(name)
        system = getattr(self._module(source.card), source.class_name)
        known = [field.name for field in fields(system) if field.init]
        if unknown := [key for key in hyper if key not in known]:
            near = difflib.get_close_matches(unknown[0], known, n=1)
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(
                f"{unknown[0]}: not a hyper-parameter of {source.card.slug}; {has}"
                + (f" (did you mean {near[0]}?)" if near else "")
            )
        return system(**hyper)

    def create_seeded(self, name: str, seed: int | None, **hyper: Any) -> Any:
        """As ``create``; where the system draws, by ``seed`` (None: as it does by itself)."""
        drawn = seed is not None and any(known.name == "seed" for known in self.hyper_of(name))
        return self.create(name, **({"seed": seed} if drawn else {}) | hyper)

    def claim_of(self, name: str) -> Claim:
        """The function that measures the claim of ``name``. Raises UnknownSystem, or CardError if there is none."""
        source = self.source(name)
        if not source.has_claim:
            path = self._paths[source.card.slug]
            raise CardError(f"{self._shown(path)}: defines no claim(trial) to measure its claim")
        return cast(Claim, self._module(source.card).claim)

    def source(self, name: str) -> Source:
        """All that the file of ``name`` says. Raises UnknownSystem."""
        found = self._source(_slug(name)) if _slug(name) in self._paths else None
        if found is None:
            raise UnknownSystem(f"unknown system {name!r}: {self._suggestion(_slug(name))}")
        return found

    def module_of(self, name: str) -> str:
        """The dotted name of the module of ``name``, e.g. "vistok.reduce.fastervlm". Raises UnknownSystem."""
        card = self.card(name)
        return f"{self.package}.{card.family}.{card.slug.replace('-', '_')}"

    @cached_property
    def _paths(self) -> dict[str, Path]:
        paths: dict[str, Path] = {}
        for family in FAMILIES:
            for path in sorted((self.root / family).glob("[!_]*.py")):
                slug = _slug(path.stem)
                if slug not in paths:
                    paths[slug] = path
                elif self._read_file(slug, paths[slug]) and self._read_file(slug, path):
                    raise CardError(f"{self._shown(path)}: {self._shown(paths[slug])} has the same name already")
                elif self._read_file(slug, path):
                    paths[slug] = path
        return paths

    def _source(self, slug: str) -> Source | None:
        if slug not in self._read:
            self._read[slug] = self._read_file(slug, self._paths[slug])
        return self._read[slug]

    def _read_file(self, slug: str, path: Path) -> Source | None:
        return read(path, slug=slug, family=path.parent.name, shown=self._shown(path))

    def _shown(self, path: Path) -> str:
        return f"{self.package}/{path.relative_to(self.root).as_posix()}"

    def _module(self, card: Card) -> Any:
        return importlib.import_module(self.module_of(card.slug))

    def _suggestion(self, slug: str) -> str:
        names = self.names()
        near = difflib.get_close_matches(slug, names, n=3, cutoff=0.55)
        near += [name for name in names if slug and slug in name and name not in near][:3]
        if not near:
            return "`vistok systems` lists all"
        return f"did you mean {' or '.join(near)}? `vistok systems` lists all"


def _slug(name: str) -> str:
    return name.strip().lower().replace("_", "-")


_registry = Registry(Path(__file__).parents[1], "vistok")
names = _registry.names
systems = _registry.systems
methods = _registry.methods
card = _registry.card
hyper_of = _registry.hyper_of
create = _registry.create
create_seeded = _registry.create_seeded
claim_of = _registry.claim_of
module_of = _registry.module_of
