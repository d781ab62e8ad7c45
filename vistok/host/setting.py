"""A method, its hyper-parameters and its ``keep`` as a JSON file: what ``vistok auto`` writes and ``apply`` reads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vistok.host.keep import Keep, check_keep
from vistok.host.reducer import Reducer


@dataclass(frozen=True)
class Setting:
    """Methods in order, by name, each with the hyper-parameters that differ from its defaults; and ``keep``."""

    methods: tuple[str, ...]
    keep: Keep
    hyper: tuple[Mapping[str, Any], ...] = ()
    """One a method; () is none for any."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """How it was found; not read by ``apply``."""

    def create(self) -> list[Reducer]:
        """The reducers. Raises UnknownSystem, or ValueError for a hyper-parameter that a system does not have."""
        from vistok import catalogue

        hyper: Sequence[Mapping[str, Any]] = self.hyper or [{}] * len(self.methods)
        return [catalogue.create(name, **given) for name, given in zip(self.methods, hyper, strict=True)]

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write it to ``path``, whole or not at all."""
        target = Path(path)
        body = {
            "methods": list(self.methods),
            "keep": self.keep,
            "hyper": [dict(h) for h in self.hyper],
            "measured": dict(self.measured),
        }
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        return target


def read_setting(path: str | os.PathLike[str]) -> Setting:
    """The setting in the file ``path``. Raises ValueError, naming the file, for anything else."""
    try:
        body = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"method: {os.fspath(path)} is no setting that can be read ({error})") from error
    methods = body.get("methods") if isinstance(body, dict) else None
    if not isinstance(methods, list) or not methods or not all(isinstance(name, str) for name in methods):
        raise ValueError(f'method: {os.fspath(path)} is no setting, it must have "methods": [names]')
    hyper = body.get("hyper") or []
    if (
        not isinstance(hyper, list)
        or len(hyper) not in (0, len(methods))
        or not all(isinstance(h, dict) for h in hyper)
    ):
        raise ValueError(f'method: {os.fspath(path)} must have "hyper": one object a method, or none')
    return Setting(tuple(methods), check_keep(body.get("keep")), tuple(hyper), body.get("measured") or {})
