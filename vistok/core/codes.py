"""What a tokenizer makes of a picture: ids, the vectors they stand for, and what must be known to read them back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, TypeAlias

import torch
from torch import Tensor

BitOrder: TypeAlias = Literal["first-lowest", "first-highest"]
"""Whether the first channel is the least or the most significant digit of an id."""


@dataclass(frozen=True)
class CodeFormat:
    """How ids are made and what they may be."""

    sizes: tuple[int, ...]
    """How many values an id may take, by column of a token: one for a plain codebook, several for residual or product
    codes, () for continuous codes."""
    bit_order: BitOrder | None = None
    """Where an id is packed from channels (FSQ, LFQ); libraries differ. None where an id is the row of a table."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the map that ``z`` is, row after row; None for a sequence, of which any beginning decodes."""
    scales: tuple[int, ...] = ()
    """Tokens of each scale, coarse to fine, where ``z`` is a sum over scales; ids of the scales follow one another."""

    @property
    def bits(self) -> int:
        """Bits of one token's ids, each stored in a whole number of bits."""
        return sum(bits_of(size) for size in self.sizes)


@dataclass(frozen=True)
class Codes:
    """The tokens of B pictures, N of them each at most."""

    ids: Tensor | None
    """(B, N) int64, or (B, N, C) where a token has several ids; -1 where there is no token. None for continuous
    codes."""
    z: Tensor | None
    """(B, M, D) float32: the decoder's vectors, 0 where there is no token. M is N, or with ``format.scales`` the
    tokens of the finest scale. None where they are still to be looked up (``ids_to_z``)."""
    format: CodeFormat
    mask: Tensor | None = None
    """(B, N) bool, False where there is no token; None: all are there."""
    losses: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))
    """Terms of the bottleneck's loss, with their weights, each a number."""

    @property
    def loss(self) -> Tensor:
        """The sum of ``losses``."""
        like = self.z if self.z is not None else self.ids
        assert like is not None
        return sum(self.losses.values(), torch.zeros((), device=like.device))

    @property
    def bits(self) -> Tensor:
        """(B,) int64: bits of each picture's tokens as stored, ids in whole bits, continuous codes as float32."""
        tokens = self.ids if self.ids is not None else self.z
        assert tokens is not None
        each = self.format.bits if self.ids is not None else 32 * tokens.shape[-1]
        b, n = tokens.shape[:2]
        return each * (torch.full((b,), n, device=tokens.device) if self.mask is None else self.mask.sum(1))

    def prefix(self, k: int | Tensor) -> Codes:
        """The first ``k`` tokens of each picture: an int, or (B,) int64 for a number of its own each (then masked).

        With ``format.scales``, ``k`` must end on a scale, and ``z`` is left to be looked up. ValueError for a ``k``
        out of range, and for the tokens of a grid, whose beginning is but the top of the picture.
        """
        tokens = self.ids if self.ids is not None else self.z
        assert tokens is not None
        n, scales = tokens.shape[1], self.format.scales
        if self.format.grid is not None and not scales:
            raise ValueError("k: these tokens are a grid, of which no beginning decodes; only a sequence has a prefix")
        longest = k if isinstance(k, int) else int(k.max())
        least = k if isinstance(k, int) else int(k.min())
        if not 1 <= least <= longest <= n:
            raise ValueError(f"k: got {least if least < 1 else longest}, must be between 1 and the {n} tokens")
        if scales:
            ends = [sum(scales[: i + 1]) for i in range(len(scales))]
            if not isinstance(k, int) or k not in ends:
                raise ValueError(f"k: got {k}, must end on a scale: {', '.join(map(str, ends))}")
        mask = None if self.mask is None else self.mask[:, :longest]
        ids = None if self.ids is None else self.ids[:, :longest]
        z = None if self.z is None or scales else self.z[:, :longest]
        if not isinstance(k, int):
            here = torch.arange(longest, device=tokens.device) < k.to(tokens.device)[:, None]
            mask = here if mask is None else here & mask
            ids = None if ids is None else ids.masked_fill(~_over(mask, ids), -1)
            z = None if z is None else z.masked_fill(~mask[..., None], 0)
        return replace(self, ids=ids, z=z, mask=mask)

    def depth(self, k: int) -> Codes:
        """The first ``k`` columns of ids of each token (residual codes); ``z`` is left to be looked up."""
        columns = len(self.format.sizes)
        if self.ids is None or self.ids.dim() != 3 or not 1 <= k <= columns:
            raise ValueError(f"k: got {k}, must be between 1 and the {columns} ids of a token")
        return replace(self, ids=self.ids[..., :k], z=None, format=replace(self.format, sizes=self.format.sizes[:k]))


def bits_of(size: int) -> int:
    """Bits in which an id of ``size`` values is stored: log2, rounded up."""
    if size < 1:
        raise ValueError(f"size: got {size}, must be 1 or more")
    return math.ceil(math.log2(size)) if size < 2**48 else (size - 1).bit_length()


def _over(mask: Tensor, ids: Tensor) -> Tensor:
    return mask if ids.dim() == 2 else mask[..., None]
