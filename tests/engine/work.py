"""Cells and functions that worker processes import."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    key: str
    number: int = 0


class Counted:
    """A cell that counts how often its key is asked for, which may be a hash of much."""

    def __init__(self, number: int) -> None:
        self.number, self.asked = number, 0

    @property
    def key(self) -> str:
        self.asked += 1
        return f"cell-{self.number:03}"


@dataclass(frozen=True)
class Unpicklable:
    key: str

    def __reduce__(self):
        raise TypeError("this cell does not travel")


class Unreturnable:
    def __reduce__(self):
        raise TypeError("this value does not travel")


def jobs(count: int) -> list[Job]:
    return [Job(f"cell-{number:03}", number) for number in range(count)]


def ten() -> int:
    return 10


def multiply(state, cell):
    return {"key": cell.key, "product": (state or 1) * cell.number}


def troubled(state, cell):
    """Every way in which a cell of ours may go wrong without its worker dying."""
    if cell.number == 1:
        raise ValueError(f"no such picture: {cell.number}")
    if cell.number == 2:
        raise OSError(errno.ENOSPC, "No space left on device", "out.parquet")
    if cell.number == 3:
        sys.exit("a library that exits")
    if cell.number == 4:
        return Unreturnable()
    return multiply(state, cell)


def dies_once(folder, state, cell):
    """Cell 1 kills its worker the first time, cell 2 each time."""
    marker = Path(folder) / f"tried-{cell.key}"
    if cell.number == 2 or (cell.number == 1 and not marker.exists()):
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return multiply(state, cell)


def note(folder, text: str) -> None:
    """One line in the log that all processes share; a short append is never torn."""
    with (Path(folder) / "log").open("a") as log:
        log.write(text + "\n")


def noted(folder) -> list[list[str]]:
    log = Path(folder) / "log"
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def note_setup(folder) -> str:
    note(folder, f"setup - {os.getpid()}")
    return str(os.getpid())


def write(folder, seconds, state, cell):
    """A cell as a sweep has them: works for a while, then renames its result into place."""
    note(folder, f"start {cell.key} {os.getpid()}")
    time.sleep(seconds)
    part = Path(folder) / f"{cell.key}.{os.getpid()}.part"
    part.write_text(str(cell.number))
    part.rename(Path(folder) / f"{cell.key}.result")
    note(folder, f"end {cell.key} {os.getpid()}")
    return os.getpid()


def writes_and_dies(folder, state, cell):
    """Cell 1 is written and its worker killed before it can say so; cell 2 kills without a word."""
    if cell.number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(folder, 0, state, cell)
    if cell.number == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def written(folder, key: str) -> bool:
    return (Path(folder) / f"{key}.result").exists()


def place(state, cell):
    """Where a worker finds itself."""
    time.sleep(0.3)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return {"pid": os.getpid(), "cores": cores, "threads": os.environ.get("OMP_NUM_THREADS"), "state": state}


def place_of_both(folder, state, cell):
    """``place``, once two processes are at it."""
    note(folder, f"here {cell.key} {os.getpid()}")
    until(lambda: len({pid for _, _, pid in noted(folder)}) == 2, 60)
    return place(state, cell)


def threads_of_torch(state, cell):
    import torch

    return torch.get_num_threads()


def fails() -> None:
    raise FileNotFoundError("no weights here")


def kills() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def alive(pid: int) -> bool:
    """Whether the process runs; one that only waits for its parent to look does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition, seconds: float = 20.0) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"still not so after {seconds} s: {condition}")
        time.sleep(0.01)
