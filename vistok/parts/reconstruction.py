"""The harness of tokenizer benchmarks: pictures, what a tokenizer makes of them, and the bits that it took.

A tokenizer is anything with ``encode`` (pictures (B, 3, H, W) in [0, 1] to codes that have ``bits`` (B,)) and
``decode``: every ``vistok.parts.tokenizer.Tokenizer``, ``Unchanged``, and others inside ``Foreign``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vistok.core.fidelity import to_uint8


class Rebuilds(Protocol):
    """What can be benchmarked."""

    def encode(self, images: Tensor) -> Any:
        """Codes with ``bits`` (B,) of pictures (B, 3, H, W) in [0, 1]."""
        ...

    def decode(self, codes: Any) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1], or nearly."""
        ...


@dataclass(frozen=True)
class Plain:
    """Codes that are the picture itself, or whatever somebody else's tokenizer has."""

    value: Any
    bits: Tensor
    """(B,) int64"""


class Unchanged:
    """The tokenizer that loses nothing: what it scores is what the measure can give at best."""

    def encode(self, images: Tensor) -> Plain:
        """24 bits a pixel."""
        return Plain(images, torch.full((len(images),), 24 * images[0, 0].numel()))

    def decode(self, codes: Plain) -> Tensor:
        return codes.value


@dataclass(frozen=True)
class Foreign:
    """A tokenizer of another library. ``signed``: its pictures are in [-1, 1] and not in [0, 1]."""

    encoder: Callable[[Tensor], Any]
    decoder: Callable[[Any], Tensor]
    bits: int
    """Of one picture."""
    signed: bool = False

    def encode(self, images: Tensor) -> Plain:
        given = 2 * images - 1 if self.signed else images
        return Plain(self.encoder(given), torch.full((len(images),), self.bits))

    def decode(self, codes: Plain) -> Tensor:
        made = self.decoder(codes.value)
        return (made + 1) / 2 if self.signed else made


@dataclass(frozen=True)
class Rebuilt:
    """A batch of pictures and their reconstructions, uint8 (B, 3, H, W) as they would be stored as PNG."""

    real: Tensor
    made: Tensor
    bits: Tensor
    """(B,) int64: what the codes of each take."""

    @property
    def unit(self) -> tuple[Tensor, Tensor]:
        """Reconstructions and originals as float32 in [0, 1]."""
        return self.made.float() / 255, self.real.float() / 255


@torch.no_grad()
def rebuilt(tokenizer: Rebuilds, batches: Iterable[Tensor], truncate: bool = False) -> Iterator[Rebuilt]:
    """Each batch of pictures, uint8 (B, 3, H, W), with its reconstruction; sizes may differ between batches.

    ``truncate``: levels are cut off and not rounded, which costs half a level. Raises ValueError for other dtypes, and
    for a reconstruction of another size.
    """
    for real in batches:
        if real.dtype != torch.uint8 or real.dim() != 4:
            raise ValueError(f"batches: got {real.dtype} {tuple(real.shape)}, must be uint8 (B, 3, H, W)")
        codes = tokenizer.encode(real.float() / 255)
        made = tokenizer.decode(codes)
        if made.shape != real.shape:
            raise ValueError(f"tokenizer: made {tuple(made.shape)}, must be as the pictures, {tuple(real.shape)}")
        levels = (made.clamp(0, 1) * 255).to(torch.uint8) if truncate else to_uint8(made)
        yield Rebuilt(real, levels, codes.bits)


def joined(parts: Sequence[Rebuilt]) -> Rebuilt:
    """Several batches of one size as one."""
    return Rebuilt(*(torch.cat([getattr(p, name) for p in parts]) for name in ("real", "made", "bits")))
