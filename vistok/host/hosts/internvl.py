"""InternVL: tiles and a thumbnail, a class token, 2 x 2 patches joined to a token by pixel shuffle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vistok.host.hosts.base import UnsupportedModel
from vistok.host.hosts.tiles import TiledHost, runs
from vistok.host.layout import Layout
from vistok.host.taps import SplitTap, Tap
from vistok.host.vision import VisionRun


class InternVLHost(TiledHost):
    """InternVLForConditionalGeneration. A picture is a run of image placeholders without a gap, as its processor writes
    it."""

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

    @property
    def blocks(self) -> Any:
        return self.tower.encoder.layer

    def tap(self, layer: int) -> Tap:
        attention = self.blocks[layer].attention
        # q_norm and k_norm are there in any case, as identities where the model has none
        return SplitTap(attention, attention.q_norm, attention.k_norm, self.class_token)

    @property
    def patch_grid(self) -> tuple[int, int]:
        return self.tower.embeddings.patch_embeddings.patch_shape

    def shuffled(self, planes: Tensor) -> Tensor:
        grid = planes.unflatten(1, self.patch_grid)
        return self.base.pixel_shuffle(grid, scale_factor=self.model.config.downsample_ratio)

    def spent(self, given: Mapping[str, Any], ids: Tensor) -> list[int]:
        starts, ends = runs(ids == self.image_token)
        return ((ends[:, 1] - starts[:, 1]) // len(self.shuffle)).tolist()

    def layouts(self, run: VisionRun, visual: Tensor) -> list[Layout]:
        tokens = len(self.shuffle)
        copies = max(1, int(visual.sum()) // run.rows)
        starts, ends = runs(visual[::copies])
        return [self.tiled(length // tokens) for length in (ends[:, 1] - starts[:, 1]).tolist()]

    def vision_flops(self, run: VisionRun) -> int:
        vision = self.model.config.vision_config
        return self.tiles_flops(run, vision.num_channels * vision.patch_size[0] * vision.patch_size[1])

    def projector_widths(self, width: int) -> tuple[int, ...]:
        return width, width
