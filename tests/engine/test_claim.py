"""Claims: one holder at a time whatever happens to it, and lock files that mean nothing without their lock."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from vistok.engine import claim, owner_of


def test_one_holder(tmp_path):
    first = claim(tmp_path, "a")
    assert first is not None
    assert claim(tmp_path, "a") is None
    assert owner_of(tmp_path, "a") == f"process {os.getpid()} on {socket.gethostname()}"
    with claim(tmp_path, "b") as other:
        assert other.path == tmp_path / "claims" / "b.lock"
    first.release()
    first.release()
    assert list((tmp_path / "claims").iterdir()) == []
    again = claim(tmp_path, "a")
    assert again is not None
    again.release()


def test_gone_with_its_process_however_it_dies(tmp_path):
    code = "import sys, time; from vistok.engine import claim; c = claim(sys.argv[1], 'a'); print('held', flush=True); "
    holder = subprocess.Popen(
        [sys.executable, "-c", code + "time.sleep(60)", str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    assert claim(tmp_path, "a") is None
    assert owner_of(tmp_path, "a").startswith(f"process {holder.pid} ")
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert (tmp_path / "claims" / "a.lock").exists()  # left behind, and it binds nobody
    with claim(tmp_path, "a") as taken:
        assert json.loads(taken.path.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", [b"", b"\xff\x00rubbish", b'{"pid": "x"', b"[1, 2]", b"7" * 10_000])
def test_a_corrupt_lock_file_changes_nothing(tmp_path, content):
    path = tmp_path / "claims" / "a.lock"
    path.parent.mkdir()
    path.write_bytes(content)
    assert owner_of(tmp_path, "a") == "an unknown process"
    with claim(tmp_path, "a"):
        assert claim(tmp_path, "a") is None
        assert owner_of(tmp_path, "a").startswith(f"process {os.getpid()} ")


def test_a_lock_file_removed_between_open_and_lock(tmp_path, monkeypatch):
    """The trap: one opens the file, its owner removes it, a third makes a new one; two locks, two files, one name."""
    owner, lock = claim(tmp_path, "a"), fcntl.flock

    def late(handle, operation):
        if operation & fcntl.LOCK_EX:
            owner.release()
        lock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with claim(tmp_path, "a") as taken:
        assert taken.path.exists()
        assert claim(tmp_path, "a") is None


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "claims").write_text("a file, where the folder should be")
    with pytest.raises(OSError):
        claim(tmp_path, "a")


@pytest.mark.parametrize("key", ["", "a/b", "..", ".hidden", "a b", "x" * 200])
def test_keys_are_file_names(tmp_path, key):
    with pytest.raises(ValueError, match="key is"):
        claim(tmp_path, key)
