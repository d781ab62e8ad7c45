"""What a long run has measured so far, in a file, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .measure import Case

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Journal:
    """Entries by key, one JSON line each. Only those of runs with the same ``run`` (see ``print_of``) are seen.

    ``path`` None: nothing is kept.
    """

    def __init__(self, path: Path | None, run: str) -> None:
        self.path, self.run = path, run
        self.said: dict[str, dict[str, Any]] = {}
        self._cut = ""
        if path is None or not path.exists():
            return
        text = path.read_text(encoding="utf-8")
        self._cut = "" if text.endswith("\n") or not text else "\n"  # a line that was being written when the run ended
        for line in text.splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if entry.get("run") == run:
                self.said[entry["key"]] = entry["value"]

    def add(self, key: str, value: Mapping[str, Any]) -> None:
        """Note ``value``, at once."""
        self.said[key] = dict(value)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._cut + json.dumps({"run": self.run, "key": key, "value": self.said[key]}) + "\n")
            self._cut = ""


def print_of(model: PreTrainedModel, cases: Sequence[Case], known: Mapping[str, Any]) -> str:
    """What tells one run from another: the model (its configuration and some weights), the questions, and ``known``."""
    digest = hashlib.sha256((model.config.to_json_string() + json.dumps(known, sort_keys=True)).encode())
    digest.update(next(model.parameters()).detach().flatten()[:4096].float().cpu().numpy().tobytes())
    for case in cases:
        digest.update(case.picture.tobytes() + case.question.encode() + b"\0")
    return digest.hexdigest()[:16]
