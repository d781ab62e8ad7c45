"""GLM-4.1V and 4.6V: Qwen's packed pictures and mRoPE, 2 x 2 patches joined by a convolution before the merger."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vistok.core import flops
from vistok.host.hosts.qwen import QwenHost, linears
from vistok.host.vision import VisionRun


class GlmHost(QwenHost):
    """Glm4vForConditionalGeneration and Glm46VForConditionalGeneration; no videos, whose placeholders are those of
    pictures."""

    videos = False

    @property
    def projector(self) -> Any:
        """The convolution; the merger follows it, see ``project``."""
        return self.tower.downsample

    def patch_rows(self, features: Tensor, run: VisionRun) -> Tensor:
        return features.permute(0, 2, 3, 1).flatten(0, 2)

    def project(self, tokens: Tensor) -> Tensor:
        batch, kept, _ = tokens.shape
        squares = tokens.reshape(batch * kept, self.side, self.side, -1).permute(0, 3, 1, 2)
        return self.tower.merger(self.projector(squares).flatten(1)).view(batch, kept, -1)

    @property
    def projecting(self) -> tuple[nn.Module, ...]:
        return (self.projector, self.tower.merger)

    def vision_flops(self, run: VisionRun) -> int:
        tokens = sum(h * w for _, h, w in run.call["grids"]) // self.merge
        out, width = self.projector.weight.shape[:2]
        total = super().vision_flops(run) + flops.linear(tokens, width * self.merge, out)
        return total + sum(flops.linear(tokens, *reversed(m.weight.shape)) for m in linears(self.tower.merger))
