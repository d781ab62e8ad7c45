"""Result files that know whether they are whole, and packs of them: nothing lost, nothing double, at every moment."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import threading
import time
from pathlib import Path

import polars
import pytest
from typer.testing import CliRunner

from vistok.bench import packs, rows, sealed
from vistok.bench.sweep import Cell
from vistok.cli.app import app
from vistok.engine import claim


def write(folder: Path, seed: int, count: int = 3, answer: str = "red") -> str:
    """A cell of made-up rows; its key."""
    cell = Cell("m", "random", 0.5, "scenes", "single", "float32", count, seed)
    draw = random.Random(seed)
    made = [
        {"question": f"scenes:{seed}:{number}", "answer": answer, "correct": True, "tokens_in": 196}
        | {"evidence_recall": draw.random(), "kept": sorted(draw.sample(range(196), 20))}
        for number in range(count)
    ]
    rows.write(folder, cell, made)
    return cell.key


@pytest.fixture
def keys(tmp_path) -> list[str]:
    """Those of twelve cells in ``tmp_path``."""
    return [write(tmp_path, seed) for seed in range(12)]


@pytest.fixture(autouse=True)
def new_process():
    """Nothing is known of any pack."""
    packs._indices.clear()


def files(folder: Path) -> tuple[int, int]:
    """Single files and packs."""
    return len(list((folder / "rows").glob("*.parquet"))), len(packs.packs(folder))


def flip(path: Path, where: float, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 1 << bit
    path.write_bytes(data)


# Packs ----------------------------------------------------------------------------------------------------------------


def test_rows_are_the_same_in_packs(tmp_path, keys):
    before = rows.read(tmp_path)
    found = rows.compact(tmp_path)
    assert (found.cells, found.files_before, found.files_after) == (12, 12, 1)
    assert found.bytes_after < found.bytes_before / 4
    assert files(tmp_path) == (0, 1)
    assert rows.read(tmp_path).equals(before)
    assert all(rows.done(tmp_path, key) for key in keys) and not rows.done(tmp_path, "other")
    (pack,) = packs.packs(tmp_path)
    assert rows.compact(tmp_path).cells == 0 and packs.packs(tmp_path) == [pack]


def test_a_part_is_taken_up_again_and_a_full_pack_is_not(tmp_path, keys, monkeypatch):
    before = rows.read(tmp_path)
    one = rows.read(tmp_path).filter(polars.col("cell") == keys[0]).estimated_size()
    monkeypatch.setattr(packs, "FULL", int(4.5 * one))
    rows.compact(tmp_path)
    assert [path.name[:5] for path in packs.packs(tmp_path)] == ["full-", "full-", "part-"]
    full = packs.packs(tmp_path)[:2]
    more = [write(tmp_path, seed) for seed in (20, 21)]
    assert rows.compact(tmp_path).cells == 2
    assert files(tmp_path) == (0, 3) and set(full) < set(packs.packs(tmp_path))
    assert all(rows.done(tmp_path, key) for key in (*keys, *more))
    assert rows.read(tmp_path).filter(~polars.col("cell").is_in(more)).equals(before)


class Killed(BaseException):
    """No ``except`` or ``finally`` does anything more."""


@pytest.mark.parametrize("left", [0, 7], ids=["first", "taking up a part"])
def test_killed_at_every_step(tmp_path, monkeypatch, left):
    """Before each rename, removal and flush in turn: the rows are there once, and the next compaction ends the work."""
    survived = False
    for step in range(200):
        folder = tmp_path / str(step)
        cells = [write(folder, seed) for seed in range(left)]
        if left:
            rows.compact(folder)
        cells += [write(folder, seed) for seed in range(left, left + 5)]
        whole = rows.read(folder)
        packs._indices.clear()
        calls = 0

        def counted(real, step=step):
            def call(*arguments, **options):
                nonlocal calls
                calls += 1
                if calls > step:
                    raise Killed
                return real(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(packs, "FULL", int(3.5 * whole.estimated_size() / len(cells)))
            for name in ("replace", "unlink", "fsync"):
                patch.setattr(os, name, counted(getattr(os, name)))
            with contextlib.suppress(Killed):
                rows.compact(folder)
                survived = True
        packs._indices.clear()
        assert rows.read(folder).equals(whole)
        assert all(rows.done(folder, key) for key in cells)
        rows.compact(folder)
        assert files(folder)[0] == 0 and rows.read(folder).equals(whole)
        if survived:
            break
    assert survived and step > 10


def test_a_pack_that_is_not_whole_is_put_aside(tmp_path, keys):
    rows.compact(tmp_path)
    (first,) = packs.packs(tmp_path)
    first.rename(first.with_name(first.name.replace("part", "full")))
    more = [write(tmp_path, seed) for seed in (20, 21)]
    rows.compact(tmp_path)
    write(tmp_path, 3, answer="again")  # a cell of the first pack, in a file of its own too
    (first, second) = packs.packs(tmp_path)
    for where in (0.3, 0.999):
        saved = first.read_bytes()
        packs._indices.clear()
        flip(first, where)
        assert [rows.done(tmp_path, key) for key in keys] == [seed == 3 for seed in range(12)]
        assert all(rows.done(tmp_path, key) for key in more)
        found = rows.read(tmp_path)
        assert set(found["cell"]) == {keys[3], *more}
        assert set(found.filter(polars.col("cell") == keys[3])["answer"]) == {"again"}
        assert first.with_name(first.name + ".bad").exists() and packs.packs(tmp_path) == [second]
        first.write_bytes(saved)


def test_a_cell_in_two_places_counts_once(tmp_path, keys):
    saved = {path: path.read_bytes() for path in (tmp_path / "rows").iterdir()}
    before = rows.read(tmp_path)
    rows.compact(tmp_path)
    for path, data in list(saved.items())[:5]:
        path.write_bytes(data)
    assert rows.read(tmp_path).equals(before)
    assert rows.compact(tmp_path).cells == 5
    assert files(tmp_path) == (0, 1) and rows.read(tmp_path).equals(before)


def test_a_million_questions_open_no_pack_twice(tmp_path, keys, monkeypatch):
    rows.compact(tmp_path)
    read = []
    monkeypatch.setattr(packs, "load", lambda path, *more: read.append(path) or sealed.load(path, *more))
    for _ in range(100):
        assert all(rows.done(tmp_path, key) for key in keys) and not rows.done(tmp_path, "other")
    assert len(read) == 1
    more = write(tmp_path, 20)
    rows.compact(tmp_path)
    assert rows.done(tmp_path, more) and rows.done(tmp_path, keys[0])
    assert (
        len(read) == 1 + 2 + 1
    )  # the compaction took up the old pack and the new cell, and the new pack was looked at


def test_everything_at_once(tmp_path, monkeypatch):
    """Drivers write, two compactions run and readers read: whatever was written is there from then on, once."""
    monkeypatch.setattr(packs, "FULL", 20_000)
    written: list[str] = []
    wrong: list[object] = []
    stop = threading.Event()

    def watched(work):
        def run():
            try:
                work()
            except BaseException as error:
                wrong.append(error)
                stop.set()

        return threading.Thread(target=run)

    def drive():
        for seed in range(60):
            written.append(write(tmp_path, seed, 2))
        stop.set()

    def pack():
        while not stop.is_set():
            rows.compact(tmp_path)

    def look():
        while not stop.is_set():
            known = list(written)
            if missing := [key for key in known if not rows.done(tmp_path, key)]:
                wrong.append(missing)
            if known:
                counts = rows.read(tmp_path)["cell"].value_counts()
                if set(counts["count"]) != {2} or not set(known) <= set(counts["cell"]):
                    wrong.append(counts)

    (tmp_path / "rows").mkdir()
    threads = [watched(work) for work in (drive, pack, pack, look)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    rows.compact(tmp_path)
    assert files(tmp_path)[0] == 0 and set(rows.read(tmp_path)["cell"]) == set(written)


@contextlib.contextmanager
def file_limit(size: int):
    """No file of this process grows beyond so many bytes: a write in the middle fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_for_a_pack(tmp_path, keys):
    before = rows.read(tmp_path)
    with file_limit(5_000), pytest.raises(OSError, match="File too large"):
        rows.compact(tmp_path)
    assert files(tmp_path) == (12, 0) and list((tmp_path / "packs").iterdir()) == []
    assert rows.read(tmp_path).equals(before)
    rows.compact(tmp_path)
    assert rows.read(tmp_path).equals(before)


