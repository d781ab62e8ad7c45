"""A corpus of pictures as ids, and back: each picture exactly once, wherever the work was stopped and begun again.

A folder of tokens holds

    manifest.json           what made the ids and how to read them; at the end also the shards, their rows and digests
    shards/000000.parquet   a row a picture: key, source, ids, shape, bits, checksum
    rejects.parquet         a row a picture that cannot be read: key, source, reason, checksum
    plan/                   which pictures belong to which shard, settled at the start

A shard is the unit of work: its file is written under another name and renamed, and only then is it done. So a run that
is killed loses the shards it was at, and the next one does those, and only those, again. Rows of rejects wait in
``rejects/`` until all is done; they are in place before their shard is.

Ids do not depend on how the work is shared out. The network always sees ``PIECE`` pictures at once, on as many threads:
a shard's row i lies in place i modulo ``PIECE``, and places of pictures that cannot be read, or beyond the end, stay
black. Sums of floating-point numbers depend on the shape of a batch, and a vector near the border of two codes then
goes to the one or the other; batches of one shape have not that trouble, and shards are the plan's.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from io import BytesIO
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import torch

from vistok.engine.cells import Resources
from vistok.engine.claims import claim, owner_of
from vistok.engine.corpus import Item, Shard, is_plan, parquet_module, plan, read, shards
from vistok.engine.schedule import Engine
from vistok.engine.tokens import (
    MANIFEST,
    PIECE,
    Loaded,
    Manifest,
    Report,
    Table,
    Watch,
    clear,
    collect,
    columns,
    fingerprint_of,
    loaded,
    replaced,
    rows_of,
    shard_path,
    tokenizer_of,
)
from vistok.parts.framing import framed, to_tensor
from vistok.parts.tokenizer import Tokenizer

if TYPE_CHECKING:
    from PIL import Image

Opener: TypeAlias = "Callable[[BinaryIO, object], Image.Image]"
"""Opens a picture's bytes as RGB; ValueError says why it cannot. ``vistok.bench.pictures.decode_picture`` is one."""


