"""Qwen3.5: Qwen3-VL's encoder without DeepStack, and a decoder most of whose layers are linear attention."""

from __future__ import annotations

from typing import Any

from vistok.core import flops
from vistok.host.hosts.base import UnsupportedModel
from vistok.host.hosts.qwen import QwenHost, linears
from vistok.host.hybrid import HybridStream
from vistok.host.reducer import Reducer
from vistok.host.stream import Stream


class Qwen35Host(QwenHost):
    """Qwen3_5ForConditionalGeneration. A method that drops before a linear-attention layer cannot ask for attention
    there."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        kinds = self.language_model.config.layer_types
        self.full = [number for number, kind in enumerate(kinds) if kind == "full_attention"]
        if not self.full or set(kinds) - {"full_attention", "linear_attention"}:
            raise UnsupportedModel(
                f"{self.name} with layers of the kinds {', '.join(sorted(set(kinds)))}: not supported yet; supported "
                "are full_attention, of which there must be one, and linear_attention"
            )

    def check_needs(self, method: Reducer) -> None:
        super().check_needs(method)
        from vistok.host.effort import Effort

        if isinstance(method, Effort):
            raise UnsupportedModel(
                f"{self.name} with {type(method).__name__}: not supported yet: most of its layers have no attention"
            )

    def check_stage(self, method: Reducer, layer: int) -> None:
        if method.layer_needs and layer not in self.full:
            raise UnsupportedModel(
                f"{type(method).__name__} needs {', '.join(method.layer_needs)} before decoder layer {layer}, which is "
                f"a linear-attention layer of {self.name}; those that attend are {', '.join(map(str, self.full))}"
            )

    def stream(self, *args: Any) -> Stream:
        return HybridStream(*args, full=self.full)

    def layer_flops(self, layer: Any, tokens: int, keys: int) -> int:
        """Of the recurrence: reading, writing and asking the state of each head, token by token."""
        config = self.language_model.config
        if hasattr(layer, "self_attn"):
            gate = flops.linear(tokens, config.hidden_size, config.num_attention_heads * layer.self_attn.head_dim)
            return super().layer_flops(layer, tokens, keys) + gate
        mixer = layer.linear_attn
        maps = linears(mixer) + linears(layer.mlp)
        total = sum(flops.linear(tokens, *reversed(m.weight.shape)) for m in maps)
        total += flops.linear(tokens, mixer.conv_kernel_size, mixer.conv_dim)
        return total + 3 * mixer.num_v_heads * flops.linear(tokens, mixer.head_k_dim, mixer.head_v_dim)
