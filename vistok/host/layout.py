"""Where the tokens of a picture or video come from (patches of the vision encoder) and where they stand (columns of the
prompt)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["image", "video"]
KINDS: tuple[Kind, ...] = ("image", "video")


@dataclass(frozen=True)
class Part:
    """One piece of a picture as the encoder saw it."""

    grid: tuple[int, int]
    """(h, w) tokens, raster order."""
    box: tuple[float, float, float, float] | None
    """(x0, y0, x1, y1) of the picture that it shows, in 0..1; None where that depends on the picture's aspect ratio."""


@dataclass(frozen=True, eq=False)
class Layout:
    """The map of one picture's N visual tokens, part after part. Two pictures share a Layout object iff they are alike,
    and are then reduced as one batch."""

    length: int
    """Placeholder tokens in the prompt: N and the row ends that are never dropped."""
    offsets: Tensor
    """(N,) int64: which of the placeholders each token is."""
    patches: Tensor
    """(N, g) int64: the encoder patches that each token is made of, counted from the picture's first."""
    num_patches: int
    """Patches that the encoder spends on the picture (those that an unpadding removes included)."""
    parts: tuple[Part, ...]
    weights: Tensor | None = None
    """(N, g) share of each patch where a token is interpolated between patches, None where patches are concatenated."""
    frames: int | None = None
    """Of a video, whose ``parts`` they are; None for a picture."""
    _copies: dict[torch.device, tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=dict, repr=False)

    @property
    def num_tokens(self) -> int:
        return len(self.offsets)

    @property
    def kind(self) -> Kind:
        return "image" if self.frames is None else "video"

    @property
    def grid(self) -> tuple[int, int] | None:
        return self.parts[0].grid if len(self.parts) == 1 else None

    @property
    def crops(self) -> tuple[tuple[int, int], ...]:
        return tuple(part.grid for part in self.parts) if len(self.parts) > 1 else ()

    @property
    def boxes(self) -> tuple[tuple[float, float, float, float] | None, ...]:
        return tuple(part.box for part in self.parts) if len(self.parts) > 1 else ()

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """``offsets``, ``patches`` and ``weights`` on ``device``."""
        if device not in self._copies:
            weights = None if self.weights is None else self.weights.to(device)
            self._copies[device] = (self.offsets.to(device), self.patches.to(device), weights)
        return self._copies[device]


@lru_cache(maxsize=256)
def squares(height: int, width: int, side: int) -> Layout:
    """One piece of height x width patches in raster order, of which side x side make a token; those that are too few
    for one at the right and below are left out."""
    h, w = height // side, width // side
    index = torch.arange(height * width).view(height, width)[: h * side, : w * side]
    patches = index.view(h, side, w, side).transpose(1, 2).reshape(h * w, side * side)
    return Layout(h * w, torch.arange(h * w), patches, height * width, (Part((h, w), (0.0, 0.0, 1.0, 1.0)),))


@lru_cache(maxsize=256)
def plain(height: int, width: int, merge: int = 1) -> Layout:
    """One piece of height x width tokens, each of ``merge`` patches that follow one another."""
    n = height * width
    patches = torch.arange(n * merge).view(n, merge)
    return Layout(n, torch.arange(n), patches, n * merge, (Part((height, width), (0.0, 0.0, 1.0, 1.0)),))


@lru_cache(maxsize=256)
def video(frame: Layout, frames: int, ends: int = 0) -> Layout:
    """``frames`` pictures of the layout ``frame`` in a row, and ``ends`` placeholders behind them that stay."""

    def each(x: Tensor, step: int) -> Tensor:
        return torch.cat([x + step * number for number in range(frames)])

    return Layout(
        frame.length * frames + ends,
        each(frame.offsets, frame.length),
        each(frame.patches, frame.num_patches),
        frame.num_patches * frames,
        frame.parts * frames,
        None if frame.weights is None else frame.weights.repeat(frames, 1),
        frames,
    )