def tokenize(
    source: str,
    tokenizer: str,
    folder: Path,
    *,
    opener: Opener,
    engine: Engine,
    resources: Resources | None = None,
    shard_size: int = 4096,
    batch_size: int = 64,
    column: str = "image",
    watch: Watch | None = None,
) -> Report:
    """Write the ids of all pictures of ``source`` to ``folder``, or go on where a run before this one was stopped.

    Args:
        source: a folder of pictures, tar archives or Parquet files, or a glob of any of these (``engine.corpus``).
        tokenizer: a folder that ``Tokenizer.save`` wrote, or a name in the zoo.
        opener: opens a picture.
        resources: of a worker; threads and whether there is a GPU are part of the manifest.
        shard_size: pictures of a shard, which is what is lost when a run is killed.
        batch_size: pictures read and opened at once, by a worker's threads; of no effect on ids.
        column: of Parquet files: bytes, or structs with a field ``bytes``.

    Raises:
        ValueError: a source or tokenizer that cannot be, or a folder with tokens of other settings.
        LookupError: no such tokenizer.
        OSError: a folder that cannot be written, or that has no locks.
    """
    for name, value in (("shard_size", shard_size), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, must be 1 or more")
    needs = resources or Resources()
    wanted = _settings(source, tokenizer, column, shard_size, needs)
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()  # workers on other machines stand elsewhere
    manifest = _begun(folder, wanted)
    report = Report(manifest)
    if manifest.complete:
        _drop(folder)
        return report
    ended = engine.map(
        shards(folder / "plan"),
        partial(_tokenize, folder, batch_size, column, opener),
        setup=partial(loaded, wanted.tokenizer, wanted.fingerprint, wanted.device, needs.cpus),
        resources=needs,
        on_done=watch,
        folder=folder,
        done=partial(_is_done, folder),
    )
    with closing(ended):
        collect(ended, report)
    if not report.failed and not report.held:
        report.manifest = _finished(folder, manifest)
    return report


def _settings(source: str, name: str, column: str, shard_size: int, resources: Resources) -> Manifest:
    model = tokenizer_of(name, "cpu")
    height, width = (model.image, model.image) if isinstance(model.image, int) else model.image
    about = model.format
    if not about.sizes:
        raise ValueError(f"tokenizer: got {name}, must give ids, its codes are continuous")
    return Manifest(
        tokenizer=os.path.abspath(name) if Path(name).exists() else name,
        fingerprint=fingerprint_of(name),
        source=os.path.abspath(source),
        column=column,
        shard_size=shard_size,
        device="cuda" if resources.gpus else "cpu",
        threads=resources.cpus,
        image=(height, width),
        sizes=about.sizes,
        bit_order=about.bit_order,
        grid=about.grid,
        scales=about.scales,
    )


def _begun(folder: Path, wanted: Manifest) -> Manifest:
    """The manifest of the folder, after the plan if there is none yet."""
    found = Manifest.read(folder)
    if found is None:
        taken = claim(folder, "plan")
        if taken is None:
            raise ValueError(
                f"folder: {folder} is being planned by {owner_of(folder, 'plan')}, must be free: try again"
            )
        with taken:
            found = Manifest.read(folder)
            if found is None:
                clear(folder / "plan", folder / MANIFEST)
                if (folder / "shards").exists():
                    raise ValueError(f"folder: {folder} holds shards without a {MANIFEST}, must be empty")
                if (folder / "plan").exists() and not is_plan(folder / "plan"):
                    raise ValueError(f"folder: {folder} holds a plan of somebody else's, must be empty")
                with replaced(folder / "plan") as place:
                    place.mkdir()
                    total = plan(wanted.source, place, wanted.shard_size)
                    rmtree(folder / "plan", ignore_errors=True)
                found = Manifest(**{**vars(wanted), "total": total})
                found.write(folder)
    if other := wanted.differs(found):
        raise ValueError(
            f"folder: {folder} holds tokens with {other} {getattr(found, other)!r}, "
            f"must be another folder for {getattr(wanted, other)!r}"
        )
    return found


def _is_done(folder: Path, key: str) -> bool:
    return shard_path(folder, key).exists()


def _tokenize(
    folder: Path, batch_size: int, column: str, opener: Opener, worker: Loaded, shard: Shard
) -> tuple[int, int]:
    """Write one shard, its rejects first; how many pictures and rejects."""
    final, rejected = shard_path(folder, shard.key), folder / "rejects" / f"{shard.key}.parquet"
    for path in (final, rejected):
        path.parent.mkdir(exist_ok=True)
    clear(final, rejected)
    rejects: list[dict[str, Any]] = []
    with replaced(final) as path, Table(path, columns("rows")) as table:
        opened = _opened(read(shard, column), batch_size, worker.threads, partial(_open, worker.model.image, opener))
        for start in itertools.count(0, PIECE):
            piece = list(itertools.islice(opened, PIECE))
            if not piece:
                break
            rows = _encoded(worker.model, [pixels for _, pixels in piece])
            for place, ((item, pixels), row) in enumerate(zip(piece, rows, strict=False), start):
                about = {
                    "key": f"{shard.key}-{place:07d}",
                    "source": item.source,
                    "checksum": None if item.data is None else hashlib.sha256(item.data).hexdigest(),
                }
                if isinstance(pixels, str):
                    rejects.append({**about, "reason": pixels})
                else:
                    table.add({**about, **row})
        table.close()
        if rejects:
            with replaced(rejected) as other, Table(other, columns("rejects")) as list_of:
                for reject in rejects:
                    list_of.add(reject)
        else:
            rejected.unlink(missing_ok=True)
    return table.count, len(rejects)


Opened: TypeAlias = "tuple[Item, torch.Tensor | str]"
"""A picture of the corpus with its pixels (3, H, W) in [0, 1], or with why there are none."""


def _opened(
    items: Iterator[Item], batch_size: int, threads: int, function: Callable[[Item], Opened]
) -> Iterator[Opened]:
    if threads == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        while batch := list(itertools.islice(items, batch_size)):
            yield from pool.map(function, batch)


def _open(size: int | tuple[int, int], opener: Opener, item: Item) -> Opened:
    if item.data is None:
        return item, item.reason
    try:
        image = opener(BytesIO(item.data), "the picture")
    except ValueError as error:
        return item, " ".join(str(error).split())
    return item, to_tensor(framed(image, (size, size) if isinstance(size, int) else size))


@torch.inference_mode()
def _encoded(model: Tokenizer, pixels: list[Any]) -> list[dict[str, Any]]:
    """ids, shape and bits of each of up to ``PIECE`` places; of places without pixels, those of a black picture."""
    height, width = (model.image, model.image) if isinstance(model.image, int) else model.image
    batch = torch.zeros(PIECE, 3, height, width)
    for place, one in enumerate(pixels):
        if not isinstance(one, str):
            batch[place] = one
    codes = model.encode(batch.to(next(model.parameters()).device))
    assert codes.ids is not None
    ids, bits = codes.ids.cpu(), codes.bits.tolist()
    lengths = [ids.shape[1]] * PIECE if codes.mask is None else codes.mask.sum(1).tolist()
    found = []
    for row, length, size in zip(ids, lengths, bits, strict=True):
        own = row[:length]
        grid = codes.format.grid if codes.format.grid is not None and not codes.format.scales else None
        shape = (*(grid or (length,)), *own.shape[1:])
        found.append({"ids": own.flatten().numpy(), "shape": list(shape), "bits": size})
    return found


def _finished(folder: Path, manifest: Manifest) -> Manifest:
    """Gather the rejects and write the manifest that says that all is there."""
    taken = claim(folder, "finish")
    if taken is None:  # another run is at the same, of the same files
        return manifest
    with taken:
        there = Manifest.read(folder)
        if there is not None and there.complete:
            return there
        clear(folder / MANIFEST, folder / "rejects.parquet")
        parquet = parquet_module()
        found, pictures = [], 0
        for shard in shards(folder / "plan"):
            path = shard_path(folder, shard.key)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            rows = parquet.read_metadata(path).num_rows
            found.append({"file": f"shards/{path.name}", "rows": rows, "sha256": digest})
            pictures += rows
        with replaced(folder / "rejects.parquet") as path, Table(path, columns("rejects")) as table:
            for part in sorted((folder / "rejects").glob("*.parquet")):
                for row in rows_of(part):
                    table.add(row)
            table.close()
        told = {"complete": True, "pictures": pictures, "rejects": table.count, "shards": tuple(found)}
        whole = Manifest(**{**vars(manifest), **told})
        whole.write(folder)
        _drop(folder)
        return whole


def _drop(folder: Path) -> None:
    """What is not needed any more."""
    rmtree(folder / "rejects", ignore_errors=True)
