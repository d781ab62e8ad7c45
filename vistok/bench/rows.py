"""What a sweep measured, on disk: one Parquet file a cell, one row a question, for polars, DuckDB or anything else.

``COLUMNS`` is the schema; ``sweep.VERSION`` counts its changes. A file is whole or not there. What cannot be read is
put aside under its name with ".bad" behind it, and its cell counts as not measured.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .report import replace_file
from .sweep import VERSION, Cell

if TYPE_CHECKING:
    import polars

COLUMNS: Mapping[str, tuple[str, str]] = {
    "version": ("Int32", "of this schema"),
    "cell": ("String", "the cell's key"),
    "model": ("String", "as it was named"),
    "method": ("String", "as it was named; dense is the model as it is"),
    "hyper": ("String", "the method's hyper-parameters that were set, as JSON"),
    "keep": ("Float64", "what was asked for: a count (`counted`) or a share of each picture's tokens"),
    "counted": ("Boolean", "whether `keep` is a count"),
    "task": ("String", "of the world"),
    "protocol": ("String", "how it was asked; identity: all tokens kept, held against the dense model"),
    "precision": ("String", "of weights and activations"),
    "seed": ("Int64", "of the pictures, and of methods that draw"),
    "question": ("String", "which one, the same in every cell that asked it"),
    "family": ("String", "of the question"),
    "asked": ("String", "the question"),
    "truth": ("String", "the right answer"),
    "answer": ("String", "what the model said"),
    "correct": ("Boolean", "whether that is right; identity: whether all logits were the same bits"),
    "chrf": ("Float64", "of a long answer: its chrF against the truth, 0 to 100"),
    "tokens_in": ("Int64", "visual tokens of the picture"),
    "tokens_input": ("Int64", "of them, those that the language model was given"),
    "tokens_mean": ("Float64", "of them, mean over the decoder's layers, counted from the sequence that ran"),
    "evidence_recall": ("Float64", "share of the answer's pixels under tokens that stayed, mean over the layers"),
    "ttft_ms": ("Float64", "milliseconds to the first token of one question, median; the same in all rows of a cell"),
    "ttft_spread_ms": ("Float64", "distance of its quartiles"),
    "ttft_over_dense": ("Float64", "median of its ratios to the dense model's, measured in turn"),
    "vision_ms": ("Float64", "of it: vision encoder and projector, median"),
    "select_ms": ("Float64", "of it: evidence and method, median"),
    "prefill_ms": ("Float64", "of it: the language model's layers, median"),
    "flops": ("Float64", "up to the first token, from shapes"),
    "kv_bytes": ("Int64", "of the cache after the prompt"),
    "machine": ("String", "what it ran on"),
    "versions": ("String", "of vistok, torch and transformers, and the commit"),
    "date": ("String", "when, UTC, ISO 8601"),
}
"""Column -> (polars type, meaning)."""


def place(folder: Path, key: str) -> Path:
    """Where the rows of a cell lie."""
    return folder / "rows" / f"{key}.parquet"


def done(folder: Path, key: str) -> bool:
    """Whether the rows of a cell are there and can be read; ones that cannot are put aside."""
    return bool(read_files([place(folder, key)]))


def write(folder: Path, cell: Cell, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write the rows of ``cell``, which hold the columns that it does not know itself."""
    import polars

    known = {
        "version": VERSION,
        "cell": cell.key,
        "model": cell.model,
        "method": cell.method,
        "hyper": json.dumps(dict(cell.hyper)),
        "keep": float(cell.keep),
        "counted": isinstance(cell.keep, int),
        "task": cell.task,
        "protocol": cell.protocol,
        "precision": cell.precision,
        "seed": cell.seed,
    }
    full = [{**dict.fromkeys(COLUMNS), **known, **row} for row in rows]
    frame = polars.DataFrame(full, schema={name: getattr(polars, kind) for name, (kind, _) in COLUMNS.items()})
    path = place(folder, cell.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    replace_file(path, buffer.getvalue())
    return path


def read(folder: Path) -> polars.DataFrame:
    """All rows of a sweep's folder, by cell and question. Raises ValueError where there are none."""
    import polars

    frames = read_files(sorted((folder / "rows").glob("*.parquet")))
    if not frames:
        raise ValueError(f"{folder}: holds no results of `vistok bench run`")
    return polars.concat(frames)


def read_files(paths: Iterable[Path]) -> list[polars.DataFrame]:
    """The rows of each file that is there, whole, and of this version."""
    import polars

    found = []
    for path in paths:
        if not path.exists():
            continue
        try:
            frame = polars.read_parquet(path)
        except (polars.exceptions.PolarsError, OSError):
            os.replace(path, path.with_name(path.name + ".bad"))
            continue
        if list(frame.columns) == list(COLUMNS) and set(frame["version"]) == {VERSION}:
            found.append(frame)
    return found
