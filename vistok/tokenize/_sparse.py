"""Pictures, clips and voxels as one kind of input: tokens with places in time, height, width and depth (AToken)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from vistok.world.solids import VIEWS, Solid

Patch: TypeAlias = tuple[int, int, int]
"""Frames, rows and columns of a token."""
PICTURE, VOXELS = 0, -1
"""Where a clip has its number of frames."""


@dataclass(frozen=True)
class Voxels:
    """Part of a cube of ``side``^3 cells: what is seen at each of n cells."""

    features: Tensor
    """(n, rows * columns * 3) in [0, 1]: a square of pixels each, mean over the views that show the cell."""
    places: Tensor
    """(n, 3) int64."""
    side: int


class Shape(NamedTuple):
    """What a row of ``Sparse`` is a part of."""

    owner: int
    """Number of the input; the chunks of a long clip follow one another."""
    frames: int
    """Frames of a clip that are there, PICTURE or VOXELS."""
    rows: int
    columns: int


@dataclass(frozen=True)
class Sparse:
    """S samples of up to N tokens. A long clip is several samples, each with a time of its own."""

    features: Tensor
    """(S, N, C) float32, pixels in [-1, 1] in the order (frame, row, column, colour); 0 where nothing is."""
    where: Tensor
    """(S, N, 4) int64: time, row, column and depth in tokens; S may be 1, for all alike."""
    shapes: tuple[Shape, ...]
    mask: Tensor | None = None
    """(S, N) bool, False where there is no token; None: all are there."""

    def valid(self, patch: Patch) -> Tensor:
        """(S, N, C) bool: what is real, and not a frame that was added to fill a token."""
        frames = torch.tensor([max(s.frames, 1) for s in self.shapes], device=self.where.device)
        at = self.where[..., :1] * patch[0] + torch.arange(patch[0], device=self.where.device)
        real = (at < frames[:, None, None]).repeat_interleave(patch[1] * patch[2] * 3, 2)
        return real if self.mask is None else real & self.mask[..., None]


def patches(clip: Tensor, patch: Patch) -> Tensor:
    """(tokens, C): a clip (T, 3, H, W) of whole tokens, in the order time, rows, columns."""
    t, h, w = patch
    x = clip.unflatten(3, (-1, w)).unflatten(2, (-1, h)).unflatten(0, (-1, t))
    return x.permute(0, 3, 5, 1, 4, 6, 2).flatten(3).flatten(0, 2)


def unpatched(tokens: Tensor, rows: int, columns: int, patch: Patch) -> Tensor:
    """(T, 3, H, W): the inverse of ``patches``."""
    x = tokens.unflatten(1, (*patch, 3)).unflatten(0, (-1, rows, columns))
    return x.permute(0, 3, 6, 1, 4, 2, 5).flatten(5).flatten(3, 4).flatten(0, 1)


def places(times: int, rows: int, columns: int) -> Tensor:
    """(times * rows * columns, 4) int64: places of a clip's tokens."""
    axes = [torch.arange(n) for n in (times, rows, columns, 1)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 3)


