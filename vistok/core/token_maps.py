"""Maps of codes as if they were pictures (SeiT++): statistics of another, affine maps, 2 x 2 patches, back to ids."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from vistok.core.quantize import nearest_code


def to_ids(codes: Tensor, codebook: Tensor) -> Tensor:
    """(B, h, w) int64: the nearest of ``codebook`` (K, D) to each place of ``codes`` (B, D, h, w)."""
    return nearest_code(codes.movedim(1, -1), codebook)


def to_codes(ids: Tensor, codebook: Tensor) -> Tensor:
    """(B, D, h, w): what ids (B, h, w) stand for."""
    return codebook[ids].movedim(-1, 1)


def color_adapt(codes: Tensor, which: Tensor | None = None, parity: Literal["paper", "authors"] = "paper") -> Tensor:
    """``codes`` (B, D, h, w), those of ``which`` (B,) bool with the channels' mean and deviation of a partner.

    The partner is the batch backwards: the middle one of an odd batch is its own, and so is a batch of one. Deviations
    are unbiased. The result is to be quantised again (``to_ids``).
    """
    mean, std = codes.mean((2, 3), keepdim=True), codes.std((2, 3), keepdim=True)
    safe = std if parity == "authors" else std.masked_fill(std == 0, 1)
    made = (codes - mean) / safe * std.flip(0) + mean.flip(0)
    own = torch.arange(len(codes), device=codes.device) * 2 == len(codes) - 1  # rounding would still change it
    change = ~own if which is None else which & ~own
    return torch.where(change[:, None, None, None], made, codes)


def draw_color_adapt(count: int, probability: float, generator: torch.Generator | None = None) -> Tensor:
    """(count,) bool: half of the batch at random, rounded down, or with 1 - ``probability`` none."""
    which = torch.zeros(count, dtype=torch.bool)
    if float(torch.rand((), generator=generator)) < probability:
        which[torch.randperm(count, generator=generator)[: int(count * 0.5)]] = True
    return which


def draw_affine(count: int, generator: torch.Generator | None = None) -> Tensor:
    """(count, 2, 3): flip, half the time a turn (30 degrees), shift (0.2) and shear (15), then a random crop.

    As ``augmented`` takes them: from places of the result to places of the source, both in [-1, 1].
    """

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(count).uniform_(low, high, generator=generator)

    turn, shear = uniform(-30, 30).deg2rad(), uniform(-15, 15).deg2rad()
    on = (torch.rand(count, generator=generator) < 0.5).float()
    turn, shear = turn * on, shear * on
    flip = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    area, ratio = uniform(0.2, 1.0), uniform(math.log(3 / 4), math.log(4 / 3)).exp()
    wide, high = (area * ratio).sqrt().clamp_max(1), (area / ratio).sqrt().clamp_max(1)
    place = torch.stack([uniform(-1, 1) * (1 - wide), uniform(-1, 1) * (1 - high)], 1)
    crop = torch.zeros(count, 2, 2)
    crop[:, 0, 0], crop[:, 1, 1] = wide, high
    matrix = torch.stack([turn.cos(), -(turn + shear).sin(), turn.sin(), (turn + shear).cos()], 1).view(-1, 2, 2)
    moved = matrix @ place[..., None] + 0.4 * torch.stack([uniform(-1, 1) * on, uniform(-1, 1) * on], 1)[..., None]
    mirror = torch.diag_embed(torch.stack([flip, torch.ones(count)], 1))
    return mirror @ torch.cat([matrix @ crop, moved], 2)


def augmented(maps: Tensor, affine: Tensor, side: int, mode: Literal["bilinear", "bicubic"] = "bilinear") -> Tensor:
    """(B, C, side, side): ``maps`` (B, C, H, W) under ``affine`` (B, 2, 3), 0 from outside.

    Of codes, "bicubic" is the plain branch of the paper; what comes out is to be quantised again.
    """
    grid = affine_grid(affine, [len(maps), maps.shape[1], side, side], align_corners=False)
    return grid_sample(maps, grid.to(maps.dtype), mode=mode, align_corners=False)


def patched(x: Tensor) -> Tensor:
    """(B, N, 4, ...): maps (B, h, w, ...) as 2 x 2 patches row by row, in each the four places row by row."""
    b, h, w = x.shape[:3]
    cut = x.reshape(b, h // 2, 2, w // 2, 2, *x.shape[3:])
    return cut.transpose(2, 3).reshape(b, h * w // 4, 4, *x.shape[3:])


def unpatched(x: Tensor, side: int) -> Tensor:
    """(B, side, side, ...): the inverse of ``patched``."""
    half = side // 2
    cut = x.reshape(len(x), half, half, 2, 2, *x.shape[3:])
    return cut.transpose(2, 3).reshape(len(x), side, side, *x.shape[3:])
