"""Bottlenecks without a table: FSQ, LFQ, and the continuous ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vistok.core.codes import BitOrder
from vistok.core.quantize import (
    entropies,
    fsq_bound,
    fsq_digits,
    fsq_values,
    pack,
    pass_through,
    signs,
    unpack,
)
from vistok.parts.quantize.base import Bottleneck, mean_square, without


class FSQ(Bottleneck):
    """Finite scalar quantisation (Mentzer et al., arXiv 2309.15505): each channel rounded to one of ``levels``.

    ``groups``: so many groups of ``len(levels)`` channels side by side, each with an id. No loss; the gradient is that
    of the bounding function. An even number of levels is not symmetric: its values run from -1 to 1 - 2 / L.
    """

    def __init__(self, levels: Sequence[int], groups: int = 1, bit_order: BitOrder = "first-lowest") -> None:
        super().__init__()
        self.levels, self.groups, self.bit_order = tuple(levels), groups, bit_order
        self.dim = len(self.levels) * groups
        self.sizes = (math.prod(self.levels),) * groups
        self.count_up_to(self.sizes[0])

    def bounded(self, z: Tensor) -> Tensor:
        """``z`` (..., dim) as ``quantize`` gives it, but not rounded: in about [-1, 1]."""
        middle = torch.tensor([level // 2 for level in self.levels], dtype=torch.float32, device=z.device)
        return (fsq_bound(self._grouped(z), self.levels) / middle).flatten(-2)

    def quantize(
        self, z: Tensor, mask: Tensor | None, grid: tuple[int, int] | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        digits = fsq_digits(self._grouped(z), self.levels)
        ids = without(self._columns(pack(digits, self.levels, self.order)), mask)
        self.count(ids)
        return pass_through(self.bounded(z), fsq_values(digits, self.levels).flatten(-2)), ids, {}

    def lookup(self, ids: Tensor, grid: tuple[int, int] | None) -> Tensor:
        columns = ids if ids.dim() == 3 else ids[..., None]
        values = fsq_values(unpack(columns.clamp_min(0), self.levels, self.order), self.levels)
        return values.masked_fill((columns < 0)[..., None], 0).flatten(-2)

    @property
    def order(self) -> BitOrder:
        assert self.bit_order is not None
        return self.bit_order

    def _grouped(self, z: Tensor) -> Tensor:
        return z.unflatten(-1, (self.groups, len(self.levels)))

    def _columns(self, ids: Tensor) -> Tensor:
        return ids if self.groups > 1 else ids[..., 0]


class LFQ(Bottleneck):
    """Look-up-free quantisation (Yu et al., arXiv 2310.05737): each of ``bits`` channels to its sign, +1 or -1.

    ``bit_order``: Open-MAGVIT2 has the first channel lowest, vector-quantize-pytorch highest. Losses: ``commitment``
    times the mean square to the signs, ``entropy`` times the entropy regulariser over all 2^bits codes.
    """

    def __init__(
        self,
        bits: int,
        *,
        bit_order: BitOrder = "first-lowest",
        commitment: float = 0.25,
        entropy: float = 0.1,
        temperature: float = 0.01,
    ) -> None:
        super().__init__()
        if not 1 <= bits <= 62:
            raise ValueError(f"bits: got {bits}, must be between 1 and 62")
        if entropy and bits > 18:
            raise ValueError(f"entropy: got {entropy} with {bits} bits, must be 0 above 18 bits: it counts all codes")
        self.dim, self.sizes, self.bit_order = bits, (2**bits,), bit_order
        self.order: BitOrder = bit_order
        self.commitment, self.entropy, self.temperature = commitment, entropy, temperature
        self.count_up_to(2**bits)

    def quantize(
        self, z: Tensor, mask: Tensor | None, grid: tuple[int, int] | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        q = signs(z)
        ids = without(pack((q > 0).long(), (2,) * self.dim, self.order), mask)
        self.count(ids)
        losses = {}
        if self.commitment:
            losses["commitment"] = self.commitment * mean_square(z, q, mask)
        if self.entropy:
            sample, batch = entropies(z, self.all_codes(z.device), self.temperature, mask=mask)
            losses["entropy"] = self.entropy * (sample - batch)
        return pass_through(z, q), ids, losses

    def lookup(self, ids: Tensor, grid: tuple[int, int] | None) -> Tensor:
        ids = ids if ids.dim() == 2 else ids[..., 0]
        values = 2.0 * unpack(ids.clamp_min(0), (2,) * self.dim, self.order) - 1
        return values.masked_fill((ids < 0)[..., None], 0)

    def all_codes(self, device: torch.device | str = "cpu") -> Tensor:
        """(2^bits, bits) float32: every code, by its id."""
        return 2.0 * unpack(torch.arange(2**self.dim, device=device), (2,) * self.dim, self.order) - 1


class Gaussian(Bottleneck):
    """Continuous codes of ``dim // 2`` channels: the input is their mean and log-variance, half the channels each.

    A draw in training, the mean in evaluation. Loss: ``kl`` times the divergence from N(0, I), in nats, mean over
    tokens and channels.
    """

    def __init__(self, channels: int, kl: float = 1e-6) -> None:
        super().__init__()
        self.dim, self.kl = 2 * channels, kl

    def quantize(
        self, z: Tensor, mask: Tensor | None, grid: tuple[int, int] | None
    ) -> tuple[Tensor, None, dict[str, Tensor]]:
        mean, log_variance = z.chunk(2, -1)
        log_variance = log_variance.clamp(-30, 20)
        each = (mean.square() + log_variance.exp() - 1 - log_variance) / 2
        weight = torch.ones_like(each) if mask is None else mask[..., None].expand_as(each).to(each.dtype)
        losses = {"kl": self.kl * (each * weight).sum() / weight.sum().clamp_min(1)} if self.kl else {}
        drawn = mean + (log_variance / 2).exp() * torch.randn_like(mean) if self.training else mean
        return drawn, None, losses

    def bits(self) -> int:
        return 16 * self.dim


class Identity(Bottleneck):
    """Continuous codes as they come."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def quantize(
        self, z: Tensor, mask: Tensor | None, grid: tuple[int, int] | None
    ) -> tuple[Tensor, None, dict[str, Tensor]]:
        return z, None, {}
