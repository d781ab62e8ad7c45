"""LLaVA-NeXT and LLaVA-OneVision: a thumbnail and crops, unpadded, with a newline token at the end of each row; videos,
whose frames are pooled.

Which patch each packed token is, is read off the model's own packing function, run on planes that hold each patch's
index instead of its features.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vistok.core import flops
from vistok.host.hooks import Hooks
from vistok.host.hosts.base import square
from vistok.host.hosts.llava import LlavaHost
from vistok.host.layout import Layout, Part, squares, video
from vistok.host.vision import Probe, VisionRun

NEVER = "anyres_max_1000000"
"""A vision_aspect_ratio by which OneVision never shrinks the crops."""


class AnyresHost(LlavaHost):
    """LlavaNextForConditionalGeneration, LlavaNextVideoForConditionalGeneration and
    LlavaOnevisionForConditionalGeneration."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._layouts: dict[Any, Layout] = {}
        self._call: Mapping[str, Any] = {}
        self.videos = hasattr(self.base, "get_video_features")
        self._signature = inspect.signature(self.base.get_image_features)

    def watch(self, hooks: Hooks, probe: Probe) -> None:
        # generate() encodes the pictures before it calls the model, and no module is given their sizes.
        def called(*args: Any, **kwargs: Any) -> None:
            self._call = self._signature.bind_partial(*args, **kwargs).arguments

        hooks.watch(self.base, "get_image_features", called)
        super().watch(hooks, probe)

    def call_of(self, args: Any, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.kind == "video":
            return {**super().call_of(args, kwargs), "clips": self.clips[:2]}
        call, self._call = self._call, {}
        sizes, cut = self._shown(call)
        aspect = call.get("vision_aspect_ratio") or getattr(self.model.config, "vision_aspect_ratio", None)
        return {**super().call_of(args, kwargs), "sizes": sizes, "cut": cut, "aspect": aspect}

    @staticmethod
    def _shown(given: Mapping[str, Any]) -> tuple[list[tuple[int, ...]], list[bool]]:
        """(height, width) of each picture that ``get_image_features`` is given, and whether it is cut into crops."""
        sizes = [tuple(int(x) for x in size) for size in given.get("image_sizes", ())]
        several = given.get("batch_num_images")
        return sizes, [True] * len(sizes) if several is None else [int(n) == 1 for n in several for _ in range(int(n))]

    def spent(self, given: Mapping[str, Any], ids: Tensor) -> list[int]:
        return [self._crops(size) if cut else 1 for size, cut in zip(*self._shown(given), strict=True)]

    @cached_property
    def pooler(self) -> Any:
        """What joins a frame's patches before the projector; None where they are joined after it, or in no video."""
        return getattr(self.base, "vision_resampler", None)

    @cached_property
    def frame(self) -> Layout:
        """The layout of one frame of a video."""
        config = self.model.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        if self.pooler is not None:
            found = squares(side, side, config.spatial_pool_stride)
            patches, grid = found.patches, found.parts[0].grid
            weights = torch.full(patches.shape, 1 / patches.shape[1])
        else:
            places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double()
            points = self.base.apply_pooling(places[None])[0]
            patches, weights = _between(points, torch.arange(side**2), (side, side))
            grid = square(len(points), self.name)
        tokens = torch.arange(len(patches))
        return Layout(len(tokens), tokens, patches, side**2, (Part(grid, (0.0, 0.0, 1.0, 1.0)),), weights.float())

    def patch_rows(self, features: Tensor, run: VisionRun) -> Tensor:
        if run.kind == "image" or self.pooler is None:
            return super().patch_rows(features, run)
        # Their mean over the patches of a token, which is what a token gets, is then what the pooler made of them.
        patches = self.frame.on(features.device)[1]
        rows = features.new_zeros(len(features), self.frame.num_patches, features.shape[-1])
        rows[:, patches.flatten()] = features.repeat_interleave(patches.shape[1], 1)
        return rows.flatten(0, 1)

    def patches_of(self, run: VisionRun) -> int:
        return super().patches_of(run) if run.kind == "image" else self.frame.num_patches

    def vision_flops(self, run: VisionRun) -> int:
        total, convolution = super().vision_flops(run), getattr(self.pooler, "pool", None)
        if run.kind == "video" and isinstance(convolution, nn.Conv2d):
            out, *values = convolution.weight.shape
            total += flops.linear(run.rows, math.prod(values), out)
        return total

    def layouts(self, run: VisionRun, visual: Tensor) -> list[Layout]:
        if run.kind == "video":
            count, frames = run.call["clips"]
            return [video(self.frame, frames, ends=int(self.pooler is None))] * count
        patches = run.rows // run.call["units"]
        out = []
        for size, cut in zip(run.call["sizes"], run.call["cut"], strict=True):
            crops = self._crops(size) if cut else 1
            key = (size, crops, patches, run.call["aspect"])
            if key not in self._layouts:
                self._layouts[key] = self._share(self._layout(*key))
            out.append(self._layouts[key])
        return out

    def _crops(self, size: tuple[int, ...]) -> int:
        """Encoder sequences that a picture of ``size`` (height, width) takes, by the model's own count."""
        module: Any = inspect.getmodule(type(self.base))
        return module.image_size_to_num_patches(
            image_size=size,
            grid_pinpoints=self.model.config.image_grid_pinpoints,
            patch_size=self.model.config.vision_config.image_size,
        )

    def _share(self, layout: Layout) -> Layout:
        """The Layout object of an earlier picture that is alike, if there is one."""

        def same(a: Tensor | None, b: Tensor | None) -> bool:
            return a is b if a is None or b is None else torch.equal(a, b)

        for other in self._layouts.values():
            if (
                (other.length, other.parts) == (layout.length, layout.parts)
                and same(other.offsets, layout.offsets)
                and same(other.patches, layout.patches)
                and same(other.weights, layout.weights)
            ):
                return other
        return layout

    def _pack(self, planes: Tensor, size: tuple[int, ...], aspect: str | None) -> Tensor:
        """(length, C): ``planes`` (crops, patches, C) through the model's packing; newline tokens are -1."""
        options: dict[str, Any] = {"image_newline": torch.full((planes.shape[-1],), -1.0, dtype=planes.dtype)}
        wanted = inspect.signature(self.base.pack_image_features).parameters
        if "vision_feature_select_strategy" in wanted:
            options["vision_feature_select_strategy"] = self.model.config.vision_feature_select_strategy
        if "vision_aspect_ratio" in wanted:
            options["vision_aspect_ratio"] = aspect
        packed, _ = self.base.pack_image_features([planes], torch.tensor([size]), **options)
        return packed[0]

    def _layout(self, size: tuple[int, ...], crops: int, patches: int, aspect: str | None) -> Layout:
        h, w = square(patches, self.name)
        index = torch.arange(crops * patches, dtype=torch.float64).view(crops, patches, 1)
        flat = self._pack(index, size, NEVER)[:, 0].round().long()
        length = len(flat)
        tokens = (flat >= 0).nonzero()[:, 0]
        flat = flat[tokens]
        crop, y, x = flat // patches, flat % patches // w, flat % w
        whole = (0.0, 0.0, 1.0, 1.0)
        if crops == 1:
            return Layout(length, tokens, flat[:, None], patches, (Part((h, w), whole),))

        outer = crop > 0
        width = int(_runs(tokens[outer])[0])
        height = int(outer.sum()) // width
        packed = self._pack(self._coordinates(flat[outer], (height, width), crops, patches), size, aspect)
        if len(packed) != length:
            return self._shrunk(packed, flat[outer], (height, width), (h, w), crops)

        parts = [Part((h, w), whole)]
        row, column = torch.arange(int(outer.sum())) // width, torch.arange(int(outer.sum())) % width
        for number in crop[outer].unique().tolist():
            mine = crop[outer] == number
            top, left = int(row[mine].min()), int(column[mine].min())
            rows, columns = len(y[outer][mine].unique()), len(x[outer][mine].unique())
            box = (left / width, top / height, (left + columns) / width, (top + rows) / height)
            parts.append(Part((rows, columns), box))
        order = flat.argsort()  # crop by crop, each in raster order
        return Layout(length, tokens[order], flat[order][:, None], crops * patches, tuple(parts))

    @staticmethod
    def _coordinates(flat: Tensor, grid: tuple[int, int], crops: int, patches: int) -> Tensor:
        """(crops, patches, 2) planes of each patch's row and column in the unpadded picture of raster ``flat``."""
        planes = torch.zeros(crops * patches, 2, dtype=torch.float64)
        place = torch.arange(len(flat))
        planes[flat] = torch.stack([place // grid[1], place % grid[1]], -1).double()
        return planes.view(crops, patches, 2)

    @staticmethod
    def _shrunk(packed: Tensor, flat: Tensor, grid: tuple[int, int], crop: tuple[int, int], crops: int) -> Layout:
        """OneVision's large pictures: tokens interpolated between the (up to) four patches around a point.

        ``packed`` (length, 2): those points, as the model's own interpolation gives them for a plane of coordinates;
        ``flat``: the patch at each place of the unpadded ``grid``.
        """
        (h, w), patches = crop, crop[0] * crop[1]
        outer = (packed[patches:] >= 0).all(-1).nonzero()[:, 0] + patches
        corners, weights = _between(packed[outer], flat, grid)
        first = torch.zeros(patches, 4, dtype=torch.float64)
        first[:, 0] = 1
        width = int(_runs(outer)[0])
        whole = (0.0, 0.0, 1.0, 1.0)
        return Layout(
            len(packed),
            torch.cat([torch.arange(patches), outer]),
            torch.cat([torch.arange(patches)[:, None].expand(-1, 4), corners]),
            crops * patches,
            (Part((h, w), whole), Part((len(outer) // width, width), whole)),
            torch.cat([first, weights]).float(),
        )


def _between(points: Tensor, flat: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(N, 4) the patches around each of the ``points`` (N, 2: row, column) of a ``grid`` with the patches ``flat`` in
    raster order, and (N, 4) their shares by bilinear interpolation."""
    low = points.T.floor().long()
    high = torch.minimum(low + 1, torch.tensor(grid)[:, None] - 1)
    share = points.T - low
    corners, weights = [], []
    for rows, part in ((low[0], 1 - share[0]), (high[0], share[0])):
        for columns, other in ((low[1], 1 - share[1]), (high[1], share[1])):
            corners.append(flat[rows * grid[1] + columns])
            weights.append(part * other)
    return torch.stack(corners, -1), torch.stack(weights, -1)


def _runs(places: Tensor) -> Tensor:
    """Lengths of the runs of consecutive numbers in the ascending ``places``."""
    ends = torch.cat([(places.diff() > 1).nonzero()[:, 0], torch.tensor([len(places) - 1])])
    return torch.cat([ends[:1] + 1, ends.diff()])
