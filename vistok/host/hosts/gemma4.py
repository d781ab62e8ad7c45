"""Gemma 4: pictures of any shape in padded rows of patches, a token the mean of a square of them; a decoder with
windows, keys shared between layers, and an input of its own for each token in every layer."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vistok.core import flops
from vistok.core.tensors import upcast
from vistok.host.hooks import Hooks
from vistok.host.hosts.base import UnsupportedModel
from vistok.host.hosts.gemma import PaliGemmaHost, runs_of
from vistok.host.hosts.qwen import linears
from vistok.host.layout import Layout, squares
from vistok.host.reducer import Reducer
from vistok.host.sharing import SharingStream
from vistok.host.stream import Stream
from vistok.host.taps import RowsTap, Tap
from vistok.host.vision import Probe, VisionRun


class Gemma4Host(PaliGemmaHost):
    """Gemma4ForConditionalGeneration: both ways within each picture in the layers with windows, where the
    configuration asks for it. No videos and no audio.

    The input that a layer has of its own for a token goes with the token; a merged one has that of its anchor. A stage
    may lie before any layer, also between one that makes keys and one that reads them (vistok.host.sharing). Tokens
    that were set aside while a layer made keys cannot come back for the layers that read those.
    """

    encoder = "gemma4_vision"
    decoder = "gemma4_text"
    types_argument = "mm_token_type_ids"

    def __init__(self, model: Any) -> None:
        if model.config.vision_config is None:
            raise UnsupportedModel(f"{type(model).__name__} without a vision encoder: there are no visual tokens")
        super().__init__(model)
        config = self.language_model.config
        if config.use_bidirectional_attention == "all":
            raise UnsupportedModel(
                f"{self.name} with use_bidirectional_attention='all': not supported yet: its text looks both ways too"
            )
        self.side: int = model.config.vision_config.pooling_kernel_size
        self.merge = self.side**2
        self.sources = {}
        stores: dict[str, int] = {}
        for number, (layer, kind) in enumerate(zip(self.layers, config.layer_types, strict=True)):
            attention: Any = layer.self_attn
            if attention.is_kv_shared_layer:
                self.sources[number] = stores[kind]
            elif attention.store_full_length_kv:
                stores[kind] = number
        self.causal = [number for number, window in enumerate(self.windows) if window is None]
        # Of the forward under way: the layers' own inputs, which logits are wanted, of how many columns that is a tail,
        # and the columns that went in.
        self._own: Tensor | None = None
        self._wanted: Any = 0
        self._tail = self._width = 0
        # Of the encoder's last call: where each patch is in the rows laid flat, and how many each picture has.
        self._slots, self._counts = torch.empty(0, dtype=torch.int64), [0]

    # The language model ---------------------------------------------------------------------------------------------

    def watch(self, hooks: Hooks, probe: Probe) -> None:
        def called(module: Any, args: Any, kwargs: Any) -> None:
            if kwargs.get("input_features") is not None:
                raise ValueError(f"input_features: audio is not supported yet by {self.name} inside vistok.apply")

        def reads(module: Any, args: Any, kwargs: Any) -> None:
            self._own, self._wanted = kwargs.get("per_layer_inputs"), kwargs.get("logits_to_keep", 0)
            given = kwargs.get("inputs_embeds")
            self._width = (kwargs["input_ids"] if given is None else given).shape[1]
            whole = kwargs.get("output_hidden_states") or kwargs.get("output_attentions")
            self._tail = self._wanted if isinstance(self._wanted, int) and not whole else 0

        def has_read(module: Any, args: Any, output: Any) -> Any:
            """The model itself only takes the logits asked for where as many tokens come out as went in."""
            hidden, wanted, self._own = output.last_hidden_state, self._wanted, None
            if hidden.shape[1] != self._width:
                output.last_hidden_state = hidden[:, slice(-wanted, None) if isinstance(wanted, int) else wanted]
            return output

        def named(module: Any, args: Any, kwargs: Any) -> Any:
            """By name, so that the stream finds it."""
            return args[:1], {**kwargs, "per_layer_input": args[1]} if len(args) > 1 else kwargs

        def pools(module: Any, args: Any, kwargs: Any) -> None:
            if probe.run is not None:
                probe.run.rows = len(self._slots)
                if "encoder_features" in probe.asked:
                    probe.run.features = self.patch_states(kwargs["hidden_states"].detach())

        hooks.before(self.base, called)
        hooks.before(self.language_model, reads)
        hooks.after(self.language_model, has_read)
        for layer in self.layers:
            hooks.before(layer, named)
        hooks.before(self.tower.pooler, pools)
        super().watch(hooks, probe)

    def blocks_of(self, types: Tensor | None) -> Tensor | None:
        if types is None or self.language_model.config.use_bidirectional_attention is None:
            return None
        return runs_of((types == 1) | (types == 2))

    def stream(self, *args: Any) -> Stream:
        return SharingStream(
            *args,
            blocks=self.blocks_now(args[3][1]),
            windows=self.windows,
            causal=self.causal,
            sources=self.sources,
            own=self._own,
            wanted=self._tail,
        )

    def check_return(self, method: Reducer, aside: int, layer: int) -> None:
        late = {source: reader for reader, source in self.sources.items() if aside <= source < layer <= reader}
        if late:
            source = min(late)
            raise UnsupportedModel(
                f"{type(method).__name__} sets tokens aside before decoder layer {aside} of {self.name} and brings "
                f"them back before layer {layer}, but layer {late[source]} reads the keys that layer {source} makes; "
                f"they must be back by layer {source}, or stay until after it"
            )

    def layer_keys(self, number: int, width: int, given: Mapping[str, Any]) -> int:
        if number not in self.sources:
            return super().layer_keys(number, width, given)
        kind = self.language_model.config.layer_types[number]
        return int(given["shared_kv_states"][kind][0].shape[2])

    def layer_flops(self, layer: Any, tokens: int, keys: int) -> int:
        """The first layer's include the projection that makes the inputs of all layers."""
        config, attention = self.language_model.config, layer.self_attn
        maps = linears(layer)
        if layer is self.layers[0] and config.hidden_size_per_layer_input:
            maps = [*maps, self.language_model.per_layer_model_projection]
        total = sum(flops.linear(tokens, *reversed(m.weight.shape)) for m in maps)
        if config.enable_moe_block:
            width, units = config.hidden_size, config.moe_intermediate_size
            total += config.top_k_experts * flops.linear(tokens, width, 2 * units)
            total += config.top_k_experts * flops.linear(tokens, units, width)
        return total + flops.attention(tokens, keys, config.num_attention_heads, attention.head_dim)

    # The vision encoder ---------------------------------------------------------------------------------------------

    @property
    def projector(self) -> Any:
        return self.base.embed_vision

    def call_of(self, args: Any, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Patches are counted without padding, picture by picture in raster order: ``_slots`` says where each is."""
        positions: Tensor = args[1] if len(args) > 1 else kwargs["pixel_position_ids"]
        real = (positions != -1).any(-1)
        sizes = positions.amax(1) + 1
        x, y = positions.unbind(-1)
        size = int(real.shape[1] + 1) ** 2
        order = (x + y * sizes[:, :1]).masked_fill(~real, size)
        ranked, slots = order.sort(dim=1)
        counts, places = real.sum(1, keepdim=True), torch.arange(real.shape[1], device=order.device)
        grids, self._counts = [(h, w) for w, h in sizes.tolist()], counts[:, 0].tolist()
        if not torch.equal(ranked, torch.where(places < counts, places, size)) or any(
            h * w != n or h % self.side or w % self.side for (h, w), n in zip(grids, self._counts, strict=True)
        ):
            raise UnsupportedModel(
                f"{self.name}: image_position_ids that are no whole pictures of squares of {self.side} x {self.side} "
                f"patches: not supported yet; got grids of {', '.join(f'{h} x {w}' for h, w in grids)}"
            )
        first = torch.arange(len(real), device=order.device)[:, None] * real.shape[1]
        self._slots = (slots + first)[places < counts]
        return {"grids": grids, "padded": real.shape[1]}

    def tap(self, layer: int) -> Tap:
        attention = self.blocks[layer].self_attn
        rotate = sys.modules[type(attention).__module__].apply_multidimensional_rope
        return RowsTap(attention, attention.q_norm, attention.k_norm, rotate, lambda: (self._slots, self._counts))

    def patch_states(self, hidden: Tensor) -> Tensor:
        return hidden.flatten(0, 1)[self._slots]

    def patch_pixels(self, pixels: Tensor) -> Tensor:
        return self.patch_states(pixels.detach().float().unflatten(-1, (-1, 3)).mean(-1))

    def project(self, tokens: Tensor) -> Tensor:
        pooled = upcast(tokens.unflatten(-1, (self.merge, -1))).mean(-2)
        pooled = pooled * pooled.shape[-1] ** 0.5
        if self.tower.config.standardize:
            pooled = (pooled - self.tower.std_bias) * self.tower.std_scale
        return self.projector(pooled.to(tokens.dtype))

    def spent(self, given: Mapping[str, Any], ids: Tensor) -> list[int]:
        return (given["image_position_ids"] != -1).any(-1).sum(1).tolist()

    def layouts(self, run: VisionRun, visual: Tensor) -> list[Layout]:
        return [squares(h, w, self.side) for h, w in run.call["grids"]]

    def vision_flops(self, run: VisionRun) -> int:
        """Padding is computed too, and pooling is a product of matrices."""
        config, padded, units = self.model.config.vision_config, run.call["padded"], len(run.call["grids"])
        total = flops.linear(padded, 3 * config.patch_size**2, config.hidden_size)
        total += len(self.blocks) * flops.transformer_layer(
            padded,
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            head_dim=config.head_dim,
            kv_heads=config.num_key_value_heads,
            gated=True,
        )
        total += flops.linear(padded, padded // self.merge, config.hidden_size)
        tokens = sum(h * w for h, w in run.call["grids"]) // self.merge
        return units * total + flops.linear(tokens, *reversed(self.projector.embedding_projection.weight.shape))
