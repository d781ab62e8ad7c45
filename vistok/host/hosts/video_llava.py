"""Video-LLaVA: one CLIP-like encoder for pictures and one for videos, whose frames keep their class tokens."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vistok.host.hooks import Hooks
from vistok.host.hosts.base import square
from vistok.host.hosts.llava import LlavaHost
from vistok.host.layout import Layout, Part, video
from vistok.host.vision import Probe, VisionRun


class VideoLlavaHost(LlavaHost):
    """VideoLlavaForConditionalGeneration. A frame's class token is one of its tokens in the prompt; it has no place on
    the frame, so it stays and is not counted."""

    videos = True

    @property
    def tower(self) -> Any:
        return self.towers[self.kind == "video"]

    @property
    def towers(self) -> tuple[Any, ...]:
        return self.base.image_tower, self.base.video_tower

    def watch(self, hooks: Hooks, probe: Probe) -> None:
        super().watch(hooks, probe)
        self.kind = "video"
        probe.install(hooks, self)
        self.kind = "image"

    def call_of(self, args: Any, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**super().call_of(args, kwargs), "clips": self.clips[:2]}

    def patch_rows(self, features: Tensor, run: VisionRun) -> Tensor:
        return super().patch_rows(features[:, int(run.kind == "video") :], run)

    def patches_of(self, run: VisionRun) -> int:
        return super().patches_of(run) - int(run.kind == "video")

    def layouts(self, run: VisionRun, visual: Tensor) -> list[Layout]:
        if run.kind == "image":
            return super().layouts(run, visual)
        count, frames = run.call["clips"]
        return [video(_frame(*square(self.patches_of(run), self.name)), frames)] * count


@lru_cache(maxsize=256)
def _frame(height: int, width: int) -> Layout:
    """A class token, which stays, and height x width tokens."""
    tokens = torch.arange(height * width)
    part = Part((height, width), (0.0, 0.0, 1.0, 1.0))
    return Layout(len(tokens) + 1, tokens + 1, tokens[:, None], len(tokens), (part,))
