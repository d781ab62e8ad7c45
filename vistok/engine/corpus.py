"""A corpus of pictures as shards: which pictures there are, written down once, and their bytes, one after another.

A corpus is a folder of pictures, tar archives as WebDataset has them, Parquet files with a column of encoded pictures,
or a glob of any of these. ``plan`` lists it and writes the list to a folder: what belongs to the corpus, and to which
shard, is then settled, whatever happens to the source. Neither listing nor reading holds more than a part in memory.
"""

from __future__ import annotations

import errno
import glob
import heapq
import itertools
import json
import os
import stat
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["files", "tar", "parquet"]

SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".jpe", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")
)
"""Of files that are taken for pictures in folders and archives."""
LARGEST_BYTES = 256 * 2**20
"""Of one picture's file; a larger one is not read."""
_RUN = 20_000  # names that are sorted in memory at once
_NAMES, _SHARDS = "names.jsonl", "shards.jsonl"
# A file that is not to be had is a picture that cannot be read; any other error (a disk, a network) may pass.
_GONE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


@dataclass(frozen=True)
class Shard:
    """Pictures that are worked on together, in a fixed order: a cell of an engine."""

    key: str
    kind: Kind
    path: str
    """The archive, the Parquet file, or the folder that names are relative to."""
    name: str = ""
    """What source keys of its pictures begin with, of an archive or a Parquet file."""
    names: str = ""
    """File with the names of the plan, of a folder."""
    first: int = 0
    """Where its pictures begin: byte in the file of names, or row group."""
    count: int = 0
    """How many names, or row groups; not used for archives."""
    row: int = 0
    """Number of its first row in the Parquet file."""


@dataclass(frozen=True)
class Item:
    """A picture of the corpus as it lies there."""

    source: str
    """Its source key: path relative to the corpus, with the member of an archive or the row of a table behind it."""
    data: bytes | None
    """Its file's bytes; None where they cannot be had."""
    reason: str = ""
    """Why not."""


# Listing --------------------------------------------------------------------------------------------------------------


def plan(source: str, folder: Path, shard_size: int) -> int:
    """List the corpus ``source`` into ``folder``, which must be there; how many shards there are.

    A shard has ``shard_size`` pictures; of a Parquet file as many row groups as hold so many; of archives one each.

    Raises:
        ValueError: nothing there, or a glob that fits files of several kinds.
    """
    kind, root, found = _find(source)
    ordered = _ordered(found, folder)
    first = next(ordered, None)
    if first is None:
        right = f"pictures ({', '.join(sorted(SUFFIXES))})" if Path(source).is_dir() else "files"
        raise ValueError(f"source: got {source!r}, must hold {right}; archives and tables are named by a glob")
    names = itertools.chain([first], ordered)
    shards = _of_names(names, root, folder, shard_size) if kind == "files" else _of_files(names, kind, root, shard_size)
    count = 0
    with (folder / _SHARDS).open("w", encoding="ascii") as file:
        for shard in shards:
            file.write(json.dumps({**asdict(shard), "key": f"{count:06d}"}) + "\n")
            count += 1
    return count


def shards(folder: Path) -> Iterator[Shard]:
    """Those of a plan, in order; ``folder`` may have been moved since."""
    with (folder / _SHARDS).open(encoding="ascii") as file:
        for line in file:
            made = json.loads(line)
            if made["kind"] == "files":
                made["names"] = str(folder / _NAMES)
            yield Shard(**made)


def is_plan(folder: Path) -> bool:
    """Whether ``plan`` wrote ``folder``, and nothing else is in it."""
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return _SHARDS in there and there <= {_SHARDS, _NAMES}


def _find(source: str) -> tuple[Kind, Path, Iterator[str]]:
    """The kind of a corpus, the folder that names are relative to, and its files' names in any order."""
    path = Path(source)
    if path.is_dir():
        return "files", path.absolute(), _walk(path)
    if path.is_file():
        root, found = path.absolute().parent, iter([path.name])
    elif glob.has_magic(source):
        parts = itertools.takewhile(lambda part: not glob.has_magic(part), path.parts)
        root = Path(*parts).absolute()
        found = (os.path.relpath(name, root) for name in glob.iglob(source, recursive=True) if os.path.isfile(name))
    else:
        raise ValueError(f"source: got {source!r}, there is no such file or folder")
    first = next(found, None)
    if first is None:
        raise ValueError(f"source: got {source!r}, must fit at least one file")
    kind = _kind(first)
    return kind, root, _of_one_kind(itertools.chain([first], found), kind, source)


def _kind(name: str) -> Kind:
    kinds: dict[str, Kind] = {".tar": "tar", ".parquet": "parquet"}
    return kinds.get(os.path.splitext(name)[1].lower(), "files")


def _of_one_kind(names: Iterable[str], kind: Kind, source: str) -> Iterator[str]:
    for name in names:
        if _kind(name) != kind:
            raise ValueError(f"source: got {source!r}, must fit files of one kind, {name!r} is of another")
        yield name


def _walk(folder: Path) -> Iterator[str]:
    """Pictures below ``folder``, by name relative to it. Hidden ones are left out, links to folders not followed."""
    waiting = [""]
    while waiting:
        below = waiting.pop()
        with os.scandir(folder / below) as entries:
            for entry in entries:
                name = f"{below}/{entry.name}" if below else entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(name)
                elif os.path.splitext(entry.name)[1].lower() in SUFFIXES and entry.is_file():
                    yield name


