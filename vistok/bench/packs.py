"""Packs: the rows of many cells in one sealed Parquet file each, as a million files of one cell are too many.

``compact`` moves rows from the files of single cells into packs. It is right at every moment, whoever else is at work
in the folder and wherever it is stopped: a pack is on the disk under its name before anything that went into it is
removed, a cell that is found twice counts once, and a removed file's rows are always in a pack that was there before.
It takes no lock: two at once write some rows twice. ``vistok bench compact`` holds a claim, to keep to one.

A pack is never changed. Its name says what it is: "full", or "part", which the next compaction takes up again, and the
digest of its content.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .sealed import Schema, content, load, seal

if TYPE_CHECKING:
    import polars

FULL = 128 * 2**20
"""Bytes that the rows of a full pack take in memory, about; what a compaction holds at once is a few times that."""
STALE = 24 * 3600.0
"""Seconds after which a file that was never renamed into place is what a killed process left."""
_TICK = 2.0  # seconds in which two changes of a folder may bear the same time


@dataclass(frozen=True)
class Compaction:
    """What ``compact`` did."""

    cells: int
    """Whose own files were removed."""
    files_before: int
    files_after: int
    """Files of results in the folder, single and packs."""
    bytes_before: int
    bytes_after: int


@dataclass
class _Index:
    """The cells in the packs of a folder, as this process saw it last."""

    stamp: int | None = None
    packs: Mapping[Path, frozenset[str]] = field(default_factory=dict)
    cells: frozenset[str] = frozenset()


_indices: dict[tuple[int, int, Schema], _Index] = {}


def packs(folder: Path) -> list[Path]:
    """The packs of a sweep's folder."""
    return sorted((folder / "packs").glob("*.parquet"))


def cells(folder: Path, schema: Schema) -> frozenset[str]:
    """Keys of the cells that are in packs. Each pack is read whole once by a process, after that none is opened."""
    try:
        seen = os.stat(os.path.join(folder, "packs"))
    except FileNotFoundError:
        return frozenset()
    index = _indices.setdefault((seen.st_dev, seen.st_ino, schema), _Index())
    if seen.st_mtime_ns != index.stamp:
        found = {}
        for path in packs(folder):
            found[path] = index.packs[path] if path in index.packs else _cells_of(load(path, schema, ["cell"]))
        index.packs, index.cells = found, frozenset().union(*found.values())
        # A change so soon after this one might bear its time, and not be seen.
        index.stamp = seen.st_mtime_ns if time.time() - seen.st_mtime > _TICK else None
    return index.cells


def read(folder: Path, schema: Schema) -> Iterator[polars.DataFrame]:
    """The rows of all packs, each cell once; also while they are being compacted."""
    read: set[Path] = set()
    known: set[str] = set()
    while new := [path for path in packs(folder) if path not in read]:
        for path in new:  # one that was merged into another in this moment is in the next listing
            read.add(path)
            frame = load(path, schema)
            if frame is not None:
                yield without(frame, known)
                known |= _cells_of(frame)


def without(frame: polars.DataFrame, known: Iterable[str]) -> polars.DataFrame:
    """The rows of the cells that are not known already."""
    double = _cells_of(frame).intersection(known)
    return frame.filter(~frame["cell"].is_in(list(double))) if double else frame


def compact(folder: Path, singles: Path, schema: Schema) -> Compaction:
    """Move the rows of the files in ``singles``, one a cell, into packs of ``folder``.

    Files that are not whole are put aside, those of another schema left alone.

    Raises:
        OSError: a pack cannot be written or a file not removed; nothing is lost then.
    """
    before = _weigh(folder, singles)
    packed = cells(folder, schema)
    parts = [path for path in packs(folder) if path.name.startswith("part-")]
    files = sorted(singles.glob("*.parquet"))
    # What a compaction before this one packed and was stopped before it removed.
    left = [path for path in files if path.stem in packed and content(path, schema) is not None]
    removed = _remove(left)
    new = [path for path in files if path.stem not in packed]
    batch = _Batch(folder, schema)
    if new or len(parts) > 1:
        for path in (*parts, *new):
            batch.add(path)
        batch.write("part")
    for path in (*singles.glob(".*"), *(folder / "packs").glob(".*")):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > STALE:
                path.unlink()
    after = _weigh(folder, singles)
    return Compaction(removed + batch.removed, before[0], after[0], before[1], after[1])


class _Batch:
    """Rows on their way into a pack."""

    def __init__(self, folder: Path, schema: Schema) -> None:
        self.folder, self.schema = folder / "packs", schema
        self.frames: list[polars.DataFrame] = []
        self.sources: list[Path] = []
        self.cells: set[str] = set()
        self.bytes = 0
        self.removed = 0

    def add(self, path: Path) -> None:
        frame = load(path, self.schema)
        if frame is None:
            return
        self.sources.append(path)
        frame = without(frame, self.cells)
        self.frames.append(frame)
        self.cells |= _cells_of(frame)
        self.bytes += int(frame.estimated_size())
        if self.bytes >= FULL:
            self.write("full")

    def write(self, kind: str) -> None:
        """Write the pack, and only then remove what went into it."""
        if not self.frames:
            return
        import polars

        data = seal(polars.concat(self.frames, rechunk=True).sort("cell", maintain_order=True), self.schema)
        path = self.folder / f"{kind}-{hashlib.sha256(data).hexdigest()[:20]}.parquet"
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_through(path, data)
        gone = [source for source in self.sources if source != path]
        self.removed += _remove([source for source in gone if source.parent != self.folder])
        _remove([source for source in gone if source.parent == self.folder])
        self.frames, self.sources, self.bytes = [], [], 0


def _write_through(path: Path, data: bytes) -> None:
    """Write to the disk itself, under another name, then rename: what follows may rely on it though the power fails."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(paths: Iterable[Path]) -> int:
    """Remove files; how many there were. Another compaction may have been first."""
    count = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            count += 1
    return count


def _cells_of(frame: polars.DataFrame | None) -> frozenset[str]:
    return frozenset() if frame is None else frozenset(frame["cell"].unique())


def _weigh(folder: Path, singles: Path) -> tuple[int, int]:
    """Files of results and their bytes."""
    sizes = []
    for place in (folder / "packs", singles):
        with contextlib.suppress(FileNotFoundError), os.scandir(place) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if entry.name.endswith(".parquet"):
                        sizes.append(entry.stat().st_size)
    return len(sizes), sum(sizes)
