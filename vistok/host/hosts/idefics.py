"""Idefics3 and SmolVLM: tiles and a thumbnail with text between them, 2 x 2 patches or more joined by pixel shuffle."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor

from vistok.host.hooks import Hooks
from vistok.host.hosts.base import UnsupportedModel
from vistok.host.hosts.tiles import Box, TiledHost, runs
from vistok.host.layout import Layout
from vistok.host.taps import SplitTap, Tap
from vistok.host.vision import Probe, VisionRun


class IdeficsHost(TiledHost):
    """Idefics3ForConditionalGeneration and SmolVLMForConditionalGeneration.

    Their processors write two tokens before each tile: one that is the same for all, and one that says which tile it
    is; a line ends after each row of tiles, and the thumbnail ends the picture. So the token before the last run of
    placeholders of a row marks a thumbnail, wherever it stands. A prompt of embeddings does not show it: there each
    tile counts as a picture.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        scale = model.config.scale_factor
        self.merge = scale**2
        if self.patch_grid[0] % scale:
            raise UnsupportedModel(
                f"{self.name} with {self.patch_grid[0]} patches a side, which is no multiple of scale_factor={scale}: "
                "its connector would join patches of different places"
            )
        self._ids: Tensor | None = None

    @property
    def language_model(self) -> Any:
        return self.base.text_model

    @property
    def tower(self) -> Any:
        return self.base.vision_model

    @property
    def projector(self) -> Any:
        return self.base.connector.modality_projection

    @property
    def patch_grid(self) -> tuple[int, int]:
        config = self.model.config.vision_config
        side = config.image_size // config.patch_size
        return side, side

    def tap(self, layer: int) -> Tap:
        attention = self.blocks[layer].self_attn
        return SplitTap(attention, attention.q_proj, attention.k_proj, self.class_token)

    def shuffled(self, planes: Tensor) -> Tensor:
        return self.base.connector.pixel_shuffle(planes, self.model.config.scale_factor)

    def watch(self, hooks: Hooks, probe: Probe) -> None:
        def called(module: Any, args: Any, kwargs: Any) -> None:
            self._ids = args[0] if args else kwargs.get("input_ids")

        hooks.before(self.base, called)
        super().watch(hooks, probe)

    def call_of(self, args: Any, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        pixels, side = self.pixels(args, kwargs), self.model.config.vision_config.image_size
        if tuple(pixels.shape[-2:]) != (side, side):
            raise UnsupportedModel(
                f"{self.name}: pixel_values of {pixels.shape[-2]} x {pixels.shape[-1]} pixels: not supported yet; its "
                f"processor makes tiles of {side} x {side}"
            )
        mask = kwargs.get("patch_attention_mask")
        if mask is not None and not bool(mask.all()):
            raise UnsupportedModel(f"{self.name}: pixel_attention_mask with padding inside a tile: not supported yet")
        return super().call_of(args, kwargs)

    def layouts(self, run: VisionRun, visual: Tensor) -> list[Layout]:
        copies = max(1, int(visual.sum()) // run.rows)
        ids, self._ids = self._ids, None
        if ids is None:
            return [self.tiled(1)] * (int(visual[::copies].sum()) // len(self.shuffle))
        return [self.tiled(len(tiles), _boxes(tiles)) for tiles in _pictures(ids[::copies], visual[::copies])]

    def spent(self, given: Mapping[str, Any], ids: Tensor) -> list[int]:
        return [len(tiles) for tiles in _pictures(ids, ids == self.image_token)]

    def vision_flops(self, run: VisionRun) -> int:
        vision = self.model.config.vision_config
        return self.tiles_flops(run, vision.num_channels * vision.patch_size**2)


def _pictures(ids: Tensor, visual: Tensor) -> list[list[tuple[int, int]]]:
    """The columns (first, past the last) of each picture's tiles; ``visual`` (B, T): the placeholders in ``ids``."""
    starts, ends = runs(visual)
    tiles = [(row, a, b) for (row, a), (_, b) in zip(starts.tolist(), ends.tolist(), strict=True)]
    before = ids[starts[:, 0], (starts[:, 1] - 1).clamp(min=0)].tolist()
    thumbnail = {row: mark for (row, _, _), mark in zip(tiles, before, strict=True)}  # the last of the row
    pictures, mine = [], []
    for (row, a, b), mark in zip(tiles, before, strict=True):
        mine.append((a, b))
        if mark == thumbnail[row]:
            pictures.append(mine)
            mine = []
    return pictures


def _boxes(tiles: list[tuple[int, int]]) -> tuple[Box | None, ...] | None:
    """What each tile shows, from the columns (first, past the last) of a picture's tiles in the prompt."""
    gaps = [after[0] - before[1] for before, after in pairwise(tiles)]
    if not gaps:
        return None
    width = next((i for i, gap in enumerate(gaps) if gap > 2), len(gaps) - 1) + 1
    height, rest = divmod(len(gaps), width)
    if rest:
        return None
    places = [(i // width, i % width) for i in range(len(gaps))]
    return tuple((x / width, y / height, (x + 1) / width, (y + 1) / height) for y, x in places)
