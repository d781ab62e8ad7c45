"""LLaVA 1.5: a CLIP or SigLIP encoder, an MLP, one square picture in one piece."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vistok.core import flops
from vistok.host.hosts.base import Host, UnsupportedModel, square
from vistok.host.layout import Layout, plain
from vistok.host.taps import SplitTap, Tap
from vistok.host.vision import VisionRun

TOWERS = ("clip_vision_model", "siglip_vision_model")


class LlavaHost(Host):
    """LlavaForConditionalGeneration; LLaVA-NeXT and OneVision share its encoder."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        config = model.config
        tower = config.vision_config.model_type
        if tower not in TOWERS:
            raise UnsupportedModel(
                f"{self.name} with a {tower} encoder: not supported yet; supported are {' and '.join(TOWERS)}"
            )
        self.class_token = tower == "clip_vision_model"
        if self.class_token and config.vision_feature_select_strategy == "full":
            raise UnsupportedModel(
                f"{self.name} with vision_feature_select_strategy='full': not supported yet: the class token would be "
                "one of the picture's tokens and belongs to no place on its grid"
            )

    def tap(self, layer: int) -> Tap:
        attention = self.blocks[layer].self_attn
        return SplitTap(attention, attention.q_proj, attention.k_proj, self.class_token)

    def layouts(self, run: VisionRun, visual: Tensor) -> list[Layout]:
        units = run.call["units"]
        return [plain(*square(run.rows // units, self.name))] * units

    def patches_of(self, run: VisionRun) -> int:
        """Patches of each of the run's units."""
        return run.rows // run.call["units"]

    def vision_flops(self, run: VisionRun) -> int:
        units, vision, text = run.call["units"], self.model.config.vision_config, self.model.config.text_config
        patches = self.patches_of(run)
        tower = flops.vision_tower(
            patches,
            vision.hidden_size,
            vision.intermediate_size,
            vision.num_attention_heads,
            len(self.blocks),
            patch=vision.patch_size,
            channels=vision.num_channels,
            class_token=self.class_token,
        )
        if getattr(self.tower, "use_head", False):  # SigLIP pools with one query that attends over the patches
            width = vision.hidden_size
            tower += flops.linear(patches, width, 2 * width) + flops.linear(1, width, 2 * width)
            tower += flops.attention(1, patches, vision.num_attention_heads, width // vision.num_attention_heads)
            tower += flops.linear(1, width, vision.intermediate_size, width)
        features = self.projector.linear_1.in_features
        return units * tower + flops.linear(run.rows, features, text.hidden_size, text.hidden_size)
