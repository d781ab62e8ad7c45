"""Pictures cut in tiles of one size, whose patches are joined by pixel shuffle: what InternVL and Idefics3 share."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vistok.core import flops
from vistok.host.hosts.base import Host
from vistok.host.layout import Layout, Part
from vistok.host.vision import VisionRun

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


class TiledHost(Host):
    """A picture is one tile, or several of which the last is the thumbnail. In the evidence the thumbnail is first."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._layouts: dict[Any, Layout] = {}

    @property
    @abstractmethod
    def patch_grid(self) -> tuple[int, int]:
        """(h, w) patches of a tile."""

    @abstractmethod
    def shuffled(self, planes: Tensor) -> Tensor:
        """(1, ..., g) of ``planes`` (1, h * w, 1), by the model's own pixel shuffle."""

    @cached_property
    def shuffle(self) -> Tensor:
        """(N, g) int64: the patches of each token of a tile."""
        h, w = self.patch_grid
        index = torch.arange(h * w, dtype=torch.float64).view(1, h * w, 1)
        return self.shuffled(index).reshape(-1, self.merge).long()

    def patch_rows(self, features: Tensor, run: VisionRun) -> Tensor:
        tiles, tokens, _ = features.shape
        rows = features.reshape(tiles, tokens * self.merge, -1)
        order = self.shuffle.flatten().to(features.device)
        return torch.empty_like(rows).index_copy_(1, order, rows).flatten(0, 1)

    def tiled(self, tiles: int, boxes: tuple[Box | None, ...] | None = None) -> Layout:
        """The layout of a picture of ``tiles`` tiles; ``boxes``: what each but the last shows, if that is known."""
        key = tiles, boxes
        if key not in self._layouts:
            patches = self.shuffle
            tokens, merged = len(patches), patches.numel()
            order = [tiles - 1, *range(tiles - 1)]
            h, w = self.patch_grid
            side = round(self.merge**0.5)
            grid = (h // side, w // side)
            self._layouts[key] = Layout(
                length=tiles * tokens,
                offsets=torch.cat([torch.arange(tokens) + t * tokens for t in order]),
                patches=torch.cat([patches + t * merged for t in order]),
                num_patches=tiles * merged,
                parts=(Part(grid, WHOLE), *(Part(grid, box) for box in boxes or [None] * (tiles - 1))),
            )
        return self._layouts[key]

    def tiles_flops(self, run: VisionRun, pixels: int) -> int:
        """Encoder and projector; ``pixels``: values of a patch."""
        vision, text = self.model.config.vision_config, self.model.config.text_config
        tower = flops.vision_tower(
            self.shuffle.numel(),
            vision.hidden_size,
            vision.intermediate_size,
            vision.num_attention_heads,
            len(self.blocks),
            patch=1,
            channels=pixels,
            class_token=self.class_token,
        )
        return run.call["units"] * tower + flops.linear(
            run.rows, vision.hidden_size * self.merge, *self.projector_widths(text.hidden_size)
        )

    def projector_widths(self, width: int) -> tuple[int, ...]:
        """What the projector's linear layers give, one after another, for a language model of ``width``."""
        return (width,)


def runs(visual: Tensor) -> tuple[Tensor, Tensor]:
    """(R, 2) int64 row and column of the first and past the last of each run of placeholders in ``visual`` (B, T)."""
    edges = torch.nn.functional.pad(visual.int(), (1, 1)).diff(dim=1)
    return (edges == 1).nonzero(), (edges == -1).nonzero()
