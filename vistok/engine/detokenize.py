"""The pictures of a folder of tokens as PNG files, each under its source key, wherever the work was stopped before."""

from __future__ import annotations

import hashlib
import itertools
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from vistok.engine.cells import Resources
from vistok.engine.schedule import Engine
from vistok.engine.tokens import (
    MANIFEST,
    PIECE,
    Loaded,
    Manifest,
    Report,
    Watch,
    collect,
    fingerprint_of,
    loaded,
    replaced,
    rows_of,
)
from vistok.parts.tokenizer import Tokenizer

_NAME = 120  # bytes of a folder or a file of pictures; file systems take 255


@dataclass(frozen=True)
class Written:
    """A shard of a folder of tokens."""

    key: str
    path: str


def detokenize(
    folder: Path,
    out: Path,
    *,
    engine: Engine,
    tokenizer: str | None = None,
    resources: Resources | None = None,
    watch: Watch | None = None,
) -> Report:
    """Write the pictures of a folder of tokens as PNGs to ``out``, under their source keys with ".png" behind.

    Goes on where a run before was stopped. Of a run of ``tokenize`` that is not complete, the shards that are there.

    Args:
        tokenizer: where the tokenizer is now, if not where it was.

    Raises:
        ValueError: ``folder`` holds no tokens, or ``tokenizer`` is not the one that made them.
        LookupError: no such tokenizer.
    """
    manifest = Manifest.read(folder)
    if manifest is None:
        raise ValueError(f"folder: {folder} has no {MANIFEST}, must be one that `vistok tokenize` wrote")
    needs = resources or Resources()
    name = tokenizer or manifest.tokenizer
    if fingerprint_of(name) != manifest.fingerprint:
        raise ValueError(f"tokenizer: {name} is not the one that the ids in {folder} are of")
    marks = out.resolve() / ".done"
    marks.mkdir(parents=True, exist_ok=True)
    cells = [Written(path.stem, str(path.resolve())) for path in sorted((folder / "shards").glob("*.parquet"))]
    report = Report(manifest)
    ended = engine.map(
        cells,
        partial(_detokenize, out.resolve()),
        setup=partial(loaded, name, manifest.fingerprint, "cuda" if needs.gpus else "cpu", needs.cpus),
        resources=needs,
        on_done=watch,
        folder=marks,
        done=partial(_is_marked, marks),
    )
    with closing(ended):
        collect(ended, report)
    return report


def _is_marked(marks: Path, key: str) -> bool:
    return (marks / key).exists()


def _detokenize(out: Path, worker: Loaded, written: Written) -> tuple[int, int]:
    """Write the pictures of one shard."""
    rows, count = rows_of(Path(written.path)), 0
    while piece := list(itertools.islice(rows, PIECE)):
        for row, pixels in zip(piece, _decoded(worker.model, piece), strict=True):
            _write_png(out / picture_path(row["source"]), pixels)
        count += len(piece)
    (out / ".done" / written.key).touch()
    return count, 0


@torch.inference_mode()
def _decoded(model: Tokenizer, rows: list[dict[str, Any]]) -> torch.Tensor:
    """(B, H, W, 3) uint8: the pictures of rows; shorter ones have -1 behind."""
    columns = len(model.format.sizes)
    tokens = [torch.tensor(row["ids"]).unflatten(0, (-1, columns) if columns > 1 else (-1,)) for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=-1)
    made = model.decode_ids(ids.to(next(model.parameters()).device))
    return (made * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def picture_path(source: str) -> Path:
    """Where the picture of a source key goes, relative to the folder: never outside of it, and no two keys to one file.

    >>> picture_path("cats/1.jpg").as_posix(), picture_path("../a b").as_posix()
    ('cats/1.jpg.png', '%2E%2E/a b.png')
    """
    parts = [_safe(part) for part in source.split("/")]
    return Path(*parts[:-1], f"{parts[-1]}.png")


def _safe(part: str) -> str:
    """A name that every file system takes and that means nothing but itself."""
    made = "".join(c if c.isalnum() or c in "-_. " else quote(c, safe="") for c in part) or "%"
    if made.startswith("."):  # also what this folder keeps for itself
        made = "%2E" + made[1:]
    return made if len(made.encode()) <= _NAME else f"{made[:40]}%{hashlib.sha256(part.encode()).hexdigest()}"


def _write_png(path: Path, pixels: torch.Tensor) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path, sync=False) as other:
        Image.fromarray(pixels.numpy()).save(other, format="PNG")