def _ordered(names: Iterator[str], folder: Path) -> Iterator[str]:
    """``names`` sorted by way of files in ``folder``, so that no more than a run of them is in memory."""
    runs: list[Path] = []
    while run := sorted(itertools.islice(names, _RUN)):
        path = folder / f"run-{len(runs)}"
        path.write_text("".join(json.dumps(name) + "\n" for name in run), "ascii")
        runs.append(path)
    with ExitStack() as stack:
        files = [stack.enter_context(path.open(encoding="ascii")) for path in runs]
        yield from heapq.merge(*(map(json.loads, file) for file in files))
    for path in runs:
        path.unlink()


def _of_names(names: Iterator[str], root: Path, folder: Path, size: int) -> Iterator[Shard]:
    with (folder / _NAMES).open("wb") as file:
        while run := list(itertools.islice(names, size)):
            start = file.tell()
            file.writelines(json.dumps(name).encode("ascii") + b"\n" for name in run)
            yield Shard("", "files", str(root), first=start, count=len(run))


def _of_files(names: Iterator[str], kind: Kind, root: Path, size: int) -> Iterator[Shard]:
    for name in names:
        path = str(root / name)
        if kind == "tar":
            yield Shard("", kind, path, name)
            continue
        rows = _row_groups(path)
        first = row = 0
        while first < len(rows):
            count = 1
            while first + count < len(rows) and sum(rows[first : first + count + 1]) <= size:
                count += 1
            yield Shard("", kind, path, name, first=first, count=count, row=row)
            row += sum(rows[first : first + count])
            first += count


def _row_groups(path: str) -> list[int]:
    """Rows of each row group of a Parquet file; one, of any size, for a file that cannot be read: its shard tells."""
    parquet = parquet_module()
    try:
        with parquet.ParquetFile(path) as file:
            return [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    except (OSError, ValueError):
        return [0]


# Reading --------------------------------------------------------------------------------------------------------------


def read(shard: Shard, column: str = "image") -> Iterator[Item]:
    """The pictures of a shard, in order, one at a time in memory (of Parquet: 32).

    ``column``: of a Parquet file, bytes, or a struct with a field ``bytes``. What cannot be read is an item without
    data. Raises OSError where that may pass, and LookupError for a column that is not there or not of bytes.
    """
    return {"files": _files, "tar": _tar, "parquet": _table}[shard.kind](shard, column)


def _files(shard: Shard, column: str) -> Iterator[Item]:
    with open(shard.names, "rb") as names:
        names.seek(shard.first)
        for line in itertools.islice(names, shard.count):
            name = json.loads(line)
            # Names may be any bytes; those that are no text are shown with escapes.
            shown = os.fsencode(name).decode("utf-8", "backslashreplace")
            try:
                about = os.stat(os.path.join(shard.path, name))
                if not stat.S_ISREG(about.st_mode):
                    yield Item(shown, None, "it is no regular file")
                elif about.st_size > LARGEST_BYTES:
                    yield Item(shown, None, _too_large(about.st_size))
                else:
                    yield Item(shown, Path(shard.path, name).read_bytes())
            except OSError as error:
                if error.errno not in _GONE:
                    raise
                yield Item(shown, None, f"it cannot be read ({error.strerror})")


def _tar(shard: Shard, column: str) -> Iterator[Item]:
    try:
        with tarfile.open(shard.path, "r|") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # else it remembers every member
                if not member.isfile() or os.path.splitext(member.name)[1].lower() not in SUFFIXES:
                    continue
                name = f"{shard.name}/{os.fsencode(member.name).decode('utf-8', 'backslashreplace')}"
                if member.size > LARGEST_BYTES:
                    yield Item(name, None, _too_large(member.size))
                    continue
                file = archive.extractfile(member)
                yield Item(name, file.read() if file else None, "it cannot be read")
    except (tarfile.TarError, EOFError, ValueError) as error:
        yield Item(shard.name, None, f"the archive is cut off or corrupt from here on ({error})")


def _table(shard: Shard, column: str) -> Iterator[Item]:
    import pyarrow  # type: ignore[import-untyped]

    row = shard.row
    try:
        with parquet_module().ParquetFile(shard.path) as file:
            _check_column(file.schema_arrow, column, shard.name)
            groups = list(range(shard.first, shard.first + shard.count))
            for batch in file.iter_batches(32, groups, [column], use_threads=False):
                for value in batch.column(0):
                    data = value.as_py()
                    data = data["bytes"] if isinstance(data, dict) else data
                    yield Item(f"{shard.name}/{row}", data, "" if data else "there is no picture in this row")
                    row += 1
    except pyarrow.ArrowException as error:
        yield Item(f"{shard.name}/{row}", None, f"the file is corrupt from here on ({error})")
    except OSError as error:
        if error.errno is not None:
            raise
        yield Item(f"{shard.name}/{row}", None, f"the file is corrupt from here on ({error})")


def _check_column(schema: Any, column: str, name: str) -> None:
    import pyarrow

    if column not in schema.names:
        raise LookupError(f"column: got {column!r}, must be one of {', '.join(schema.names)} ({name})")
    kind = schema.field(column).type
    if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)):
        raise LookupError(f"column: got {column!r} of {kind}, must hold bytes, or structs with a field bytes ({name})")


def _too_large(size: int) -> str:
    return f"its file must have at most {LARGEST_BYTES} bytes, it has {size}"


def parquet_module() -> Any:
    """``pyarrow.parquet``. Raises ImportError saying what to install."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("Parquet needs pyarrow: pip install 'vistok[data]'") from error
    return parquet
