"""How a picture of any size becomes one of a tokenizer's size: what part of it is seen, and at which scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

Frame: TypeAlias = Literal["crop", "pad"]
"""crop: the largest centre part of the right shape; pad: all of it, black around."""


def framed(image: Image.Image, size: tuple[int, int], frame: Frame = "crop") -> Image.Image:
    """``image`` (RGB) as one of ``size`` (height, width), its proportions kept, scaled with Lanczos.

    A picture of that size is returned as it is. The cost is bounded by the pixels of ``image`` and of ``size``, however
    long and thin it is. ValueError for another ``frame``.
    """
    from PIL import Image

    if frame not in ("crop", "pad"):
        raise ValueError(f"frame: got {frame!r}, must be 'crop' or 'pad'")
    height, width = size
    if image.size == (width, height):
        return image
    scales = width / image.width, height / image.height
    if frame == "crop":
        scale = max(scales)
        w, h = min(width / scale, image.width), min(height / scale, image.height)
        left, top = (image.width - w) / 2, (image.height - h) / 2
        # Cut and scaled in one: a picture of 1 x 1,000,000 would be huge if it was scaled first.
        return image.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, left + w, top + h))
    scale = min(scales)
    w, h = (max(1, min(most, round(scale * side))) for most, side in zip((width, height), image.size, strict=True))
    whole = Image.new("RGB", (width, height))
    whole.paste(image.resize((w, h), Image.Resampling.LANCZOS), ((width - w) // 2, (height - h) // 2))
    return whole


def to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) float32 in [0, 1] of an RGB picture."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).float() / 255
