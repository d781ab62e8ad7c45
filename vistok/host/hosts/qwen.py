"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: dynamic resolution, 2 x 2 patches merged to a token, windows, mRoPE, DeepStack,
videos."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from vistok.core import flops
from vistok.host.hosts.base import Host, UnsupportedModel
from vistok.host.layout import Layout, plain, video
from vistok.host.taps import PackedTap, Tap
from vistok.host.vision import VisionRun


class QwenHost(Host):
    """Qwen2VLForConditionalGeneration, Qwen2_5_VLForConditionalGeneration and Qwen3VLForConditionalGeneration."""

    pixels_argument = "hidden_states"
    videos = True

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.side: int = self.tower.spatial_merge_size
        self.merge = self.side**2
        self._order: Tensor | None = None

    @property
    def tower(self) -> Any:
        return self.base.visual

    @property
    def projector(self) -> Any:
        return self.tower.merger

    @property
    def blocks(self) -> Any:
        return self.tower.blocks

    def call_of(self, args: Any, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        grids: Tensor = args[1] if len(args) > 1 else kwargs["grid_thw"]
        if self.kind == "image" and bool((grids[:, 0] != 1).any()):
            raise UnsupportedModel(f"{self.name}: video (grid_thw {grids.tolist()}) is not supported as a picture")
        windows: Tensor | None = None
        self._order = None
        if hasattr(self.tower, "window_size"):
            index, windows = get_vision_window_index(
                grids,
                spatial_merge_size=self.side,
                window_size=self.tower.window_size,
                patch_size=self.tower.patch_size,
                kwargs={k: kwargs[k] for k in ("window_index", "cu_window_seqlens") if k in kwargs},
            )
            # Windowed layers see the tokens window by window; place -> patch in the order of the picture.
            inside = torch.arange(self.merge, device=index.device)
            self._order = (index[:, None] * self.merge + inside).flatten()
        return {"grids": grids.tolist(), "windows": None if windows is None else windows.diff().tolist()}

    def tap(self, layer: int) -> Tap:
        attention = self.blocks[layer].attn
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
        return PackedTap(attention, attention.qkv, rotate, lambda: self._order)

    def patch_rows(self, features: Tensor, run: VisionRun) -> Tensor:
        return self.patch_states(features)

    def patch_states(self, hidden: Tensor) -> Tensor:
        if self._order is None:
            return hidden
        return torch.empty_like(hidden).index_copy_(0, self._order.to(hidden.device), hidden)

    def patch_pixels(self, pixels: Tensor) -> Tensor:
        config = self.tower.config
        shape = (config.in_channels, config.temporal_patch_size, config.patch_size**2)
        return pixels.detach().float().unflatten(1, shape).mean((1, 2))  # two frames of a film, or a picture twice

    def project(self, tokens: Tensor) -> Tensor:
        batch, kept, width = tokens.shape
        return self.projector(tokens.reshape(-1, width // self.merge)).view(batch, kept, -1)

    def spent(self, given: Mapping[str, Any], ids: Tensor) -> list[int]:
        return given["image_grid_thw"].prod(1).tolist()

    def layouts(self, run: VisionRun, visual: Tensor) -> list[Layout]:
        found = [(t, plain(h // self.side, w // self.side, self.merge)) for t, h, w in run.call["grids"]]
        return [frame if run.kind == "image" else video(frame, t) for t, frame in found]

    def vision_flops(self, run: VisionRun) -> int:
        config = self.tower.config
        width: int = self.blocks[0].attn.dim
        heads = config.num_heads
        sizes = [h * w for t, h, w in run.call["grids"] for _ in range(t)]  # frames do not see one another
        patches = sum(sizes)
        total = flops.linear(patches, config.in_channels * config.temporal_patch_size * config.patch_size**2, width)
        for number, block in enumerate(self.blocks):
            whole = run.call["windows"] is None or number in self.tower.fullatt_block_indexes
            lengths = sizes if whole else run.call["windows"]
            total += flops.linear(patches, width, 4 * width)
            total += sum(flops.attention(n, n, heads, width // heads) for n in lengths)
            total += sum(flops.linear(patches, *reversed(m.weight.shape)) for m in linears(block.mlp))
        mergers = [self.projector, *getattr(self.tower, "deepstack_merger_list", [])]
        tokens = patches // self.merge
        return total + sum(flops.linear(tokens, *reversed(m.weight.shape)) for part in mergers for m in linears(part))


def linears(module: Any) -> list[nn.Linear]:
    """The linear layers of a module and of all in it."""
    return [m for m in module.modules() if isinstance(m, nn.Linear)]
