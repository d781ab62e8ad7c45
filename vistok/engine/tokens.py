"""A folder of tokens: its manifest, its tables, and the tokenizer that they are of."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any, TypeAlias

import vistok
from vistok.engine.cells import Outcome
from vistok.engine.corpus import parquet_module
from vistok.parts.tokenizer import CONFIG, WEIGHTS, Tokenizer, holds_tokenizer, load_tokenizer
from vistok.zoo import locate

PIECE = 32
"""Pictures that a network sees at once."""
MANIFEST = "manifest.json"
_VERSION = 1
_ROWS = 1024  # of a row group

Watch: TypeAlias = Callable[[Outcome[Any], int, int], object]
"""Called with a shard's outcome, how many have ended, and how many there are."""


@dataclass(frozen=True)
class Manifest:
    """What made the ids of a folder. A run that goes on must agree with all but ``vistok`` and the last line."""

    tokenizer: str
    """Its folder, or its name in the zoo."""
    fingerprint: str
    """Of its configuration and weights."""
    source: str
    column: str
    shard_size: int
    device: str
    threads: int
    """On which the network ran; sums depend on both."""
    image: tuple[int, int]
    """Height and width that pictures were brought to, cut to the largest centre part of this shape."""
    sizes: tuple[int, ...]
    bit_order: str | None
    grid: tuple[int, int] | None
    scales: tuple[int, ...]
    """``CodeFormat`` of the ids."""
    piece: int = PIECE
    version: int = _VERSION
    vistok: str = vistok.__version__
    total: int = 0
    """Shards of the plan."""
    complete: bool = False
    pictures: int = 0
    rejects: int = 0
    shards: tuple[dict[str, Any], ...] = ()
    """Of each its ``file``, ``rows`` and ``sha256``, when all are done."""

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """That of a folder, or None. Raises ValueError for a file of another kind or version."""
        try:
            told = json.loads((folder / MANIFEST).read_text("utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"folder: {folder}: {MANIFEST} cannot be read: {error}") from error
        if not isinstance(told, dict) or told.get("version") != _VERSION:
            raise ValueError(f"folder: {folder}: {MANIFEST} is not of tokens of version {_VERSION}")
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in told.items()}
        return cls(**fields)

    def write(self, folder: Path) -> None:
        with replaced(folder / MANIFEST) as path:
            path.write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")

    def differs(self, other: Manifest) -> str:
        """The first setting in which two runs cannot share a folder, "" where they can."""
        free = ("tokenizer", "vistok", "total", "complete", "pictures", "rejects", "shards")
        mine, theirs = asdict(self), asdict(other)
        return next((name for name in mine if name not in free and mine[name] != theirs[name]), "")


@dataclass
class Report:
    """What a run came to."""

    manifest: Manifest
    failed: list[str] = field(default_factory=list)
    """Errors of shards that are not done; the next run tries them again."""
    held: list[str] = field(default_factory=list)
    """Who is at shards that another run had to the end."""


def shard_path(folder: Path, key: str) -> Path:
    """Where a shard's rows are, or will be."""
    return folder / "shards" / f"{key}.parquet"


@dataclass
class Loaded:
    """What a worker has."""

    model: Tokenizer
    threads: int


def loaded(name: str, fingerprint: str, device: str, threads: int) -> Loaded:
    """What a worker begins with. Raises ValueError where the tokenizer's files are not those of ``fingerprint``."""
    if fingerprint_of(name) != fingerprint:
        raise ValueError(f"tokenizer: {name} is not the one that the ids are of, its files have changed")
    return Loaded(tokenizer_of(name, device), threads)


def collect(ended: Iterable[Outcome[Any]], report: Report) -> None:
    """Run an engine to its end, and note what was not done."""
    for outcome in ended:
        if outcome.error:
            report.failed.append(outcome.error)
        if outcome.owner:
            report.held.append(outcome.owner)


def tokenizer_of(name: str, device: str) -> Tokenizer:
    """The tokenizer of a folder or of the zoo, in evaluation mode."""
    return load_tokenizer(_place(name)).to(device)


def _place(name: str) -> Path:
    """The folder of a tokenizer. Raises ValueError where there is something else, LookupError where there is nothing.

    As ``vistok.load``, which for the other models that it knows imports all of transformers.
    """
    place = Path(locate(name)).resolve()
    if not holds_tokenizer(place):
        raise ValueError(f"tokenizer: got {name}, must be a folder that Tokenizer.save wrote, or one of the zoo")
    return place


def fingerprint_of(name: str) -> str:
    """32 hexadecimal digits of a tokenizer's configuration and weights."""
    digest = hashlib.sha256()
    for part in (CONFIG, WEIGHTS):
        with (_place(name) / part).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def clear(*paths: Path) -> None:
    """Remove what a killed process was writing in their place. Only whoever has the claim to ``paths`` may."""
    for path in paths:
        for left in path.parent.glob(f".{path.name}.*"):
            if left.is_dir():
                rmtree(left)
            else:
                left.unlink(missing_ok=True)


@contextmanager
def replaced(path: Path, sync: bool = True) -> Iterator[Path]:
    """A path to write to, beside ``path``, that takes its place at the end of the ``with``: whole or not there.

    ``sync``: on the disk itself before it is renamed, though the power may fail.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        if sync and temporary.is_file():
            _flush(temporary)
        os.replace(temporary, path)
        if sync:
            _flush(path.parent)  # what follows may rely on it
    finally:
        if temporary.is_dir():
            rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until a file or the names in a folder are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Table(AbstractContextManager["Table"]):
    """A Parquet file that is written a row group at a time."""

    def __init__(self, path: Path, schema: Any) -> None:
        self._writer = parquet_module().ParquetWriter(path, schema, compression="zstd")
        self._schema, self._rows = schema, list[dict[str, Any]]()
        self.count = 0

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        self.count += 1
        if len(self._rows) == _ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _flush(self) -> None:
        import pyarrow  # type: ignore[import-untyped]

        if self._rows:
            self._writer.write_table(pyarrow.Table.from_pylist(self._rows, self._schema))
            self._rows = []


def columns(kind: str) -> Any:
    """The schema of ``rows`` or of ``rejects``."""
    import pyarrow

    about = [("key", pyarrow.string()), ("source", pyarrow.string())]
    rows = [
        ("ids", pyarrow.list_(pyarrow.int64())),
        ("shape", pyarrow.list_(pyarrow.int32())),
        ("bits", pyarrow.int64()),
    ]
    last = rows if kind == "rows" else [("reason", pyarrow.string())]
    return pyarrow.schema([*about, *last, ("checksum", pyarrow.string())])


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a table, one after another."""
    with parquet_module().ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS, use_threads=False):
            yield from batch.to_pylist()
