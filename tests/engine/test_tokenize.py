"""A corpus as ids: every picture once whatever happens, the same ids however the work is shared, and back."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import vistok
from vistok.bench.pictures import decode_picture
from vistok.engine import LocalEngine, corpus
from vistok.engine.corpus import plan, read, shards
from vistok.engine.detokenize import detokenize, picture_path
from vistok.engine.tokenize import tokenize
from vistok.engine.tokens import MANIFEST, Manifest

SIDE = 16


def png(seed: int, size: tuple[int, int] = (20, 24), kind: str = "PNG") -> bytes:
    """A picture of smooth noise as a file's bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size[::-1]).save(file, format=kind)
    return file.getvalue()


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory) -> str:
    torch.manual_seed(0)
    model = vistok.create("vq-grid", size="T", image=SIDE, patch=4, codes=64, dim=4).build()
    model(torch.rand(8, 3, SIDE, SIDE))
    return str(model.eval().save(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def pictures(tmp_path) -> Path:
    """70 pictures in two folders, and files that are none: two rejects."""
    folder = tmp_path / "pictures"
    (folder / "b").mkdir(parents=True)
    for i in range(70):
        (folder / ("b" if i % 2 else "") / f"{i:03}.png").write_bytes(png(i))
    (folder / "040b.jpg").write_bytes(b"this is no picture")
    (folder / "061b.png").write_bytes(png(1)[:80])
    (folder / "notes.txt").write_text("not a picture, and not said to be one")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


def work(source, tokenizer, folder, engine=None, opener=decode_picture, **how):
    engine = engine or LocalEngine(1)
    return tokenize(str(source), tokenizer, folder, opener=opener, engine=engine, **{"shard_size": 32, **how})


def rows(folder: Path) -> list[dict]:
    return [row for path in sorted((folder / "shards").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def rejects(folder: Path) -> dict[str, str]:
    return {row["source"]: row["reason"] for row in pq.read_table(folder / "rejects.parquet").to_pylist()}


def by_source(folder: Path) -> dict[str, list[int]]:
    found = rows(folder)
    made = {row["source"]: row["ids"] for row in found}
    assert len(made) == len(found) == len({row["key"] for row in found})
    return made


def test_what_a_row_says(pictures, small_tokenizer, tmp_path):
    report = work(pictures, small_tokenizer, tmp_path / "out")
    made = report.manifest
    assert (made.complete, made.pictures, made.rejects, made.total) == (True, 70, 2, 3)
    assert made == Manifest.read(tmp_path / "out")
    found = rows(tmp_path / "out")
    assert [row["source"] for row in found] == sorted(row["source"] for row in found)
    model = vistok.load(small_tokenizer, device="cpu")
    for row in (found[0], found[37], found[-1]):
        data = (pictures / row["source"]).read_bytes()
        image = Image.open(io.BytesIO(data)).convert("RGB").crop((2, 0, 22, 20)).resize((SIDE,) * 2, Image.LANCZOS)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        codes = model.encode(x)
        assert row["ids"] == codes.ids.flatten().tolist() and row["shape"] == [4, 4]
        assert row["bits"] == int(codes.bits) == 16 * 6
        assert row["checksum"] == __import__("hashlib").sha256(data).hexdigest()
    why = rejects(tmp_path / "out")
    assert set(why) == {"040b.jpg", "061b.png"}
    assert "must be a picture" in why["040b.jpg"] and "cut off or corrupt" in why["061b.png"]
    assert made.shards[0]["rows"] + made.shards[1]["rows"] + made.shards[2]["rows"] == 70
    assert not (tmp_path / "out" / "rejects").exists() and not list((tmp_path / "out" / "claims").iterdir())


@pytest.mark.slow
def test_ids_do_not_hang_on_how_the_work_is_shared(pictures, small_tokenizer, tmp_path, processes):
    work(pictures, small_tokenizer, tmp_path / "plain")
    work(pictures, small_tokenizer, tmp_path / "other", processes, shard_size=9, batch_size=5)
    assert by_source(tmp_path / "plain") == by_source(tmp_path / "other")
    assert rejects(tmp_path / "plain") == rejects(tmp_path / "other")


def test_ids_do_not_hang_on_neighbours_and_threads_open_alike(pictures, small_tokenizer, tmp_path, monkeypatch):
    work(pictures, small_tokenizer, tmp_path / "all")
    work(pictures / "033.png" if (pictures / "033.png").exists() else pictures / "b/033.png", small_tokenizer,
         tmp_path / "one")  # fmt: skip
    assert rows(tmp_path / "one")[0]["ids"] == by_source(tmp_path / "all")["b/033.png"]
    from vistok.engine.tokenize import _open, _opened

    folder = tmp_path / "all" / "plan"
    found = []
    for batch, threads in ((1, 1), (3, 2), (100, 2)):
        items = (item for shard in shards(folder) for item in read(shard))
        found.append([(i.source, x) for i, x in _opened(items, batch, threads, partial(_open, SIDE, decode_picture))])
    for other in found[1:]:
        for (name, x), (same, y) in zip(found[0], other, strict=True):
            assert name == same and (x == y if isinstance(x, str) else torch.equal(x, y))


# Stopped and begun again ----------------------------------------------------------------------------------------------


def killed_at(moment: int, before: bool, source, tokenizer, folder) -> None:
    """Tokenize in a process that kills itself before or after it renames the ``moment``-th file."""
    count, rename = 0, os.replace

    def replace(one, other):
        nonlocal count
        count += 1
        if count == moment and before:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(one, other)
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace
    torch.set_num_threads(1)
    work(source, tokenizer, folder)


def test_killed_at_every_rename(pictures, small_tokenizer, tmp_path):
    work(pictures, small_tokenizer, tmp_path / "plain")
    expected, why = by_source(tmp_path / "plain"), rejects(tmp_path / "plain")
    fork = multiprocessing.get_context("fork")
    moments = 0
    for moment in range(1, 20):
        for before in (True, False):
            out = tmp_path / f"out-{moment}-{before}"
            process = fork.Process(target=killed_at, args=(moment, before, pictures, small_tokenizer, out))
            process.start()
            process.join(60)
            if process.exitcode == 0:
                assert moment > 7 and moments == 2 * (moment - 1)
                return
            assert process.exitcode == -signal.SIGKILL
            moments += 1
            report = work(pictures, small_tokenizer, out)
            assert report.manifest.complete and report.manifest.pictures == 70
            assert by_source(out) == expected and rejects(out) == why
            assert not list(out.rglob(".*")), "what the killed process left is cleared away"
    raise AssertionError("more renames than thought")


def killed_while_opening(number: int, source, tokenizer, folder) -> None:
    OPENED.clear()
    torch.set_num_threads(1)
    work(source, tokenizer, folder, opener=partial(kills_at, number))


OPENED: list[object] = []


def kills_at(number: int, file, name):
    OPENED.append(name)
    if len(OPENED) == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return decode_picture(file, name)


def test_killed_again_and_again_in_the_middle_of_shards(pictures, small_tokenizer, tmp_path):
    """Each run does at least its first shard, if it is given the time, and no shard is done twice."""
    work(pictures, small_tokenizer, tmp_path / "plain")
    out, fork, times = tmp_path / "out", multiprocessing.get_context("fork"), {}
    for number in (5, 40, 33, 4):
        process = fork.Process(target=killed_while_opening, args=(number, pictures, small_tokenizer, out))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        for path in (out / "shards").glob("*.parquet"):
            assert times.setdefault(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
    work(pictures, small_tokenizer, out)
    assert all((out / "shards" / name).stat().st_mtime_ns == time for name, time in times.items()) and len(times) == 2
    assert by_source(out) == by_source(tmp_path / "plain") and rejects(out) == rejects(tmp_path / "plain")


@pytest.mark.slow
def test_the_command_is_killed_and_goes_on(small_tokenizer, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(600):
        (folder / f"{i:04}.png").write_bytes(png(i, (40, 40)))
    out = tmp_path / "out"
    order = [sys.executable, "-m", "vistok", "tokenize", str(folder), "--tokenizer", small_tokenizer, "--out", str(out)]
    process = subprocess.Popen([*order, "--shard-size", "40"], cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 90
    while len(list(out.glob("shards/0*.parquet"))) < 3 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 3 <= len(list(out.glob("shards/0*.parquet"))) < 15 and not Manifest.read(out).complete
    made = work(folder, small_tokenizer, out, shard_size=40).manifest
    assert made.complete and made.pictures == 600 and len(by_source(out)) == 600


def test_two_runs_share_a_folder(pictures, small_tokenizer, tmp_path):
    out, fork = tmp_path / "out", multiprocessing.get_context("fork")
    work(pictures, small_tokenizer, tmp_path / "plain")
    for _ in range(2):  # the plan first, which one alone makes
        process = fork.Process(target=killed_while_opening, args=(1, pictures, small_tokenizer, out))
        process.start()
        process.join(60)
    both = [fork.Process(target=work, args=(pictures, small_tokenizer, out), kwargs={"shard_size": 32}) for _ in "ab"]
    for one in both:
        one.start()
    for one in both:
        one.join(60)
        assert one.exitcode == 0
    assert work(pictures, small_tokenizer, out).manifest.pictures == 70
    assert by_source(out) == by_source(tmp_path / "plain")


def test_the_corpus_is_what_it_was_when_it_was_listed(pictures, small_tokenizer, tmp_path):
    out, fork = tmp_path / "out", multiprocessing.get_context("fork")
    process = fork.Process(target=killed_while_opening, args=(5, pictures, small_tokenizer, out))
    process.start()
    process.join(60)
    (pictures / "000.png").unlink()
    (pictures / "new.png").write_bytes(png(99))
    made = work(pictures, small_tokenizer, out).manifest
    assert (made.pictures, made.rejects) == (69, 3)
    assert rejects(out)["000.png"] == "it cannot be read (No such file or directory)"
    assert "new.png" not in by_source(out)


def test_a_folder_is_for_one_corpus_and_one_tokenizer(pictures, small_tokenizer, tmp_path):
    work(pictures, small_tokenizer, tmp_path / "out")
    with pytest.raises(ValueError, match="holds tokens with shard_size 32, must be another folder for 31"):
        work(pictures, small_tokenizer, tmp_path / "out", shard_size=31)
    torch.manual_seed(1)
    other = vistok.create("vq-grid", size="T", image=SIDE, patch=4, codes=64, dim=4).build().save(tmp_path / "other")
    with pytest.raises(ValueError, match="holds tokens with fingerprint"):
        work(pictures, str(other), tmp_path / "out")
    with pytest.raises(ValueError, match="is not the one that the ids in"):
        detokenize(tmp_path / "out", tmp_path / "back", engine=LocalEngine(1), tokenizer=str(other))
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        detokenize(tmp_path, tmp_path / "back", engine=LocalEngine(1))
    (tmp_path / "out" / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"holds shards without a manifest\.json"):
        work(pictures, small_tokenizer, tmp_path / "out")
    (tmp_path / "out" / MANIFEST).write_text('{"version": 99}')
    with pytest.raises(ValueError, match="is not of tokens of version 1"):
        work(pictures, small_tokenizer, tmp_path / "out")
    (tmp_path / "mine" / "plan").mkdir(parents=True)
    (tmp_path / "mine" / "plan" / "holidays.txt").touch()
    with pytest.raises(ValueError, match="holds a plan of somebody else's"):
        work(pictures, small_tokenizer, tmp_path / "mine")
    assert (tmp_path / "mine" / "plan" / "holidays.txt").exists()
    for name in ("vistok-tiny", str(tmp_path)):
        with pytest.raises((ValueError, LookupError), match=r"vistok-tiny|config"):
            work(pictures, name, tmp_path / "new")
    for source, why in (("/no/such", "there is no such"), (str(tmp_path / "*.nix"), "must fit at least one file")):
        with pytest.raises(ValueError, match=why):
            work(source, small_tokenizer, tmp_path / "new")
    with pytest.raises(ValueError, match="batch_size: got 0"):
        work(pictures, small_tokenizer, tmp_path / "new", batch_size=0)


# Sources --------------------------------------------------------------------------------------------------------------


def items(source, folder: Path, size: int = 4, column: str = "image"):
    folder.mkdir()
    plan(str(source), folder, size)
    return [item for shard in shards(folder) for item in read(shard, column)]


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def test_archives(small_tokenizer, tmp_path):
    (tmp_path / "data" / "x").mkdir(parents=True)
    for name, numbers in (("a.tar", range(5)), ("x/b.tar", range(5, 8))):
        with tarfile.open(tmp_path / "data" / name, "w") as archive:
            for i in numbers:
                add(archive, f"{i:04}.cls", b"3")
                add(archive, f"{i:04}.png", png(i))
    source = tmp_path / "data" / "**" / "*.tar"
    found = items(source, tmp_path / "plan")
    assert [item.source for item in found] == [f"{'a' if i < 5 else 'x/b'}.tar/{i:04}.png" for i in range(8)]
    assert [item.data for item in found] == [png(i) for i in range(8)]
    made = work(source, small_tokenizer, tmp_path / "out").manifest
    assert (made.total, made.pictures, made.rejects) == (2, 8, 0)
    whole = (tmp_path / "data" / "a.tar").read_bytes()
    (tmp_path / "data" / "a.tar").write_bytes(whole[: whole.index(b"0003.png") + 700])
    found = items(tmp_path / "data" / "a.tar", tmp_path / "plan 2")
    assert [item.source for item in found] == ["a.tar/0000.png", "a.tar/0001.png", "a.tar/0002.png", "a.tar"]
    assert found[-1].data is None and "cut off or corrupt" in found[-1].reason
    (tmp_path / "data" / "a.tar").write_bytes(b"no archive at all" * 100)
    (only,) = items(tmp_path / "data" / "a.tar", tmp_path / "plan 3")
    assert only.source == "a.tar" and only.data is None


def test_tables(small_tokenizer, tmp_path):
    data = [png(i) for i in range(10)]
    pq.write_table(pa.table({"image": data, "label": list(range(10))}), tmp_path / "a.parquet", row_group_size=3)
    hugging = [{"bytes": one, "path": "x"} for one in data[:4]] + [None, {"bytes": None, "path": "y"}]
    pq.write_table(pa.table({"image": hugging}), tmp_path / "b.parquet")
    found = items(tmp_path / "*.parquet", tmp_path / "plan", 6)
    assert [item.source for item in found] == [f"a.parquet/{i}" for i in range(10)] + [
        f"b.parquet/{i}" for i in range(6)
    ]
    assert [item.data for item in found] == [*data, *data[:4], None, None]
    assert found[-1].reason == found[-2].reason == "there is no picture in this row"
    assert [(s.first, s.count, s.row) for s in shards(tmp_path / "plan")] == [(0, 2, 0), (2, 2, 6), (0, 1, 0)]
    for column, why in (("picture", "must be one of image, label"), ("label", "of int64, must hold bytes")):
        failed = work(tmp_path / "a.parquet", small_tokenizer, tmp_path / column, column=column)
        assert not failed.manifest.complete and why in failed.failed[0]
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:-9])
    (only,) = items(tmp_path / "a.parquet", tmp_path / "plan 2")
    assert only.data is None and "corrupt" in only.reason
    with pytest.raises(ValueError, match="must fit files of one kind"):
        (tmp_path / "c.tar").touch()
        items(tmp_path / "*.*", tmp_path / "plan 3")


def test_listing_is_sorted_without_holding_it(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_RUN", 3)
    names = ["b/2.png", "a.png", "b/10.jpg", "c/d/e.webp", "z.PNG", "ä.png", "b b.png", "new\nline.png"]
    for name in names:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(name.encode())
    odd = os.fsencode(tmp_path / "data") + b"/\xff.png"
    Path(os.fsdecode(odd)).write_bytes(b"odd")
    (tmp_path / "data" / "ring").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "lost.png").symlink_to(tmp_path / "nowhere")
    found = items(tmp_path / "data", tmp_path / "plan", 2)
    assert [item.source for item in found] == [*sorted(names), "\\xff.png"]
    assert [item.data for item in found[:-1]] == [name.encode() for name in sorted(names)]
    assert found[-1].data == b"odd"
    assert sorted(path.name for path in (tmp_path / "plan").iterdir()) == ["names.jsonl", "shards.jsonl"]
    with pytest.raises(ValueError, match="must hold pictures"):
        (tmp_path / "none").mkdir()
        items(tmp_path / "none", tmp_path / "plan 2")


def test_hostile_pictures(small_tokenizer, tmp_path, monkeypatch):
    """A bomb is refused by its header, a thin one costs no more than it has pixels, a huge file is not read."""
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("L", (8_000, 8_000)).save(folder / "bomb.png", compress_level=1)
    Image.new("RGB", (60_000, 1), "red").save(folder / "thin.png")
    (folder / "large.png").write_bytes(png(0) + bytes(1_000_000))
    os.mkfifo(folder / "pipe")
    monkeypatch.setattr(corpus, "LARGEST_BYTES", 1_000_000)
    start = time.monotonic()
    work(folder, small_tokenizer, tmp_path / "out")
    assert time.monotonic() - start < 20
    assert [row["source"] for row in rows(tmp_path / "out")] == ["thin.png"]
    why = rejects(tmp_path / "out")
    assert "50 megapixels" in why["bomb.png"]
    assert "at most 1000000 bytes" in why["large.png"]


# Back -----------------------------------------------------------------------------------------------------------------


def test_back_to_pictures(pictures, small_tokenizer, tmp_path):
    work(pictures, small_tokenizer, tmp_path / "out")
    for _ in range(2):  # the second finds all done
        report = detokenize(tmp_path / "out", tmp_path / "back", engine=LocalEngine(1))
        assert not report.failed
    model = vistok.load(small_tokenizer, device="cpu")
    found = sorted(path.relative_to(tmp_path / "back").as_posix() for path in (tmp_path / "back").rglob("*.png"))
    assert found == sorted(f"{row['source']}.png" for row in rows(tmp_path / "out")) and len(found) == 70
    row = rows(tmp_path / "out")[40]
    expected = model.decode_ids(torch.tensor(row["ids"])[None])[0].permute(1, 2, 0) * 255
    made = np.array(Image.open(tmp_path / "back" / f"{row['source']}.png"))
    assert np.abs(made - expected.detach().numpy()).max() < 1
    (tmp_path / "back" / ".done" / "000001").unlink()
    gone = tmp_path / "back" / f"{rows(tmp_path / 'out')[45]['source']}.png"
    gone.unlink()
    detokenize(tmp_path / "out", tmp_path / "back", engine=LocalEngine(1))
    assert gone.exists()


def test_tokens_of_different_number(tmp_path):
    """A tokenizer that gives some pictures fewer tokens stores no more than these, and gets them back."""
    from vistok.engine.detokenize import _decoded
    from vistok.engine.tokenize import _encoded

    torch.manual_seed(0)
    model = vistok.create("one-d-piece", size="T", tokens=6, image=SIDE, patch=4, codes=32, dim=4).build()
    model(torch.rand(4, 3, SIDE, SIDE))
    model.eval()
    plain = model.encode

    def encode(images):
        return plain(images).prefix(torch.arange(len(images)) % 6 + 1)

    model.encode = encode
    pixels = list(torch.rand(7, 3, SIDE, SIDE))
    found = _encoded(model, pixels)[:7]
    assert [(len(row["ids"]), row["shape"], row["bits"]) for row in found] == [
        (n, [n], 5 * n) for n in (1, 2, 3, 4, 5, 6, 1)
    ]
    with torch.no_grad():
        expected = model.decode(encode(torch.stack(pixels))).permute(0, 2, 3, 1) * 255
    made = _decoded(model, [{**row, "ids": row["ids"].tolist()} for row in found])
    assert float((made.float() - expected).abs().max()) <= 0.51


def test_names_of_pictures_stay_inside_and_apart():
    names = [
        "a.png", "a.png.png", "../a.png", "a/../../b", "/etc/passwd", "", ".", "..", "%2E", ".done/0", "a\\b", "a\0b",
        "é.png", "e\u0301.png", "a" * 300, "a" * 301, "a//b", "a/b", "C:x", "a%b", "x/\\xff.png", "." * 200,
    ]  # fmt: skip
    paths = [picture_path(name) for name in names]
    assert len(set(paths)) == len(names)
    for path in paths:
        assert not path.is_absolute() and path.suffix == ".png"
        assert not any(part in ("..", ".", "") or part.startswith(".") for part in path.parts)
        assert all(len(part.encode()) <= 255 and "\0" not in part and "\\" not in part for part in path.parts)


def test_a_manifest_is_json(pictures, small_tokenizer, tmp_path):
    work(pictures, small_tokenizer, tmp_path / "out")
    told = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert told["sizes"] == [64] and told["grid"] == [4, 4] and told["image"] == [SIDE, SIDE]
    assert [shard["file"] for shard in told["shards"]] == [f"shards/00000{i}.parquet" for i in range(3)]
