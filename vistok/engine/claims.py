"""Claims: which of several drivers on one folder does a cell.

A claim is an exclusive lock (``flock``) on ``<folder>/claims/<key>.lock``. The operating system holds the lock for the
process, so it is gone the moment that process is, however it died: there is no heartbeat to miss and no stale lock to
clean up. What the file says (host, process) is for people only. An empty, torn or foreign lock file changes nothing,
and neither does one that a dead driver left: whoever comes next takes it over.

Network filesystems. NFS (Linux, version 4 or 3 with lockd) carries the lock to the server, so drivers on several
machines see one another's; after a machine dies without a word the server keeps its locks until the lease is over,
about 90 seconds. A filesystem that refuses locks (Lustre mounted without ``flock``) makes ``claim`` raise OSError. One
that keeps locks to each machine (NFS with ``local_lock``, Lustre with ``localflock``, many FUSE mounts of object
stores) cannot be told apart from here: two machines may then do a cell twice. One file a cell, renamed into place, is
still right there: the second result replaces the first.

The driver holds the claim, not the worker. A killed driver's workers end a moment after it, and one that finishes its
cell in that moment has its result replaced by the next driver's, in the same way.

A process that the driver forked (not spawned) shares its locks until that process ends too.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from pathlib import Path
from types import TracebackType

from vistok.engine.cells import check_key

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Claim:
    """The right to do one cell, until ``release`` or the end of this process; a context manager."""

    def __init__(self, path: Path, handle: int) -> None:
        """Made by ``claim``: ``handle`` is the locked file descriptor of the lock file ``path``."""
        self.path = path
        self._handle: int | None = handle

    def release(self) -> None:
        """Give the claim back and remove its file. A second call does nothing."""
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        with contextlib.suppress(OSError):  # unlinked under the lock: nobody can hold a file of this name but us
            self.path.unlink()
        fcntl.flock(handle, fcntl.LOCK_UN)  # said outright, as a forked process may have a copy of the handle
        os.close(handle)

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def claim(folder: str | Path, key: str) -> Claim | None:
    """Take the cell ``key`` of ``folder``, or None where a live process has it (this one counts too).

    Ask whether the result is there after you hold the claim: another driver may have written it just before.

    Raises:
        ValueError: ``key`` cannot be a file's name.
        OSError: the folder cannot be written, its disk is full, or its filesystem has no locks.
    """
    path = _path(folder, key)
    if fcntl is None:
        raise OSError(f"folder={str(folder)!r}: shared folders need POSIX file locks; run one driver without a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return None
            raise
        if _is_at(handle, path):
            break
        os.close(handle)  # its last owner removed the file between our open and our lock: that lock binds nobody
    taken = Claim(path, handle)
    try:
        length = os.write(handle, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
        # What a dead owner wrote further on. Cut after the write: ext4 flushes a file that was cut to nothing first.
        os.truncate(handle, length)
    except OSError:
        taken.release()
        raise
    return taken


def owner_of(folder: str | Path, key: str) -> str:
    """Who claimed the cell, in words; the lock file may be gone, half-written or rubbish."""
    try:
        said = json.loads(_path(folder, key).read_bytes())
        return f"process {int(said['pid'])} on {said['host']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "an unknown process"


def _path(folder: str | Path, key: str) -> Path:
    return Path(folder) / "claims" / f"{check_key(key)}.lock"


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file is the one that the path names now."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
