"""The question about a picture: which tokens of the prompt it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vistok.host.pictures import Group, Place


def special_ids(model: Any) -> frozenset[int]:
    """Every token id that the model's configurations name (image, vision start and end, begin, end, padding, ...)."""
    found: set[int] = set()
    for config in (model.config, getattr(model.config, "text_config", None), getattr(model, "generation_config", None)):
        for name, value in vars(config).items() if config is not None else ():
            if name.endswith(("_token_id", "_token_index")):
                found.update(v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, int))
    return frozenset(found)


def question_tokens(valid: Tensor | None, visual: Tensor, ids: Tensor | None, special: frozenset[int]) -> Tensor:
    """(B, T) bool: tokens of text, which is neither padding nor picture nor special."""
    words = ~visual
    if valid is not None:
        words &= valid
    if ids is not None and special:
        words &= ~torch.isin(ids, torch.tensor(sorted(special), device=ids.device))
    return words


def outside(words: Tensor, pictures: Iterable[Place]) -> Tensor:
    """``words`` (B, T) less what stands between the tokens of a picture: names of its tiles, ends of its rows."""
    words = words.clone()
    for picture in pictures:
        words[picture.row, int(picture.columns[0]) : int(picture.columns[-1])] = False
    return words


def question_of(group: Group, words: Tensor) -> tuple[Tensor, Tensor]:
    """Columns (G, Q) and mask (G, Q) bool of the text that follows each picture, up to the prompt's end.

    Where nothing follows (the picture ends the prompt), the row's whole text.
    """
    rows = words[group.rows]
    after = rows & (torch.arange(rows.shape[1], device=rows.device) > group.end[:, None])
    mine = torch.where(after.any(1, keepdim=True), after, rows)
    length = max(1, int(mine.sum(1).max()))
    columns = (~mine).int().sort(dim=1, stable=True).indices[:, :length]
    return columns, mine.gather(1, columns)


def question_fields(group: Group, words: Tensor, embeds: Tensor, ids: Tensor | None) -> dict[str, Any]:
    """``text``, ``text_mask`` and ``text_ids`` of an Evidence."""
    columns, mask = question_of(group, words)
    rows = group.rows[:, None]
    text = embeds[rows, columns] * mask[..., None].to(embeds.dtype)
    return {"text": text, "text_mask": mask, "text_ids": None if ids is None else ids[rows, columns]}