def test_what_killed_processes_left_goes_after_a_day(tmp_path, keys):
    old, new = (tmp_path / "rows" / f".{key}.parquet.77" for key in keys[:2])
    for path in (old, new):
        path.write_bytes(b"PAR1 half")
    os.utime(old, (time.time() - 2 * packs.STALE,) * 2)
    rows.compact(tmp_path)
    assert not old.exists() and new.exists()


def test_the_command(tmp_path, keys):
    run = CliRunner().invoke
    with claim(tmp_path, "compact"):
        refused = run(app, ["bench", "compact", str(tmp_path)])
    assert refused.exit_code == 2 and f"process {os.getpid()} on" in refused.stderr
    told = run(app, ["bench", "compact", str(tmp_path), "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["cells"] == 12 and files(tmp_path) == (0, 1)
    assert "0 cells packed: 1 files" in " ".join(run(app, ["bench", "compact", str(tmp_path)]).output.split())
    nothing = run(app, ["bench", "compact", str(tmp_path / "none")])
    assert nothing.exit_code == 2 and "must hold the results" in nothing.stderr


# Single files ---------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_found(tmp_path):
    """The seal is read by others as any entry of the metadata is; without it one flip in five gave other values."""
    key = write(tmp_path, 0)
    path, before = rows.place(tmp_path, key), rows.read(tmp_path)
    data = path.read_bytes()
    assert polars.read_parquet(path).equals(before) and "vistok" in polars.read_parquet_metadata(path)
    draw = random.Random(0)
    for _ in range(300):
        flipped = bytearray(data)
        flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        # A flip in the name of the seal leaves a file without one, whose rows are right.
        assert not rows.done(tmp_path, key) or rows.read(tmp_path).equals(before)
        assert path.with_name(path.name + ".bad").exists() or path.exists()


def test_files_of_other_schemas_are_left_alone(tmp_path, keys):
    path = rows.place(tmp_path, keys[0])
    old = rows.read(tmp_path).filter(polars.col("cell") == keys[0])
    buffer = io.BytesIO()
    old.drop("kept").write_parquet(buffer)
    for data in (buffer.getvalue(), sealed.seal(old.drop("kept"), sealed.Schema(1, tuple(old.columns)))):
        path.write_bytes(data)
        assert not rows.done(tmp_path, keys[0])
        assert set(rows.read(tmp_path)["cell"]) == set(keys[1:])
        rows.compact(tmp_path)
        assert path.read_bytes() == data
    old.write_parquet(path)  # of this schema, from before there were seals
    assert rows.done(tmp_path, keys[0])
    rows.compact(tmp_path)
    assert not path.exists() and set(rows.read(tmp_path)["cell"]) == set(keys)


@pytest.mark.parametrize("moment", ["before the question", "after it"])
def test_a_new_file_is_not_put_aside_for_the_old_one(tmp_path, monkeypatch, moment):
    """While one driver looks at a cut file, another has put it aside and written the cell anew."""
    key = write(tmp_path, 0)
    path = rows.place(tmp_path, key)
    data = path.read_bytes()
    path.write_bytes(data[:100])
    new = tmp_path / "new"
    new.write_bytes(data)
    where, name = (sealed, "_fits") if moment == "before the question" else (os, "rename")
    real = getattr(where, name)

    def meanwhile(*arguments):
        if new.exists():
            os.replace(new, path)
        return real(*arguments)

    monkeypatch.setattr(where, name, meanwhile)
    assert not rows.done(tmp_path, key)
    assert rows.done(tmp_path, key)
    assert path.read_bytes() == data and not path.with_name(path.name + ".bad").exists()


def test_a_file_that_cannot_be_opened_is_not_put_aside(tmp_path, monkeypatch):
    key = write(tmp_path, 0)

    def none_left(*arguments, **options):
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", none_left)
        with pytest.raises(OSError, match="Too many"):
            rows.done(tmp_path, key)
    assert rows.done(tmp_path, key)
