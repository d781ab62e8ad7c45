"""Super tokens: a map is pooled by a sparse soft association of each pixel to the 3x3 cells around it, and unpooled.

Source: Huang et al., Vision Transformer with Super Token Sampling, arXiv 2211.11167, hhb072/STViT. Super tokens start
as the mean of each cell and take in what is associated with them, as in superpixel sampling networks. Cells beyond the
map's edge are zero vectors: they stay in the softmax, and what goes to them is lost, so that pixels of the outer cells
give and get less than 1. A side that the cell does not divide is filled up with zeros on the right and at the bottom,
which enter the first mean; these pixels are cut off again on the way back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import fold, pad, unfold

from vistok.core.tensors import upcast

EPSILON = 1e-12
"""Added to the mass of a super token before the division by it."""


@dataclass(frozen=True)
class Association:
    """Which of the cells around it each pixel belongs to, in which part. m = h w cells of a map of H x W pixels."""

    weights: Tensor
    """(B, m, P, 9): softmax over the 3x3 cells, in raster order, of the P pixels of each cell. No gradient."""
    size: tuple[int, int]
    """(H, W) of the map, before it was filled up."""
    cell: tuple[int, int]
    """(height, width) of a cell in pixels; P is their product."""

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) cells."""
        return _grid(self.size, self.cell)

    def pool(self, x: Tensor) -> Tensor:
        """(B, C, h, w): the mean of the pixels of ``x`` (B, C, H, W), weighted by their part in each super token."""
        return self._pool(upcast(_cells(x, self.cell))).to(x.dtype)

    def unpool(self, tokens: Tensor) -> Tensor:
        """(B, C, H, W): the sum of ``tokens`` (B, C, h, w), weighted by each pixel's part in them."""
        around = neighbours(tokens)
        return self._map(around.transpose(2, 3) @ self.weights.to(tokens.dtype).transpose(2, 3))

    def _pool(self, pixels: Tensor) -> Tensor:
        weights = self.weights.to(pixels.dtype)
        taken = add_neighbours(pixels.transpose(2, 3) @ weights, self.grid)
        return taken / (add_neighbours(weights.sum(2)[:, :, None], self.grid) + EPSILON)

    def _map(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) of ``pixels`` (B, m, C, P)."""
        (h, w), (ch, cw) = self.grid, self.cell
        b, _, c, _ = pixels.shape
        x = pixels.reshape(b, h, w, c, ch, cw).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h * ch, w * cw)
        return x[:, :, : self.size[0], : self.size[1]]


def neighbours(tokens: Tensor) -> Tensor:
    """(B, m, 9, C): the 3x3 ``tokens`` (B, C, h, w) around each, in raster order; zeros beyond the edge."""
    b, c = tokens.shape[:2]
    return unfold(tokens, 3, padding=1).view(b, c, 9, -1).permute(0, 3, 2, 1)


def add_neighbours(values: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, C, h, w): what each of the m = h w cells is given by those around it; the adjoint of ``neighbours``.

    ``values`` (B, m, C, 9): what each cell gives to the 3x3 around it; what goes beyond the edge is lost.
    """
    b, m, c, _ = values.shape
    return fold(values.permute(0, 2, 3, 1).reshape(b, c * 9, m), grid, 3, padding=1)


def associate(x: Tensor, cell: tuple[int, int], iterations: int = 1) -> tuple[Tensor, Association]:
    """Super tokens (B, C, h, w) of the map ``x`` (B, C, H, W), one a ``cell`` (height, width), and who is in them.

    ``iterations`` times: each pixel's softmax over the 3x3 super tokens around it of its product with them / sqrt(C),
    then each super token is the weighted mean of its pixels. The association is made without gradient, as released: the
    super tokens have one through ``x`` alone. Computed in float32 at least. Raises ValueError for a cell or a number
    of iterations below 1.
    """
    if min(cell) < 1:
        raise ValueError(f"cell: got {cell}, both sides must be 1 or more")
    if iterations < 1:
        raise ValueError(f"iterations: got {iterations}, must be 1 or more")
    pixels = _cells(x, cell)
    size = (x.shape[2], x.shape[3])
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        wide = upcast(pixels)
        scale = x.shape[1] ** -0.5
        tokens = wide.mean(2).transpose(1, 2).reshape(*x.shape[:2], *_grid(size, cell))
        for i in range(iterations):
            found = Association((wide @ neighbours(tokens).transpose(2, 3) * scale).softmax(3), size, cell)
            if i + 1 < iterations:
                tokens = found._pool(wide)
    return found._pool(upcast(pixels)).to(x.dtype), found


def _grid(size: tuple[int, int], cell: tuple[int, int]) -> tuple[int, int]:
    return -(-size[0] // cell[0]), -(-size[1] // cell[1])


def _cells(x: Tensor, cell: tuple[int, int]) -> Tensor:
    """(B, m, P, C): the pixels of each cell of ``x`` (B, C, H, W), filled up with zeros."""
    ch, cw = cell
    x = pad(x, (0, -x.shape[3] % cw, 0, -x.shape[2] % ch))
    b, c, height, width = x.shape
    x = x.reshape(b, c, height // ch, ch, width // cw, cw)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, ch * cw, c)
