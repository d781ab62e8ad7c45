"""What a sweep measured, on disk: one Parquet file a cell, one row a question, for polars, DuckDB or anything else.

The files are FOLDER/rows/KEY.parquet. ``compact`` moves what is there into few files, FOLDER/packs/*.parquet, of the
same columns; other readers take both, and a cell that is in two files (for the moment between) from one of them.

``COLUMNS`` is the schema; ``sweep.VERSION`` counts its changes. A file is whole or not there (``sealed``). One that is
not whole all the same is put aside under its name with ".bad" behind it, and its cells count as not measured, unless
they are in another file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import packs
from .report import replace_file
from .sealed import Schema, content, load, seal
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
    "task": ("String", "of the world, or the name that the user gave to pictures of his own"),
    "protocol": ("String", "how it was asked; identity: all tokens kept, held against the dense model"),
    "data": ("String", "digest of the user's own pictures and questions; empty for the world"),
    "precision": ("String", "of weights and activations"),
    "weights": ("String", "how the language model's weights are held: none (as `precision`), int8, int4"),
    "cache": ("String", "how keys and values are held: none (as `precision`), or the backend of the quantized cache"),
    "n": ("Int64", "pictures of the cell"),
    "seed": ("Int64", "of the pictures, and of methods that draw"),
    "question": ("String", "which one, the same in every cell that asked it"),
    "family": ("String", "of the question"),
    "asked": ("String", "the question"),
    "truth": ("String", "the right answer"),
    "answer": ("String", "what the model said"),
    "correct": ("Boolean", "whether that is right; identity: whether all logits were the same bits"),
    "chrf": ("Float64", "of a long answer: its chrF against the truth, 0 to 100"),
    "probability": ("Float64", "that the model, drawing tokens, says the right answer; where it was asked for"),
    "confidence": ("Float64", "likewise, that it says the answer that it gave"),
    "tokens_in": ("Int64", "visual tokens of the picture"),
    "tokens_input": ("Int64", "of them, those that the language model was given"),
    "tokens_mean": ("Float64", "of them, mean over the decoder's layers, counted from the sequence that ran"),
    "evidence_recall": ("Float64", "share of the answer's pixels under tokens that stayed, mean over the layers"),
    "kept": ("List(Int32)", "positions of the tokens that were left after the last stage, raster order"),
    "grid_height": ("Int32", "rows of the grid that the positions count; null where the tokens form no one grid"),
    "grid_width": ("Int32", "its columns"),
    "ttft_ms": ("Float64", "milliseconds to the first token of one question, median; the same in all rows of a cell"),
    "ttft_spread_ms": ("Float64", "distance of its quartiles"),
    "ttft_over_dense": ("Float64", "median of its ratios to the dense model's, measured in turn"),
    "vision_ms": ("Float64", "of it: vision encoder and projector, median"),
    "select_ms": ("Float64", "of it: evidence and method, median"),
    "prefill_ms": ("Float64", "of it: the language model's layers, median"),
    "decode_ms": ("Float64", "the language model's layers for one more token, median"),
    "flops": ("Float64", "up to the first token, from shapes"),
    "kv_bytes": ("Int64", "of the cache after the prompt"),
    "weight_bytes": ("Int64", "of the model's weights and buffers"),
    "peak_bytes": ("Int64", "memory that one question needs beside them at its peak: resident set, or CUDA allocator"),
    "energy_j": ("Float64", "joules up to the first token, mean; null where the machine does not tell"),
    "machine": ("String", "what it ran on"),
    "versions": ("String", "of vistok, torch and transformers, and the commit"),
    "date": ("String", "when, UTC, ISO 8601"),
}
"""Column -> (polars type, meaning)."""
SAME = ("task", "protocol", "data", "precision", "weights", "cache", "n", "seed")
"""Fields of a cell that are columns as they are."""
SCHEMA = Schema(VERSION, tuple(COLUMNS))


def place(folder: Path, key: str) -> Path:
    """Where the rows of a cell lie."""
    return folder / "rows" / f"{key}.parquet"


def done(folder: Path, key: str) -> bool:
    """Whether the rows of a cell are there and whole; ones that are not are put aside.

    Opens the cell's own file if there is one. Packs are opened once by a process, and looked through in memory.
    """
    # In this order: a file that has just gone from the first place was in the second before.
    return content(place(folder, key), SCHEMA) is not None or key in packs.cells(folder, SCHEMA)


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
        **{name: getattr(cell, name) for name in SAME},
    }
    full = [{**dict.fromkeys(COLUMNS), **known, **row} for row in rows]
    frame = polars.DataFrame(full, schema={name: _type(kind) for name, (kind, _) in COLUMNS.items()})
    path = place(folder, cell.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, seal(frame, SCHEMA))
    return path


def _type(kind: str) -> Any:
    """The type of polars that ``COLUMNS`` names."""
    import polars

    outer, _, inner = kind.rstrip(")").partition("(")
    found = getattr(polars, outer)
    return found(_type(inner)) if inner else found


def cell_of(row: Mapping[str, Any]) -> Cell:
    """The cell that a row is of."""
    keep = int(row["keep"]) if row["counted"] else row["keep"]
    hyper = tuple(sorted(json.loads(row["hyper"]).items()))
    return Cell(row["model"], row["method"], keep, hyper=hyper, **{name: row[name] for name in SAME})


def read(folder: Path) -> polars.DataFrame:
    """All rows of a sweep's folder, by cell and question. Raises ValueError where there are none."""
    import polars

    # In this order: a file that goes while the others are read is in a pack by then.
    singles = [load(path, SCHEMA) for path in sorted((folder / "rows").glob("*.parquet"))]
    frames = list(packs.read(folder, SCHEMA))
    packed = {key for frame in frames for key in frame["cell"].unique()}
    frames += [packs.without(frame, packed) for frame in singles if frame is not None]
    if not frames:
        raise ValueError(f"{folder}: holds no results of `vistok bench run`")
    return polars.concat(frames).sort("cell", maintain_order=True)


def compact(folder: Path) -> packs.Compaction:
    """Move the rows of single cells into packs. Safe beside drivers, readers and other compactions (``packs``)."""
    return packs.compact(folder, folder / "rows", SCHEMA)
