"""What goes into an engine and what comes out: cells, what a worker needs, outcomes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

Result = TypeVar("Result")

_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


class Cell(Protocol):
    """One piece of work: picklable, and named by the hash of its content."""

    @property
    def key(self) -> str:
        """The content's hash, see ``check_key``."""
        ...


def check_key(key: str) -> str:
    """``key`` itself, if it can be the name of a file on every system.

    Raises:
        ValueError: otherwise.
    """
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise ValueError(f"key is {key!r}; it is 1 to 128 of A-Z a-z 0-9 . _ - and does not start with a dot")
    return key


class Status(StrEnum):
    """How a cell ended."""

    DONE = "done"
    """It ran; its value is in the outcome."""
    FAILED = "failed"
    """It raised, or its worker died more often than there were retries; the error is in the outcome."""
    PRESENT = "present"
    """Its result was there: before it was handed out, or its worker wrote it and died (then ``tries`` is not 0)."""
    HELD = "held"
    """Left alone: another live driver was at it to the end."""


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """What became of one cell."""

    key: str
    status: Status
    value: Result | None = None
    """What ``fn`` returned (DONE)."""
    error: str = ""
    """The exception in words, with the cell's key (FAILED)."""
    traceback: str = ""
    """Where in ``fn`` it was raised; empty where the worker died (FAILED)."""
    owner: str = ""
    """Who is at it, as far as the lock file tells (HELD)."""
    tries: int = 0
    """How often it was handed to a worker: 0 for a cell left alone, 2 for one whose first worker died."""


@dataclass(frozen=True)
class Resources:
    """What one worker needs for itself."""

    cpus: int = 1
    """Cores, and threads of torch and of the BLAS: sums in float32 depend on it, so it is the same on every engine."""
    gpus: float = 0
    """GPUs: a whole number, or a part of one (0.5: two workers share a GPU)."""
    memory: int = 0
    """Bytes of main memory that it may fill; 0: not counted. A limit on how many workers run, not on what they do."""

    def __post_init__(self) -> None:
        if not isinstance(self.cpus, int) or self.cpus < 1:
            raise ValueError(f"cpus is {self.cpus!r}; a worker needs a whole number of cores, 1 or more")
        if self.gpus < 0 or (self.gpus > 1 and self.gpus != int(self.gpus)):
            raise ValueError(f"gpus is {self.gpus!r}; it is 0, a part of 1, or a whole number")
        if self.memory < 0:
            raise ValueError(f"memory is {self.memory!r}; it is a number of bytes, 0 for not counted")


class SetupError(RuntimeError):
    """``setup()`` raised, or its process died in it: no cell can run. Cells without an outcome were not done."""
