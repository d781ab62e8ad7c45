"""The families of models that a method can be put into."""

from __future__ import annotations

from typing import Any

from vistok.host.hosts.anyres import AnyresHost
from vistok.host.hosts.base import Host, UnsupportedModel
from vistok.host.hosts.internvl import InternVLHost
from vistok.host.hosts.llava import LlavaHost
from vistok.host.hosts.qwen import QwenHost

FAMILIES: dict[str, type[Host]] = {
    "LlavaForConditionalGeneration": LlavaHost,
    "LlavaNextForConditionalGeneration": AnyresHost,
    "LlavaOnevisionForConditionalGeneration": AnyresHost,
    "Qwen2VLForConditionalGeneration": QwenHost,
    "Qwen2_5_VLForConditionalGeneration": QwenHost,
    "Qwen3VLForConditionalGeneration": QwenHost,
    "InternVLForConditionalGeneration": InternVLHost,
}

_WHY_NOT = {
    "Gemma3ForConditionalGeneration": "its decoder looks both ways within a picture and through sliding windows, by "
    "masks made of token types that the host does not translate",
    "PaliGemmaForConditionalGeneration": "its decoder looks both ways over picture and prompt, by masks made of token "
    "types that the host does not translate",
    "MllamaForConditionalGeneration": "its pictures enter by cross-attention: there are no visual tokens to drop",
    "Mistral3ForConditionalGeneration": "its Pixtral encoder packs pictures of all sizes in one sequence, for which "
    "there is no adapter",
    "Qwen3VLMoeForConditionalGeneration": "its mixture-of-experts decoder is neither tested nor counted",
    "LlavaNextVideoForConditionalGeneration": "video is not supported",
}
"""Well-known families that are left out on purpose."""

__all__ = ["FAMILIES", "Host", "UnsupportedModel", "host_of"]


def host_of(model: Any) -> Host:
    """The adapter of a model's family; UnsupportedModel for any other."""
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__](model)
    name = type(model).__name__
    why = _WHY_NOT.get(
        name,
        "it needs an adapter (vistok/host/hosts) that says where its encoder, projector and decoder layers are and how "
        "its patches become tokens",
    )
    raise UnsupportedModel(f"{name}: not supported yet: {why}. Supported are {', '.join(FAMILIES)}.")
