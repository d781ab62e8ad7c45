"""Gemma 3 and PaliGemma: a SigLIP encoder, and a decoder that looks both ways within pictures or over the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vistok.core import flops
from vistok.host.blocks import BlockStream
from vistok.host.hooks import Hooks
from vistok.host.hosts.base import Host, UnsupportedModel, square
from vistok.host.layout import Layout, squares
from vistok.host.reducer import Reducer
from vistok.host.stream import Stream
from vistok.host.taps import SplitTap, Tap
from vistok.host.vision import Probe, VisionRun


class PaliGemmaHost(Host):
    """PaliGemmaForConditionalGeneration with a Gemma 1 decoder: both ways over the prompt (token type 0)."""

    windowed = True
    own_masks = True
    encoder = "siglip_vision_model"
    decoder = "gemma"
    """``model_type`` of the encoder and the decoder that it serves."""
    types_argument = "token_type_ids"
    """The name of the argument that says of each token of the prompt what it is."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        tower, decoder = model.config.vision_config.model_type, self.language_model.config.model_type
        if (tower, decoder) != (self.encoder, self.decoder):
            raise UnsupportedModel(
                f"{self.name} with a {tower} encoder and a {decoder} decoder: not supported yet; supported are "
                f"{self.encoder} and {self.decoder}"
            )
        config = self.language_model.config
        if config._attn_implementation not in ("sdpa", "eager"):
            raise UnsupportedModel(
                f"{self.name} with attn_implementation={config._attn_implementation!r}: not supported yet: its masks "
                "need 'sdpa' or 'eager'"
            )
        kinds = getattr(config, "layer_types", None) or [None] * len(self.layers)
        self.windows = [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]
        self._padding: Tensor | None = None
        self._blocks: Tensor | None = None

    def check_needs(self, method: Reducer) -> None:
        super().check_needs(method)
        from vistok.host.effort import Effort

        if isinstance(method, Effort):
            raise UnsupportedModel(
                f"{self.name} with {type(method).__name__}: not supported yet: its heads and windows are defined for a "
                "causal decoder"
            )

    # The language model ---------------------------------------------------------------------------------------------

    def watch(self, hooks: Hooks, probe: Probe) -> None:
        def called(module: Any, args: Any, kwargs: Any) -> None:
            self._padding = kwargs.get("attention_mask")
            pictures = kwargs.get("pixel_values") is not None or bool(kwargs.get("mm_encoder_outputs"))
            self._blocks = self.blocks_of(kwargs.get(self.types_argument)) if pictures else None

        hooks.before(self.base, called)
        super().watch(hooks, probe)

    def blocks_of(self, types: Tensor | None) -> Tensor | None:
        """(B, T) int64 of the token types of a prompt with pictures: tokens of one number see one another, -1: none."""
        if types is None:
            raise ValueError(f"token_type_ids: missing; {self.name} needs what its processor gives")
        return torch.where(types == 0, 0, -1)

    def padding(self, kwargs: Mapping[str, Any]) -> Tensor | None:
        mask = self._padding
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            raise ValueError("attention_mask: got masks of the layers, must be (rows, tokens) inside vistok.apply")
        return mask

    def stream(self, *args: Any) -> Stream:
        _, _, _, (_, width), *_ = args
        return BlockStream(*args, blocks=self.blocks_now(width), windows=self.windows)

    def blocks_now(self, width: int) -> Tensor | None:
        """``blocks_of`` the last ``width`` tokens, those of this forward."""
        return None if self._blocks is None else self._blocks[:, -width:]

    # The vision encoder ---------------------------------------------------------------------------------------------

    def tap(self, layer: int) -> Tap:
        attention = self.blocks[layer].self_attn
        return SplitTap(attention, attention.q_proj, attention.k_proj, self.class_token)

    def layouts(self, run: VisionRun, visual: Tensor) -> list[Layout]:
        units, side = run.call["units"], round(self.merge**0.5)
        return [squares(*square(run.rows // units, self.name), side)] * units

    def vision_flops(self, run: VisionRun) -> int:
        units, vision, text = run.call["units"], self.model.config.vision_config, self.model.config.text_config
        tower = flops.vision_tower(
            run.rows // units,
            vision.hidden_size,
            vision.intermediate_size,
            vision.num_attention_heads,
            len(self.blocks),
            patch=vision.patch_size,
            channels=vision.num_channels,
            class_token=False,
        )
        return units * tower + flops.linear(run.rows // self.merge, vision.hidden_size, text.hidden_size)


class Gemma3Host(PaliGemmaHost):
    """Gemma3ForConditionalGeneration: both ways within each picture, windows in most layers, a token the mean of a
    square of patches."""

    decoder = "gemma3_text"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if self.language_model.config.use_bidirectional_attention:
            raise UnsupportedModel(
                f"{self.name} with use_bidirectional_attention: not supported yet: its text looks both ways too"
            )
        self.merge = self.projector.kernel_size**2

    def blocks_of(self, types: Tensor | None) -> Tensor | None:
        return None if types is None else runs_of(types == 1)

    def project(self, tokens: Tensor) -> Tensor:
        pooled = tokens.unflatten(-1, (self.merge, -1)).mean(-2)
        return self.projector.mm_soft_emb_norm(pooled) @ self.projector.mm_input_projection_weight


def runs_of(picture: Tensor) -> Tensor:
    """(B, T) int64: the number of the run of True that each token of ``picture`` (B, T) bool is in, -1 for none."""
    first = picture & ~torch.nn.functional.pad(picture, (1, 0))[:, :-1]
    return torch.where(picture, first.cumsum(1) - 1, -1)
