"""AiT's tokenizer of labels: depth maps and masks to the tokens of a small convolutional VQ-VAE, and back."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from vistok.core.codes import Codes
from vistok.core.losses import pixel
from vistok.parts.quantize import EMAQuantizer


class ConvResidual(nn.Module):
    """Two convolutions of 3 x 3 and one of 1 x 1, and what came in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = x + self.net(x)
        return made


class LabelVQ(nn.Module):
    """Maps (B, 1, ``image``, ``image``) to tokens of ``ratio`` x ``ratio`` pixels and back.

    ``depth``: whether they are depth in metres, 0 where unknown, or masks in [0, 1]. ``hidden``: channels of the finest
    level, each coarser one has twice as many. ``holes``, ``hole``: of ``mask_augment`` in training, for depth.
    """

    def __init__(
        self, depth: bool, image: int, ratio: int, hidden: int, holes: float, hole: int, bottleneck: EMAQuantizer
    ) -> None:
        super().__init__()
        halvings = ratio.bit_length() - 1
        if ratio < 2 or ratio != 2**halvings or image % ratio:
            raise ValueError(f"ratio: got {ratio}, must be a power of 2 that divides image, {image}")
        self.depth, self.image, self.grid, self.bottleneck = depth, image, (image // ratio,) * 2, bottleneck
        self.holes, self.hole = holes * depth, hole
        widths = [hidden * 2**i for i in range(halvings)]
        inside = [ConvResidual(widths[-1]) for _ in range(4)]
        down = [layer for a, b in pairwise([1, *widths]) for layer in (nn.Conv2d(a, b, 4, 2, 1), nn.ReLU())]
        self.encoder = nn.Sequential(*down, *inside[:2], nn.Conv2d(widths[-1], bottleneck.dim, 1))
        back = [widths[-1], *reversed(widths)]
        up = [layer for a, b in pairwise(back) for layer in (nn.ConvTranspose2d(a, b, 4, 2, 1), nn.ReLU())]
        first, last = nn.Conv2d(bottleneck.dim, widths[-1], 1), nn.Conv2d(widths[0], 1, 1)
        self.decoder = nn.Sequential(first, nn.ReLU(), *inside[2:], *up, last)
        for layer in self.modules():
            # There are no norms: by torch's own scale the map fades on its way, and the codes tell nothing for long.
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def encode(self, maps: Tensor) -> Codes:
        """``maps`` (B, 1, H, W): depth in metres, 0 where unknown, or a mask in [0, 1]. ValueError for another size."""
        if maps.shape[1:] != (1, self.image, self.image):
            raise ValueError(f"maps: got shape {tuple(maps.shape)}, must be (B, 1, {(self.image,) * 2})")
        z = self.encoder(maps if self.depth else 2 * maps - 1)
        made: Codes = self.bottleneck(z.flatten(2).transpose(1, 2), grid=self.grid)
        return made

    def decode(self, ids: Tensor) -> Tensor:
        """(B, 1, H, W): the maps of ``ids`` (B, N)."""
        return self.render(self.bottleneck.ids_to_z(ids))

    def decode_soft(self, logits: Tensor, tau: float = 1.0) -> Tensor:
        """(B, 1, H, W): the maps of the codes expected by softmax(``tau`` ``logits``) over the codes, (B, N, K)."""
        return self.render(self.bottleneck.soft(logits, tau))

    def render(self, z: Tensor) -> Tensor:
        """(B, 1, H, W): the maps of code vectors (B, N, dim)."""
        made: Tensor = self.decoder(z.transpose(1, 2).unflatten(2, self.grid))
        return made if self.depth else (made + 1) / 2

    def loss_of(self, made: Tensor, maps: Tensor) -> Tensor:
        """Mean square error: of depth where it is known, of masks on the scale of -1 to 1."""
        return pixel(made, maps, valid=maps > 0) if self.depth else 4 * pixel(made, maps)

    def objective(self, maps: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """What training minimises, a scalar; depth maps are given with holes in training, and must come back whole."""
        holes = self.training and self.holes
        codes = self.encode(mask_augment(maps, self.holes, self.hole, generator) if holes else maps)
        assert codes.z is not None
        return self.loss_of(self.render(codes.z), maps) + codes.loss


def mask_augment(maps: Tensor, ratio: float = 0.5, patch: int = 16, generator: torch.Generator | None = None) -> Tensor:
    """``maps`` (B, C, H, W) with 0 in ceil(``ratio`` P) of each one's P patches, drawn for each by itself.

    ``generator``: of the CPU; None: torch's random state. ValueError where ``patch`` does not divide both sides.
    """
    rows, columns = maps.shape[2] // patch, maps.shape[3] // patch
    if (rows * patch, columns * patch) != tuple(maps.shape[2:]):
        raise ValueError(f"patch: got {patch}, must divide the sides of the maps, {tuple(maps.shape[2:])}")
    rank = torch.rand(len(maps), rows * columns, generator=generator).argsort(1).argsort(1)
    gone = (rank < math.ceil(ratio * rows * columns)).view(-1, 1, rows, columns).to(maps.device)
    return maps.masked_fill(gone.repeat_interleave(patch, 2).repeat_interleave(patch, 3), 0)
