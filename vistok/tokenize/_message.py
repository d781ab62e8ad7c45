"""COMiT's transformer and what it reads: crops on a grid, and a message on its way through them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from vistok.core.flow import NOISE_FIRST
from vistok.core.quantize import fsq_unbound
from vistok.core.visibility import message_causal
from vistok.parts.diffusion_transformer import TimeEmbedding, grid_sinusoids
from vistok.parts.flow_decoder import FlowTokenizer, KindBlock, VelocityHead
from vistok.parts.quantize import FSQ

SIDE, CELLS, CENTRE = 3, 9, 4
"""Crops are on a grid of 3 x 3 cells, in raster order."""


def crop_at(images: Tensor, cell: Tensor, crop: int, stride: int) -> tuple[Tensor, Tensor]:
    """Windows (B, C, crop, crop) of ``images`` (B, C, H, W) at cells (B,), and where their centres are, (B, 2).

    A place is (x, y), from -1 at the left or upper edge of the picture to 1 at the other.
    """
    windows = images.unfold(2, crop, stride).unfold(3, crop, stride)
    row, column = cell // SIDE, cell % SIDE
    found = windows[torch.arange(len(images), device=images.device), :, row, column]
    return found, (torch.stack([column, row], 1) * stride + crop / 2) / (images.shape[2] / 2) - 1


@dataclass(frozen=True)
class Reading:
    """A message on its way through the crops of B pictures."""

    raw: Tensor
    """(B, n, d): as the network wrote it."""
    message: Tensor
    """(B, n, d): quantised, as it is read."""
    place: Tensor | None
    """(B, 2): of the crop seen last; None before the first."""

    @property
    def offset(self) -> Tensor:
        """(B, 2): the step from the last crop to the whole picture, whose place is 0."""
        return self.raw.new_zeros(len(self.raw), 2) if self.place is None else -self.place


class MessageTransformer(nn.Module):
    """[offset | patches | message read | message written] to a velocity and a message; see ``forward``.

    Patches and messages are modulated by the time, each their own way, the offset is not. ``legacy``: the released
    mask, whose ones and zeros are added to the logits.
    """

    def __init__(
        self,
        channels: int,
        patch: int,
        tokens: int,
        dim: int,
        size: tuple[int, int, int],
        zero_init: bool,
        legacy: bool,
    ) -> None:
        super().__init__()
        width, depth, heads = size
        self.tokens, self.legacy = tokens, legacy
        self.embed, self.time = nn.Conv2d(channels, width, patch, patch), TimeEmbedding(width)
        self.step_in, self.read_in = nn.Linear(2, width), nn.Linear(dim, width)
        self.read_positions, self.written = (nn.Parameter(0.02 * torch.randn(tokens, width)) for _ in range(2))
        self.blocks = nn.ModuleList(KindBlock(width, heads, 2, zero_init=zero_init) for _ in range(depth))
        self.head = VelocityHead(width, patch, channels, zero_init)
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, dim)

    def forward(
        self, x: Tensor, t: Tensor, message: Tensor, offset: Tensor, tap: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Velocity of ``x`` (B, C, h, w) at ``t`` (B,), message written (B, n, d), features (B, 1 + N + 2 n, width).

        ``message`` (B, n, d) is read, ``offset`` (B, 2) is the step to where ``x`` is. Patches of a crop have the
        places of the upper left corner: where it is, the offset tells. Features leave block number ``tap``.
        """
        dtype, b = self.embed.weight.dtype, len(x)
        patches = self.embed(x.to(dtype))
        size = patches.shape[2], patches.shape[3]
        patches = patches.flatten(2).transpose(1, 2)
        patches = patches + grid_sinusoids(size, patches.shape[2], x.device).to(patches.dtype)
        n, k = patches.shape[1], self.tokens
        where, read = self.step_in(offset.to(dtype))[:, None], self.read_in(message.to(dtype)) + self.read_positions
        together = torch.cat([where, patches, read, self.written.expand(b, -1, -1)], 1)
        kind = torch.tensor([2] + [0] * n + [1] * 2 * k, device=x.device)
        seen = message_causal(1 + n + k, k).to(x.device)
        mask = seen.to(together.dtype) if self.legacy else seen
        condition, features = self.time(t), together
        for number, block in enumerate(self.blocks, 1):
            together = block(together, kind, condition, mask)
            features = together if number == tap else features
        return self.head(together[:, 1 : 1 + n], size, condition), self.out(self.norm(together[:, -k:])), features


class Reader(FlowTokenizer):
    """A tokenizer that reads crops one after another into a message; ``comit`` draws from it."""

    flow = NOISE_FIRST
    step: MessageTransformer
    bottleneck: FSQ
    crop: int
    stride: int
    glance: bool
    legacy: bool

    def unread(self, b: int) -> Reading:
        """The message that has seen nothing: the code in the middle of the book, everywhere."""
        ids = torch.full((b, self.tokens), self.bottleneck.sizes[0] // 2, device=self.spread.device)
        z = self.bottleneck.ids_to_z(ids)
        middle = torch.tensor([level // 2 for level in self.bottleneck.levels], device=z.device)
        return Reading(fsq_unbound(z * middle, self.bottleneck.levels).to(self.dtype), z, None)

    def look(self, images: Tensor, reading: Reading, cell: Tensor | None) -> Reading:
        """The message after one more crop, at ``cell`` (B,) int64; None: the whole picture."""
        seen, place = images, images.new_zeros(len(images), 2)
        if cell is not None:
            seen, place = crop_at(images, cell, self.crop, self.stride)
        offset = torch.zeros_like(place) if reading.place is None else place - reading.place
        raw = self.step(self.data(seen), images.new_ones(len(images)), reading.message, offset)[1]
        z = self.bottleneck(raw).z
        assert z is not None
        return Reading(raw, z, place)

    def read(self, images: Tensor, cells: Tensor) -> Reading:
        """The message after the crops ``cells`` (B, S) int64, and before them the whole picture with ``glance``."""
        reading = self.unread(len(images))
        if self.glance:
            reading = self.look(images, reading, None)
        for cell in cells.unbind(1):
            reading = self.look(images, reading, cell)
        return reading

    def read_adaptively(self, images: Tensor, crops: int) -> Reading:
        """From the centre on, always to the unvisited cell where the picture is reconstructed worst (in one step)."""
        reading, b = self.read(images, torch.zeros(len(images), 0, dtype=torch.int64)), len(images)
        visited = torch.zeros(b, CELLS, dtype=torch.bool, device=images.device)
        for number in range(crops):
            cell = torch.full((b,), CENTRE, device=images.device)
            if number or self.glance:
                noise, start = self.noise(b), images.new_zeros(b)
                v = self.flow.velocity(self.step(noise, start, reading.message, reading.offset)[0])
                error = (self.pixels(self.flow.data_of(noise, start, v)) - images).square().mean(1)
                error = avg_pool2d(error[:, None], self.crop, self.stride).flatten(1)
                cell = error.masked_fill(visited, -torch.inf).argmax(1)
            visited.scatter_(1, cell[:, None], True)
            if self.legacy:
                visited |= visited.any(0)
            reading = self.look(images, reading, cell)
        return reading

    def cells(self, order: str | tuple[int, ...], crops: int) -> Tensor:
        """(S,) int64: the cells of an order that is the same for all pictures."""
        if isinstance(order, tuple):
            found = torch.tensor(order, dtype=torch.int64)
        elif order == "random":
            found = torch.randperm(CELLS, generator=torch.Generator().manual_seed(self.seed))
        else:
            found = torch.arange(CELLS)
        return found[:crops].to(self.spread.device)
