"""Pictures and questions of the user's own, as a sweep names them: a folder, or a dataset of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vistok.world import TASKS
from vistok.world.files import LINES

from .folder import digest_folder, read_folder
from .measure import Case
from .pictures import Unusable


@dataclass(frozen=True)
class Source:
    """Where pictures and questions come from: the table ``[data.NAME]`` of a sweep."""

    name: str
    folder: str | None = None
    """A folder with pictures.jsonl."""
    dataset: str | None = None
    """A name on the Hugging Face Hub, or a folder: of a dataset, saved to disk, or of pictures with metadata."""
    config: str | None = None
    split: str | None = None
    """None: the only one that there is."""
    revision: str | None = None
    """A branch, tag or commit of a dataset on the Hub."""
    image: str = "image"
    """Column of pictures; those below are columns too."""
    question: str = "question"
    answer: str = "answer"
    """A text, a number or a class; or a list of answers that all count as right."""
    family: str | None = None

    @classmethod
    def of(cls, name: str, table: Mapping[str, Any]) -> Source:
        """The source of a table. Raises ValueError naming the entry that is wrong or missing."""
        if name in (*TASKS, "all", ""):
            raise Unusable(f"data.{name}", f"must have another name: {', '.join(TASKS)} and all are the world's")
        keys = [field.name for field in fields(cls)][1:]
        for key, value in table.items():
            if key not in keys:
                raise Unusable(f"data.{name}: got {key!r}", f"must be among {', '.join(keys)}")
            if not isinstance(value, str) or not value:
                raise Unusable(f"data.{name}: {key}: got {value!r}", "must be a text that is not empty")
        if ("folder" in table) == ("dataset" in table):
            raise Unusable(f"data.{name}", "must have one of folder and dataset")
        if "folder" in table and len(table) > 1:
            other = next(key for key in table if key != "folder")
            raise Unusable(f"data.{name}: {other}", f"must stand beside dataset; a folder's {LINES} has fixed names")
        where = "folder" if "folder" in table else "dataset"
        path = Path(table[where]).expanduser()
        # A worker may run in another directory.
        local = {where: str(path.absolute())} if where == "folder" or path.is_dir() else {}
        if local and "revision" in table:
            raise Unusable(f"data.{name}: revision", "must be left out: a folder has none")
        return cls(name, **{**table, **local})

    def digest(self) -> str:
        """20 hexadecimal digits of the content, wherever it lies: every byte of the JSONL and its pictures, or what the
        columns hold; for a dataset of the Hub its fingerprint, which has the commit in it. Raises ValueError."""
        if self.folder:
            return digest_folder(Path(self.folder))
        from .hub import digest_dataset

        return digest_dataset(self)

    def cases(self, n: int | None = None, seed: int = 0) -> list[Case]:
        """All questions, or the ``n`` (if there are so many) that ``seed`` draws, in their order; the draw of a smaller
        n lies within that of a larger one. Only pictures that are asked about are opened. Raises ValueError."""
        if self.folder:
            return read_folder(Path(self.folder), n, seed)
        from .hub import read_dataset

        return read_dataset(self, n, seed)
