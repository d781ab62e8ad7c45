"""Memory and speed of ``vistok tokenize`` by the size of the corpus: python -m benchmarks.tokenize_corpus

Writes corpora of tiny pictures (8 x 8 PNGs, 256 different ones), turns each into ids with an untrained tokenizer of
16 px in a process of its own, and prints the most main memory that the process had, and pictures a second. The first
run is of the smallest corpus; a process that holds no part of its corpus needs no more for the largest.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

import vistok
from benchmarks.common import machine_line

FORMS = ("folder", "tar", "parquet")


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def write_folder(place: Path, count: int, data: list[bytes]) -> str:
    """One flat folder, the hardest to list."""
    place.mkdir()
    for i in range(count):
        (place / f"{i:08}.png").write_bytes(data[i % len(data)])
    return str(place)


def write_tar(place: Path, count: int, data: list[bytes]) -> str:
    """One archive, so that a shard has all pictures."""
    path = place.with_suffix(".tar")
    with tarfile.open(path, "w") as archive:
        for i in range(count):
            member = tarfile.TarInfo(f"{i:08}.png")
            member.size = len(data[i % len(data)])
            archive.addfile(member, io.BytesIO(data[i % len(data)]))
            archive.members.clear()  # type: ignore[attr-defined]
    return str(path)


def write_parquet(place: Path, count: int, data: list[bytes]) -> str:
    path = place.with_suffix(".parquet")
    with pq.ParquetWriter(path, pa.schema([("image", pa.binary())])) as writer:
        for start in range(0, count, 1000):
            rows = [data[i % len(data)] for i in range(start, min(start + 1000, count))]
            writer.write_table(pa.table({"image": rows}))
    return str(path)


WRITERS: dict[str, Callable[[Path, int, list[bytes]], str]] = dict(
    zip(FORMS, (write_folder, write_tar, write_parquet), strict=True)
)


def measured(source: str, tokenizer: Path, out: Path) -> tuple[float, float]:
    """Seconds and the peak of main memory in MB of one run."""
    order = [sys.executable, "-m", "vistok", "tokenize", source, "--tokenizer", str(tokenizer), "--out", str(out)]
    start = time.perf_counter()
    process = subprocess.Popen([*order, "--shard-size", "1000"], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"vistok tokenize {source} ended with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - start, used.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, nargs="+", default=[1_000, 100_000])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = vistok.create("vq-grid", size="T", image=16, patch=8, codes=64, dim=4).build()
    model(torch.rand(8, 3, 16, 16))
    data = [png(seed) for seed in range(256)]
    print(machine_line())
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        tokenizer = model.eval().save(place / "tokenizer")
        for form in options.forms:
            for count in options.pictures:
                source = WRITERS[form](place / f"{form}-{count}", count, data)
                seconds, peak = measured(source, tokenizer, place / f"out-{form}-{count}")
                print(
                    f"{form:8} {count:9,} pictures: peak {peak:6.0f} MB, {seconds:6.1f} s, "
                    f"{count / seconds:6.0f} pictures/s, start included",
                    flush=True,
                )


if __name__ == "__main__":
    main()
