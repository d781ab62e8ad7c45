"""Reads a file that a stranger named, from under the folders that were opened for it and nowhere else."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from vistok.serve.errors import MediaError

URL_CHARACTERS = 4_096
"""Length of a file URL, in characters."""

SUPPORTED = os.open in os.supports_dir_fd and hasattr(os, "O_NOFOLLOW")
"""Whether this system can open a file without following a link that was put in its place."""

_URL = re.compile(r"file://(?:localhost)?(/[^?#]*)", re.IGNORECASE)


def read_file(url: str, roots: Sequence[Path], max_bytes: int) -> bytes:
    """The bytes of a regular file under one of ``roots`` (resolved folders), named as ``file:///folder/name``.

    Links inside a root are followed as long as they stay inside. Raises MediaError; a file that does not exist, one
    outside the roots and one that is no regular file give the same error.
    """
    match = _URL.fullmatch(url) if len(url) <= URL_CHARACTERS else None
    if match is None:
        raise MediaError(400, "invalid_url", "The picture's URL is not a plain file URL.")
    if not roots:
        raise MediaError(403, "files_not_allowed", "This server does not read files.")
    try:
        path = unquote(match[1], errors="strict")
        parts = path.split("/")
        if ".." in parts or "\0" in path:
            raise _refused()
        for root in roots:
            # By its text first: what lies outside of the roots is not even looked at.
            if Path(path).is_relative_to(root):
                real = Path(os.path.realpath(path))
                if real.is_relative_to(root):
                    return _read(root, real.relative_to(root).parts, max_bytes)
    except (OSError, ValueError) as error:
        raise _refused() from error
    raise _refused()


def _refused() -> MediaError:
    return MediaError(403, "file_not_allowed", "The file is not one that this server reads.")


def _read(root: Path, parts: Sequence[str], max_bytes: int) -> bytes:
    """Opens ``parts`` one by one from ``root``, following no link: one that was put there since the check fails."""
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts[:-1]:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            os.close(folder)
            folder = inner
        if not parts:
            raise _refused()
        # Without waiting: opening a pipe would wait for its other end.
        file = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    finally:
        os.close(folder)
    with open(file, "rb") as stream:
        facts = os.fstat(file)
        if not stat.S_ISREG(facts.st_mode):
            raise _refused()
        data = stream.read(max_bytes + 1) if facts.st_size <= max_bytes else None
    if data is None or len(data) > max_bytes:
        raise MediaError(413, "picture_too_large", f"The picture has more than {max_bytes} bytes.")
    return data
