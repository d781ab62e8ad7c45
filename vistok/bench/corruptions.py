"""Pictures made worse in four ways, in five steps each: noise, blur, JPEG, letterbox.

The steps of noise, blur and JPEG follow Hendrycks and Dietterich (2019, "Benchmarking Neural Network Robustness to
Common Corruptions and Perturbations"), made for pictures of 224 pixels; a blur grows with the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Corruption = Literal["noise", "blur", "jpeg", "letterbox"]
CORRUPTIONS: tuple[Corruption, ...] = ("noise", "blur", "jpeg", "letterbox")

NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)
"""Standard deviation of normal noise, as a share of the range of a pixel."""
BLUR = (1.0, 2.0, 3.0, 4.0, 6.0)
"""Standard deviation of a Gaussian blur, in pixels of a picture whose shorter side is 224."""
JPEG = (25, 18, 15, 10, 7)
"""Quality, 1 .. 95."""
LETTERBOX = (0.9, 0.8, 0.7, 0.6, 0.5)
"""Share of each side that the picture takes in a grey frame of its own size."""
GREY = (127, 127, 127)
SEVERITIES = range(1, 6)


def corrupt(picture: Image.Image, kind: Corruption, severity: int, seed: int | Sequence[int] = 0) -> Image.Image:
    """An RGB picture of the same size. ``severity``: 1 .. 5; ``seed``: of the noise, the others have no chance in them.

    Raises ValueError for an unknown kind or severity.
    """
    step = _step(severity)
    rgb = picture.convert("RGB")
    if kind == "noise":
        noise = np.random.default_rng(seed).normal(0, 255 * NOISE[step], (rgb.height, rgb.width, 3))
        return Image.fromarray((np.asarray(rgb) + noise).round().clip(0, 255).astype(np.uint8))
    if kind == "blur":
        return rgb.filter(ImageFilter.GaussianBlur(BLUR[step] * min(rgb.size) / 224))
    if kind == "jpeg":
        file = BytesIO()
        rgb.save(file, format="JPEG", quality=JPEG[step])
        return Image.open(BytesIO(file.getvalue())).convert("RGB")
    if kind == "letterbox":
        left, width = _inner(rgb.width, step)
        top, height = _inner(rgb.height, step)
        frame = Image.new("RGB", rgb.size, GREY)
        frame.paste(rgb.resize((width, height), Image.Resampling.LANCZOS), (left, top))
        return frame
    raise ValueError(f"kind: got {kind!r}, must be 'noise', 'blur', 'jpeg' or 'letterbox'")


def boxed_mask(mask: NDArray[np.bool_], severity: int) -> NDArray[np.bool_]:
    """Where the pixels of ``mask`` (H, W) are after "letterbox": all pixels that hold one of them."""
    step = _step(severity)
    moved = np.zeros_like(mask)
    places = []
    for side, at in zip(mask.shape, np.nonzero(mask), strict=True):
        start, length = _inner(side, step)
        places.append(start + (2 * at + 1) * length // (2 * side))  # by the centre of each pixel
    moved[tuple(places)] = True
    moved.setflags(write=False)
    return moved


def _inner(side: int, step: int) -> tuple[int, int]:
    """(start, length) in pixels of the picture within a side of its frame."""
    length = max(1, round(LETTERBOX[step] * side))
    return (side - length) // 2, length


def _step(severity: int) -> int:
    if severity not in SEVERITIES:
        raise ValueError(f"severity: got {severity!r}, must be 1 .. 5")
    return severity - 1
