"""What the outer model was called with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vistok.host.hosts import Host
from vistok.host.layout import Kind


@dataclass
class Prompt:
    """A call of the outer model with pictures or videos."""

    visual: Tensor
    """(B, T) bool: their placeholders."""
    ids: Tensor | None
    """(B, T) int64 token ids, None for a prompt of embeddings."""
    videos: Tensor | None = None
    """(B, T) bool: those of the placeholders that are videos'; None for none."""

    def of(self, kind: Kind) -> Tensor:
        """(B, T) bool: the placeholders of pictures or of videos."""
        if self.videos is None:
            return self.visual if kind == "image" else torch.zeros_like(self.visual)
        return self.videos if kind == "video" else self.visual & ~self.videos


def read_prompt(host: Host, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prompt | None:
    """The prompt of a call with pictures or videos, or None. ValueError for what is not supported."""
    ids = args[0] if args else kwargs.get("input_ids")
    encoded = kwargs.get("mm_encoder_outputs") or {}
    pictures = kwargs.get("pixel_values") is not None or encoded.get("image") is not None
    videos = kwargs.get("pixel_values_videos") is not None or encoded.get("video") is not None
    if videos and not host.videos:
        raise ValueError(f"pixel_values_videos: video is not supported yet by {host.name} inside vistok.apply")
    if not pictures and not videos:
        return None

    def places(token: int) -> Tensor:
        if ids is not None:
            return ids == token
        embeds = kwargs["inputs_embeds"]
        return (embeds == host.model.get_input_embeddings()(torch.tensor(token, device=embeds.device))).all(-1)

    clips = places(host.video_token) if videos else None
    if not pictures and clips is not None:
        return Prompt(clips, ids, clips)
    images = places(host.image_token)
    return Prompt(images if clips is None else images | clips, ids, clips)


def check_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A pre-hook of the whole model."""
    if kwargs.get("labels") is not None:
        raise ValueError("labels: a loss over dropped tokens is not defined; leave them out inside vistok.apply")
