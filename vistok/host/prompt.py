"""What the outer model was called with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vistok.host.hosts import Host


@dataclass
class Prompt:
    """A call of the outer model with pictures."""

    visual: Tensor
    """(B, T) bool: image placeholders."""
    ids: Tensor | None
    """(B, T) int64 token ids, None for a prompt of embeddings."""


def read_prompt(host: Host, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prompt | None:
    """The prompt of a call with pictures, or None. ValueError for what is not supported."""
    ids = args[0] if args else kwargs.get("input_ids")
    encoded = kwargs.get("mm_encoder_outputs") or {}
    if kwargs.get("pixel_values_videos") is not None or encoded.get("video") is not None:
        raise ValueError("pixel_values_videos: video is not supported yet inside vistok.apply")
    if kwargs.get("pixel_values") is None and encoded.get("image") is None:
        return None
    if ids is not None:
        return Prompt(ids == host.image_token, ids)
    embeds = kwargs["inputs_embeds"]
    token = torch.tensor(host.image_token, device=embeds.device)
    return Prompt((embeds == host.model.get_input_embeddings()(token)).all(-1), None)


def check_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A pre-hook of the whole model."""
    if kwargs.get("labels") is not None:
        raise ValueError("labels: a loss over dropped tokens is not defined; leave them out inside vistok.apply")
