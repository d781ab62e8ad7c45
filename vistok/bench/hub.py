"""A dataset of Hugging Face as pictures and questions: by its name on the Hub, or from a folder."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .folder import FAMILY, answers_of, case_of, chosen, text_of
from .measure import Case
from .pictures import Unusable, check_file, decode_picture

if TYPE_CHECKING:
    from .data import Source


def read_dataset(source: Source, n: int | None, seed: int) -> list[Case]:
    """As ``Source.cases``. Raises Unusable naming the row and its column."""
    rows = _Rows(source)
    cases = []
    for index in chosen(len(rows.table), n, seed):
        where = f"data.{source.name}, row {index}"
        row = rows.table[index]
        picture = decode_picture(io.BytesIO(rows.picture(row, where)), f"{where}, {source.image}")
        nowhere = np.zeros((picture.height, picture.width), dtype=bool)
        cases.append(case_of(picture, *rows.asked(row, where), nowhere, f"{source.name} {index}"))
    if not cases:
        raise Unusable(f"data.{source.name}", "must have at least one row")
    return cases


def digest_dataset(source: Source) -> str:
    """As ``Source.digest``."""
    rows = _Rows(source)
    columns = [source.image, source.question, source.answer, source.family]
    digest = hashlib.sha256(json.dumps(columns).encode())
    if rows.folder is None:
        # It is made from the name, the configuration, the split and the commit.
        digest.update(rows.table._fingerprint.encode())
        return digest.hexdigest()[:20]
    for index, row in enumerate(rows.table):
        where = f"data.{source.name}, row {index}"
        digest.update(json.dumps(rows.asked(row, where)).encode())
        digest.update(hashlib.sha256(rows.picture(row, where)).digest())
    return digest.hexdigest()[:20]


class _Rows:
    """The columns of a dataset that are used, pictures not decoded. No code of a dataset is ever run: from version 4
    the library ``datasets`` has no means to."""

    def __init__(self, source: Source) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ImportError("reading a dataset needs datasets: pip install 'vistok[data]'") from error
        name = str(source.dataset)
        self.source, self.folder = source, Path(name) if Path(name).is_dir() else None
        if self.folder is None and name.startswith(("/", ".", "~")):
            raise Unusable(f"data.{source.name}, dataset {name}", "there is no such folder")
        try:
            table = self._load(datasets)
        except Unusable:
            raise
        except Exception as error:  # no network, no such dataset, files of any kind
            raise Unusable(f"data.{source.name}, dataset {name}", f"cannot be read ({error})") from error
        used = {"image": source.image, "question": source.question, "answer": source.answer, "family": source.family}
        for key, column in used.items():
            if column is not None and column not in table.column_names:
                got = f"data.{source.name}, {key} {column!r}"
                raise Unusable(got, f"must be a column: {', '.join(table.column_names)}")
        if not isinstance(table.features[source.image], datasets.Image):
            raise Unusable(f"data.{source.name}, image {source.image!r}", "must be a column of pictures, one a row")
        table = table.select_columns([column for column in dict.fromkeys(used.values()) if column])
        self.table = table.cast_column(source.image, datasets.Image(decode=False))

    def _load(self, datasets: Any) -> Any:
        source, folder = self.source, self.folder
        if folder and any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
            if source.config:
                raise Unusable(f"data.{source.name}, config", "must be left out: what was saved to disk has none")
            saved = datasets.load_from_disk(str(folder))
            if not isinstance(saved, datasets.Dataset):
                return saved[self._split(list(saved))]
            if source.split:
                raise Unusable(f"data.{source.name}, split", "must be left out: the folder is not divided into any")
            return saved
        where = {"path": str(folder or source.dataset), "revision": source.revision}
        split = source.split or self._split(datasets.get_dataset_split_names(config_name=source.config, **where))
        return datasets.load_dataset(name=source.config, split=split, **where)

    def _split(self, names: Sequence[str]) -> str:
        """The split that was asked for, or the only one."""
        split = self.source.split or (names[0] if len(names) == 1 else None)
        if split is None or split not in names:
            got = f"data.{self.source.name}, split {split or 'nothing'}"
            raise Unusable(got, f"must be among {', '.join(names)}")
        return split

    def asked(self, row: Mapping[str, Any], where: str) -> tuple[str, tuple[str, ...], str]:
        """A row's question, its answers and its family."""
        right = self._value(row, self.source.answer)
        answers = answers_of(right if isinstance(right, list) else [right], f"{where}, {self.source.answer}")
        family = self._value(row, self.source.family) if self.source.family else None
        return text_of(row, self.source.question, where), answers, FAMILY if family is None else str(family)

    def _value(self, row: Mapping[str, Any], column: str) -> Any:
        """What a row says in a column; of a class its name, None for -1, which stands for one that is not told."""
        value, kind = row[column], self.table.features[column]
        if not hasattr(kind, "int2str"):
            return value
        return None if value in (None, -1) else kind.int2str(value)

    def picture(self, row: Mapping[str, Any], where: str) -> bytes:
        """The file of a row's picture, from the row or from a file of the dataset."""
        stored = row[self.source.image] or {}
        if stored.get("bytes"):
            return bytes(stored["bytes"])
        got = f"{where}, {self.source.image} {stored.get('path')}"
        if not stored.get("path"):
            raise Unusable(got, "must be a picture")
        path = Path(stored["path"]).resolve()
        if not any(path.is_relative_to(Path(root).resolve()) for root in self._roots()):
            raise Unusable(got, "must be in the dataset, not elsewhere")
        try:
            check_file(path)
        except Unusable as error:
            raise Unusable(got, error.right) from error
        return path.read_bytes()

    def _roots(self) -> Sequence[Path | str]:
        """Folders that a dataset may have its pictures in."""
        if self.folder is not None:
            return (self.folder,)
        from datasets import config
        from huggingface_hub.constants import HF_HUB_CACHE

        caches = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, config.EXTRACTED_DATASETS_PATH)
        return (*caches, HF_HUB_CACHE)
