"""Parquet files that can tell whether they are whole: the metadata of each holds the SHA-256 of the file itself.

Parquet as polars writes it has no checksums: of single bits turned in a result file, one in five gave other values and
no error, and some made the reader panic. So no byte of a sealed file is parsed before its digest is found right. The
digest is of all bytes, with zeros in its own place; to other readers it is an entry "vistok" of the metadata.

A file that is not whole is put aside under its name with ".bad" behind it; one of another schema is left alone.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    import polars

_NAME, _ZEROS = "vistok rows ", "0" * 64
_SEAL = re.compile(rb"vistok rows (\d+-[0-9a-f]{8}) sha256 ([0-9a-f]{64})")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schema:
    """What the rows of a file are."""

    version: int
    """Of their meaning; their first column holds it."""
    columns: tuple[str, ...]

    @property
    def tag(self) -> str:
        """Both, in a seal."""
        return f"{self.version}-{hashlib.sha256(' '.join(self.columns).encode()).hexdigest()[:8]}"

    def fits(self, frame: polars.DataFrame) -> bool:
        """Whether these are rows of this schema."""
        return tuple(frame.columns) == self.columns and set(frame[self.columns[0]]) == {self.version}


def seal(frame: polars.DataFrame, schema: Schema) -> bytes:
    """The rows as a sealed Parquet file."""
    empty = f"{_NAME}{schema.tag} sha256 {_ZEROS}"
    buffer = io.BytesIO()
    frame.write_parquet(buffer, metadata={"vistok": empty})
    data = bytearray(buffer.getvalue())
    end = data.rindex(empty.encode()) + len(empty)
    data[end - len(_ZEROS) : end] = hashlib.sha256(data).hexdigest().encode()
    return bytes(data)


def content(path: Path, schema: Schema) -> bytes | None:
    """The bytes of a whole file of this schema; None where it is not there, of another schema, or was put aside.

    Raises OSError where the file is there and cannot be read: that says nothing about it.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    with file:
        data = file.read()
        fits = _fits(data, schema)
        if fits is None:
            _put_aside(path, file)
        return data if fits else None


def load(path: Path, schema: Schema, columns: list[str] | None = None) -> polars.DataFrame | None:
    """The rows in ``content``, all columns or some of them."""
    import polars

    data = content(path, schema)
    return None if data is None else polars.read_parquet(io.BytesIO(data), columns=columns)


def _fits(data: bytes, schema: Schema) -> bool | None:
    """Whether these are rows of the schema; None where the file is not whole."""
    if found := _SEAL.match(data, max(0, data.rfind(_NAME.encode()))):
        digest = hashlib.sha256(memoryview(data)[: found.start(2)])
        digest.update(_ZEROS.encode())
        digest.update(memoryview(data)[found.end(2) :])
        return found[1].decode() == schema.tag if digest.hexdigest().encode() == found[2] else None
    import polars

    try:  # written before there were seals, or cut
        return schema.fits(polars.read_parquet(io.BytesIO(data)))
    except (Exception, polars.exceptions.PanicException):
        return None


def _put_aside(path: Path, seen: BinaryIO) -> None:
    """Rename the file that was ``seen``, still open: another may have been renamed into its place meanwhile."""
    moved = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        if not os.path.samestat(os.stat(path), os.fstat(seen.fileno())):
            return
        os.rename(path, moved)
        if not os.path.samestat(os.stat(moved), os.fstat(seen.fileno())):  # it came between the question and the rename
            os.rename(moved, path)
            return
        os.replace(moved, path.with_name(f"{path.name}.bad"))
    except FileNotFoundError:  # another process did it
        return
    except OSError as error:
        _log.warning("%s is not whole, so its cells count as not measured (not put aside: %s)", path, error.strerror)
        return
    _log.warning("%s is not whole: put aside as %s.bad, its cells count as not measured", path, path.name)
