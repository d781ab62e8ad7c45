"""Mistral 3: a Pixtral encoder that packs pictures of all sizes, 2 x 2 patches merged to a token, row-end tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import is_flash_attention_requested

from vistok.core import flops
from vistok.host.hooks import Hooks
from vistok.host.hosts.base import Host, UnsupportedModel
from vistok.host.layout import Layout, squares
from vistok.host.taps import Queries, Tap, cut
from vistok.host.vision import VisionRun


class Mistral3Host(Host):
    """Mistral3ForConditionalGeneration. The tokens that end a row and a picture are text: they stay."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        tower = model.config.vision_config.model_type
        if tower != "pixtral":
            raise UnsupportedModel(f"{self.name} with a {tower} encoder: not supported yet; supported is pixtral")
        self.side: int = model.config.spatial_merge_size
        self.merge = self.side**2
        self._grids: list[tuple[int, int]] = []

    @property
    def blocks(self) -> Any:
        return self.tower.transformer.layers

    def tap(self, layer: int) -> Tap:
        return PixtralTap(
            self.blocks[layer].attention, lambda: [0, *accumulate(height * width for height, width in self._grids)]
        )

    def call_of(self, args: Any, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        pixels, patch = self.pixels(args, kwargs), self.tower.patch_size
        units, _, height, width = pixels.shape
        sizes = kwargs.get("image_sizes")
        sizes = [(height, width)] * units if sizes is None else torch.as_tensor(sizes).tolist()
        self._grids = [(h // patch, w // patch) for h, w in sizes]
        return {"grids": self._grids, "convolved": units * (height // patch) * (width // patch)}

    def patch_pixels(self, pixels: Tensor) -> Tensor:
        patch, unpadded = self.tower.patch_size, super().patch_pixels
        pairs = zip(pixels, self._grids, strict=True)
        return torch.cat([unpadded(one[None, :, : h * patch, : w * patch]) for one, (h, w) in pairs])

    def project(self, tokens: Tensor) -> Tensor:
        """All tokens as one picture, one token high."""
        batch, kept, _ = tokens.shape
        patches = tokens.reshape(batch * kept, self.side, self.side, -1).transpose(0, 1).flatten(0, 2)
        size = self.side * self.tower.patch_size
        return self.projector(patches, [(size, size * batch * kept)]).view(batch, kept, -1)

    def spent(self, given: Mapping[str, Any], ids: Tensor) -> list[int]:
        return (torch.as_tensor(given["image_sizes"]) // self.tower.patch_size).prod(1).tolist()

    def layouts(self, run: VisionRun, visual: Tensor) -> list[Layout]:
        return [squares(*grid, self.side) for grid in run.call["grids"]]

    def vision_flops(self, run: VisionRun) -> int:
        vision, text = self.model.config.vision_config, self.model.config.text_config
        width, heads = vision.hidden_size, vision.num_attention_heads
        lengths = [h * w for h, w in run.call["grids"]]
        patches = sum(lengths)
        if not is_flash_attention_requested(self.tower.config):
            lengths = [patches]  # a mask keeps the pictures apart, at the price of one large map
        layer = flops.linear(patches, width, 4 * width) + flops.linear(patches, width, 3 * vision.intermediate_size)
        layer += sum(flops.attention(n, n, heads, width // heads) for n in lengths)
        total = flops.linear(run.call["convolved"], vision.num_channels * vision.patch_size**2, width)
        tokens = sum((h // self.side) * (w // self.side) for h, w in run.call["grids"])
        features = width * self.projector.num_feature_layers
        total += flops.linear(tokens, width * self.merge, width)
        return total + len(self.blocks) * layer + flops.linear(tokens, features, text.hidden_size, text.hidden_size)


@dataclass
class PixtralTap:
    """A Pixtral attention module: pictures in one sequence, kept apart by a mask."""

    attention: Any
    cuts: Callable[[], list[int]]
    """0 and where each picture ends in the sequence."""

    def install(self, hooks: Hooks, use: Callable[[list[Queries]], None]) -> None:
        held: dict[str, Any] = {}
        hooks.before(self.attention, lambda module, args, kwargs: held.update(kwargs))
        hooks.after(self.attention.q_proj, lambda module, args, output: held.update(q=output))
        hooks.after(self.attention.k_proj, lambda module, args, output: held.update(k=output))
        rotate = sys.modules[type(self.attention).__module__].apply_rotary_pos_emb

        def attended(module: Any, args: Any, output: Any) -> None:
            q, k = (held[name][0].detach().unflatten(-1, (module.num_heads, -1)) for name in ("q", "k"))
            q, k = rotate(q, k, *held["position_embeddings"])
            held.clear()
            use(cut(q, k, module.scaling, self.cuts()))

        hooks.after(self.attention, attended)
