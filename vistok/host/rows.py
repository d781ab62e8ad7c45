"""Rows of a batch after tokens were dropped: still rectangular, padding on the left, nothing reordered."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(alive: Tensor, valid: Tensor | None) -> Tensor:
    """(B, T') int64: the columns of each row that go on, -1 for padding put in on the left.

    ``alive`` (B, T) bool: not dropped. ``valid`` (B, T) bool: not padding of the caller's (None: all). T' is the
    longest row's count of tokens that are both; shorter rows keep as much of their own padding as fills them up.
    """
    if valid is not None:
        real = alive & valid
        length = int(real.sum(1).max())
        padding = alive & ~valid
        from_right = padding.flip(1).cumsum(1).flip(1)
        alive = real | (padding & (from_right <= length - real.sum(1, keepdim=True)))
    count = alive.sum(1, keepdim=True)
    length = int(count.max())
    columns = (~alive).int().sort(dim=1, stable=True).indices
    place = torch.arange(length, device=alive.device) - (length - count)
    return torch.where(place < 0, -1, columns.gather(1, place.clamp(min=0)))


def take(x: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """``x`` gathered along ``dim`` by ``index`` (B, T') whose -1 give zeros; the batch is the dimension before ``dim``
    (of size B, or 1 for all)."""
    dim %= x.ndim
    if x.shape[dim - 1] != len(index):
        x = x.expand(*x.shape[: dim - 1], len(index), *x.shape[dim:])
    shape = [1] * x.ndim
    shape[dim - 1], shape[dim] = index.shape
    index = index.view(shape)
    out = x.gather(dim, index.clamp(min=0).expand(*x.shape[:dim], index.shape[dim], *x.shape[dim + 1 :]))
    return out.masked_fill(index < 0, 0)


def take_keys(x: Tensor, index: Tensor) -> Tensor:
    """Keys or values ``x`` (B, H, S, d) gathered by ``index`` (B, S'): (B, H, S', d); at -1 stands anything."""
    at = index.clamp(min=0)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, at)


def places(index: Tensor, width: int) -> Tensor:
    """(B, width) int64: where each column went, the inverse of ``index`` (B, T'); -1 for the ones that are gone."""
    out = torch.full((len(index), width + 1), -1, dtype=torch.int64, device=index.device)
    target = torch.where(index < 0, width, index)
    slots = torch.arange(index.shape[1], device=index.device).expand_as(index)
    return out.scatter_(1, target, slots)[:, :width]
