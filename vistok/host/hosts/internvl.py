"""InternVL: tiles and a thumbnail, a class token, 2 x 2 patches joined to a token by pixel shuffle."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vistok.core import flops
from vistok.host.hosts.base import Host, UnsupportedModel
from vistok.host.layout import Layout, Part
from vistok.host.taps import SplitTap, Tap
from vistok.host.vision import VisionRun


class InternVLHost(Host):
    """InternVLForConditionalGeneration.

    A picture is a run of image placeholders without a gap, as the processor writes it: one tile, or several of which
    the last is the thumbnail. In the evidence the thumbnail comes first.
    """

    class_token = True

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        config = model.config
        if config.vision_feature_select_strategy != "default":
            raise UnsupportedModel(
                f"{self.name} with vision_feature_select_strategy={config.vision_feature_select_strategy!r}: not "
                "supported yet: the class token would take part in the pixel shuffle"
            )
        self.merge = round(1 / config.downsample_ratio) ** 2
        self._layouts: dict[int, Layout] = {}

    @property
    def blocks(self) -> Any:
        return self.tower.encoder.layer

    def tap(self, layer: int) -> Tap:
        attention = self.blocks[layer].attention
        # q_norm and k_norm are there in any case, as identities where the model has none
        return SplitTap(attention, attention.q_norm, attention.k_norm, self.class_token)

    @cached_property
    def shuffle(self) -> Tensor:
        """(N, g) int64: the patches of each token of a tile, by the model's own pixel shuffle of their indices."""
        h, w = self.tower.embeddings.patch_embeddings.patch_shape
        index = torch.arange(h * w, dtype=torch.float64).view(1, h, w, 1)
        return (
            self.base.pixel_shuffle(index, scale_factor=self.model.config.downsample_ratio).view(-1, self.merge).long()
        )

    def patch_rows(self, features: Tensor, run: VisionRun) -> Tensor:
        tiles, tokens, _ = features.shape
        rows = features.reshape(tiles, tokens * self.merge, -1)
        order = self.shuffle.flatten().to(features.device)
        return torch.empty_like(rows).index_copy_(1, order, rows).flatten(0, 1)

    def layouts(self, run: VisionRun, visual: Tensor) -> list[Layout]:
        tokens = len(self.shuffle)
        copies = max(1, int(visual.sum()) // run.rows)
        edges = torch.nn.functional.pad(visual[::copies].int(), (1, 1)).diff(dim=1)
        starts, ends = (edges == 1).nonzero(), (edges == -1).nonzero()
        return [self._layout(length // tokens) for length in (ends[:, 1] - starts[:, 1]).tolist()]

    def _layout(self, tiles: int) -> Layout:
        if tiles not in self._layouts:
            patches = self.shuffle
            tokens, merged = len(patches), patches.numel()
            order = [tiles - 1, *range(tiles - 1)]
            h, w = self.tower.embeddings.patch_embeddings.patch_shape
            side = round(self.merge**0.5)
            grid = (h // side, w // side)
            whole = Part(grid, (0.0, 0.0, 1.0, 1.0))
            self._layouts[tiles] = Layout(
                length=tiles * tokens,
                offsets=torch.cat([torch.arange(tokens) + t * tokens for t in order]),
                patches=torch.cat([patches + t * merged for t in order]),
                num_patches=tiles * merged,
                parts=(whole, *[Part(grid, None)] * (tiles - 1)),
            )
        return self._layouts[tiles]

    def vision_flops(self, run: VisionRun) -> int:
        tiles, vision, text = run.call["units"], self.model.config.vision_config, self.model.config.text_config
        patches = self.shuffle.numel()
        tower = flops.vision_tower(
            patches,
            vision.hidden_size,
            vision.intermediate_size,
            vision.num_attention_heads,
            len(self.blocks),
            patch=1,
            channels=vision.num_channels * vision.patch_size[0] * vision.patch_size[1],
        )
        features = vision.hidden_size * self.merge
        return tiles * tower + flops.linear(run.rows, features, text.hidden_size, text.hidden_size)