def rotary(where: Tensor, head: int, base: float = 10000.0) -> Tensor:
    """(..., 2 head): sines, then cosines, of tokens at ``where`` (..., 4), for adjacent channels as pairs.

    ``head`` / 8 frequencies an axis, base^(-i / head); axes in the order time, row, column, depth. Raises ValueError
    for a head that cannot be split so.
    """
    if head % 8:
        raise ValueError(f"heads: got heads of {head} channels, must be a multiple of 8")
    turns = base ** (-torch.arange(head // 8, device=where.device, dtype=torch.float32) / head)
    angles = (where[..., None] * turns).flatten(-2).repeat_interleave(2, -1)
    return torch.cat([angles.sin(), angles.cos()], -1)


def sparse(things: Sequence[Tensor | Voxels], patch: Patch, chunk: int = 16) -> Sparse:
    """Pictures (3, H, W), clips (T, 3, H, W), both in [0, 1], and voxels, of any sizes and together.

    Height and width are cut to whole tokens around the centre. What has fewer frames than a token is filled with
    zeros, which are mid-grey, behind them; longer clips lose the frames behind the last whole token, and are split into
    chunks of ``chunk`` frames. Raises ValueError for another shape, and what is smaller than a token.
    """
    features, where, shapes = [], [], []
    for owner, thing in enumerate(things):
        if isinstance(thing, Voxels):
            filled = pad(2 * thing.features - 1, (0, (patch[0] - 1) * patch[1] * patch[2] * 3))
            features.append(filled)
            where.append(pad(thing.places, (1, 0)))
            shapes.append(Shape(owner, VOXELS, thing.side, thing.side))
            continue
        clip = thing[None] if thing.dim() == 3 else thing
        if clip.dim() != 4 or clip.shape[1] != 3 or clip.shape[2] < patch[1] or clip.shape[3] < patch[2]:
            least = f"{patch[1]} x {patch[2]}"
            raise ValueError(f"things: got shape {tuple(thing.shape)}, must be (3, H, W) or (T, 3, H, W), of {least}")
        rows, columns = clip.shape[2] // patch[1], clip.shape[3] // patch[2]
        top, left = (clip.shape[2] - rows * patch[1]) // 2, (clip.shape[3] - columns * patch[2]) // 2
        clip = 2 * clip[:, :, top : top + rows * patch[1], left : left + columns * patch[2]] - 1
        count = len(clip) // patch[0] * patch[0] if len(clip) >= patch[0] else len(clip)
        for part in clip[:count].split(chunk):
            filled = pad(part, (0, 0, 0, 0, 0, 0, 0, -len(part) % patch[0]))
            features.append(patches(filled, patch))
            where.append(places(len(filled) // patch[0], rows, columns).to(clip.device))
            shapes.append(Shape(owner, PICTURE if thing.dim() == 3 else len(part), rows, columns))
    lengths = torch.tensor([len(x) for x in features])
    mask = None if bool((lengths == lengths[0]).all()) else torch.arange(int(lengths.max())) < lengths[:, None]
    padded = pad_sequence(features, batch_first=True)
    return Sparse(
        padded, pad_sequence(where, batch_first=True), tuple(shapes), None if mask is None else mask.to(padded.device)
    )


def restored(features: Tensor, like: Sparse, patch: Patch) -> list[Tensor | Voxels]:
    """Pictures (3, H, W), clips (T, 3, H, W) and voxels in the order of what ``like`` was made of, not clamped.

    ``features`` (S, N, C) in [-1, 1]. Of a picture its one frame, of a short clip the frames that it had.
    """
    found: dict[int, list[Tensor]] = {}
    made: dict[int, Tensor | Voxels] = {}
    for i, shape in enumerate(like.shapes):
        x = (features[i] if like.mask is None else features[i][like.mask[i]]).float() / 2 + 0.5
        if shape.frames == VOXELS:
            cells = like.where[i][: len(x), 1:]
            made[shape.owner] = Voxels(x[:, : patch[1] * patch[2] * 3], cells, shape.rows)
            continue
        clip = unpatched(x, shape.rows, shape.columns, patch)
        found.setdefault(shape.owner, []).append(clip[: max(shape.frames, 1)])
        whole = torch.cat(found[shape.owner])
        made[shape.owner] = whole[0] if shape.frames == PICTURE else whole
    return [made[owner] for owner in sorted(made)]


def voxels(solid: Solid, side: int, pixels: int) -> Voxels:
    """The cells of side^3 that a solid's six views show, each with a square of ``pixels`` across, mean over its views.

    A view is cut into squares, one above each column of cells; a cell is shown where a pixel of its square meets it.
    """
    total, count = np.zeros((side**3, pixels * pixels * 3)), np.zeros(side**3)
    for view in VIEWS:
        picture, depth = solid.view(view, side * pixels)
        squares = picture.reshape(side, pixels, side, pixels, 3).transpose(0, 2, 1, 3, 4).reshape(side, side, -1)
        axis = "xyz".index(view[1])
        across, up = (axis + 1) % 3, (axis + 2) % 3
        rows, columns = np.nonzero(np.isfinite(depth))
        met = np.empty((3, len(rows)), np.int64)
        behind = np.minimum((depth[rows, columns] * side / 2).astype(np.int64), side - 1)
        met[axis] = side - 1 - behind if view[0] == "+" else behind
        met[across], met[up] = columns // pixels, side - 1 - rows // pixels
        found = np.unique(np.ravel_multi_index(tuple(met), (side,) * 3))
        where = np.unravel_index(found, (side,) * 3)
        total[found] += squares[side - 1 - where[up], where[across]]
        count[found] += 1
    shown = np.flatnonzero(count)
    features = torch.from_numpy(total[shown] / count[shown, None]).float()
    at = np.stack(np.unravel_index(shown, (side,) * 3), 1)
    return Voxels(features, torch.from_numpy(at), side)


def moved(pictures: Tensor, dice: torch.Generator) -> list[Tensor]:
    """A clip (4, 3, H, W) of each picture (3, H, W), which moves by up to two pixels a frame, around the edges."""
    speeds = torch.randint(-2, 3, (len(pictures), 2), generator=dice).tolist()
    return [
        torch.stack([x.roll((t * dy, t * dx), (1, 2)) for t in range(4)])
        for x, (dy, dx) in zip(pictures, speeds, strict=True)
    ]
