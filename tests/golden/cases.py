"""Conformance vectors: a case is a file, an adapter turns its inputs into a call, a rule says how to compare.

The folder is named by ``VISTOK_GOLDEN``, by default ``../shared/golden`` from the project's root. A case is
``<family>/<slug>-<case>.safetensors`` with tensors ``in.*`` and ``out.*``; see the folder's README for its metadata.
An adapter is ``adapters/<slug_with_underscores>.py`` with ``run(case) -> dict of outputs by name``. It may assume
nothing of sizes and seeds. Its ``FINDINGS``, {case name: reason}, names the vectors that we rightly do not match: they
must fail, and say why. Its ``WAITS``, beginnings of case names, are parts of the system that are not here yet: those
cases wait as if it had no adapter. Cases whose inputs are fields of Evidence need no adapter: ``adapters/evidence.py``
is theirs.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vistok import catalogue
from vistok.host.reducer import Evidence

ROOT = Path(os.environ.get("VISTOK_GOLDEN") or Path(__file__).parents[2] / ".." / "shared" / "golden")
ADAPTERS = Path(__file__).parent / "adapters"
EVIDENCE = {f.name for f in fields(Evidence)}


@dataclass(frozen=True)
class Case:
    """One recorded call of the authors' code; tensors are read when they are asked for."""

    path: Path
    metadata: dict[str, str]
    names: tuple[str, ...]

    @classmethod
    def open(cls, path: Path) -> Case:
        with safe_open(path, "pt") as file:
            return cls(path, file.metadata() or {}, tuple(file.keys()))

    @property
    def name(self) -> str:
        return f"{self.path.parent.name}/{self.path.stem}"

    @property
    def hyper(self) -> dict[str, Any]:
        return json.loads(self.metadata.get("hyper", "{}"))

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return self._tensors("in.")

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        return self._tensors("out.")

    def rule(self, output: str) -> str:
        """How to compare one output: "exact", "set" or "close:<rtol>:<atol>"."""
        rule = self.metadata["compare"]
        return json.loads(rule)[output] if rule.lstrip().startswith("{") else rule

    def slug(self, known: Iterable[str]) -> str:
        """The system: as the metadata says, else the longest known slug that the file's name begins with."""
        if "system" in self.metadata:
            return self.metadata["system"]
        stem = self.path.stem
        fits = [s for s in known if stem == s or stem.startswith(f"{s}-")]
        return max(fits, key=len, default=stem.rpartition("-")[0] or stem)

    def _tensors(self, prefix: str) -> dict[str, Tensor]:
        with safe_open(self.path, "pt") as file:
            return {n.removeprefix(prefix): file.get_tensor(n) for n in self.names if n.startswith(prefix)}


def find(root: Path = ROOT) -> list[Case]:
    """All cases under ``root``, by name."""
    return [Case.open(path) for path in sorted(root.glob("*/*.safetensors"))]


def adapter_of(case: Case) -> ModuleType | None:
    """The module that can run ``case``, or None where the system, or an adapter for it, is not here yet."""
    slug = case.slug([*catalogue.names(), *(p.stem.replace("_", "-") for p in ADAPTERS.glob("*.py"))])
    own = ADAPTERS / f"{slug.replace('-', '_')}.py"
    if own.exists():
        adapter = _load(own)
        return None if case.path.stem.startswith(tuple(getattr(adapter, "WAITS", ()))) else adapter
    given = {name.removeprefix("in.").split(".")[0] for name in case.names if name.startswith("in.")}
    wanted = {name.removeprefix("out.") for name in case.names if name.startswith("out.")}
    fits = slug in catalogue.names() and given <= EVIDENCE and wanted <= {"keep", "tokens", "source"}
    return _load(ADAPTERS / "evidence.py") if fits and "keep" in case.hyper else None


def check(case: Case, results: dict[str, Tensor]) -> None:
    """Hold ``results`` against the recorded outputs; AssertionError says which one differs and how."""
    missing = sorted(set(case.outputs) - set(results))
    assert not missing, f"{case.name}: the adapter gives no {', '.join(missing)}"
    for name, expected in case.outputs.items():
        compare(case.rule(name), results[name], expected, f"{case.name}: {name}")


def compare(rule: str, result: Tensor, expected: Tensor, what: str) -> None:
    """AssertionError unless ``result`` is ``expected`` under ``rule``; ValueError for a rule that there is not."""
    assert result.shape == expected.shape, f"{what}: shape {tuple(result.shape)}, must be {tuple(expected.shape)}"
    if rule.startswith("close:"):
        rtol, atol = map(float, rule.split(":")[1:])
        torch.testing.assert_close(
            result, expected, rtol=rtol, atol=atol, check_dtype=False, msg=lambda text: f"{what}: {text}"
        )
        return
    if rule == "set":
        result, expected = result.sort(-1).values, expected.sort(-1).values
    elif rule != "exact":
        raise ValueError(f"{what}: compare rule {rule!r}, must be exact, set or close:<rtol>:<atol>")
    different = result != expected
    if bool(different.any()):
        first = tuple(different.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(different.sum())} of {different.numel()} differ, the first at {first}: "
            f"{result[first].item()}, must be {expected[first].item()}"
        )


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"golden_adapter_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
