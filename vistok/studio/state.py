"""What all tabs of the studio share: the models, each behind a lock, the folder of a sweep, and the seed."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from vistok.studio.sessions import Sessions
from vistok.zoo import DEFAULT, load, load_processor, locate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from vistok.serve.service import Service


@dataclass(frozen=True)
class Loaded:
    """A model that is ready. Who runs it holds ``lock``: a method is in a model for one question at a time."""

    model: PreTrainedModel
    processor: ProcessorMixin
    lock: threading.Lock = field(default_factory=threading.Lock)


class Models(Mapping[str, Loaded]):
    """The models ``names`` (of the zoo, a folder, or the hub), each loaded when it is first asked for, then kept.

    Raises ModelNotFound at once for a name that cannot be one, and later for a folder that cannot be loaded.
    """

    def __init__(self, names: Sequence[str]) -> None:
        for name in names:
            locate(name)
        self._names = tuple(dict.fromkeys(names))
        self._loaded: dict[str, Loaded] = {}
        self._loading = threading.Lock()

    def __getitem__(self, name: str) -> Loaded:
        if name not in self._names:
            raise KeyError(name)
        with self._loading:
            if name not in self._loaded:
                self._loaded[name] = Loaded(load(name), load_processor(name))
            return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:  # the default would load it
        return name in self._names


class ServedModels(Mapping[str, Loaded]):
    """The models of a server that the studio stands beside: the same ones, behind the server's own locks."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def __getitem__(self, name: str) -> Loaded:
        if name not in self._service.settings.names:
            raise KeyError(name)
        self._service.loaded.wait()
        served = self._service.served[name]
        return Loaded(served.runner.model, served.runner.processor, served.lock)

    def __iter__(self) -> Iterator[str]:
        return iter(self._service.settings.names)

    def __len__(self) -> int:
        return len(self._service.settings.names)

    def __contains__(self, name: object) -> bool:
        return name in self._service.settings.names


@dataclass(frozen=True)
class Studio:
    """``models``: by name, the first is chosen at first. ``results``: the folder of a sweep for the tab Compare."""

    models: Mapping[str, Loaded] = field(default_factory=lambda: Models([DEFAULT]))
    results: Path | None = None
    seed: int = 0
    sessions: Sessions = field(default_factory=Sessions)
    """What is remembered of each open page."""
