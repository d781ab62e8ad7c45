"""The families of models that a method can be put into."""

from __future__ import annotations

from typing import Any

from vistok.host.hosts.anyres import AnyresHost
from vistok.host.hosts.base import Host, UnsupportedModel
from vistok.host.hosts.gemma import Gemma3Host, PaliGemmaHost
from vistok.host.hosts.gemma4 import Gemma4Host
from vistok.host.hosts.glm import GlmHost
from vistok.host.hosts.idefics import IdeficsHost
from vistok.host.hosts.internvl import InternVLHost
from vistok.host.hosts.llava import LlavaHost
from vistok.host.hosts.mistral3 import Mistral3Host
from vistok.host.hosts.qwen import QwenHost
from vistok.host.hosts.qwen3_5 import Qwen35Host
from vistok.host.hosts.video_llava import VideoLlavaHost

FAMILIES: dict[str, type[Host]] = {
    "LlavaForConditionalGeneration": LlavaHost,
    "LlavaNextForConditionalGeneration": AnyresHost,
    "LlavaNextVideoForConditionalGeneration": AnyresHost,
    "LlavaOnevisionForConditionalGeneration": AnyresHost,
    "VideoLlavaForConditionalGeneration": VideoLlavaHost,
    "Qwen2VLForConditionalGeneration": QwenHost,
    "Qwen2_5_VLForConditionalGeneration": QwenHost,
    "Qwen3VLForConditionalGeneration": QwenHost,
    "Qwen3_5ForConditionalGeneration": Qwen35Host,
    "InternVLForConditionalGeneration": InternVLHost,
    "Idefics3ForConditionalGeneration": IdeficsHost,
    "SmolVLMForConditionalGeneration": IdeficsHost,
    "Mistral3ForConditionalGeneration": Mistral3Host,
    "Glm4vForConditionalGeneration": GlmHost,
    "Glm46VForConditionalGeneration": GlmHost,
    "Gemma3ForConditionalGeneration": Gemma3Host,
    "Gemma4ForConditionalGeneration": Gemma4Host,
    "PaliGemmaForConditionalGeneration": PaliGemmaHost,
}

_WHY_NOT = {
    "MllamaForConditionalGeneration": "its pictures enter by cross-attention: there are no visual tokens to drop",
    "Qwen3VLMoeForConditionalGeneration": "its mixture-of-experts decoder is neither tested nor counted",
    "Glm4vMoeForConditionalGeneration": "its mixture-of-experts decoder is neither tested nor counted",
    "Gemma3nForConditionalGeneration": "its decoder gets an input of its own for each token in every layer, which the "
    "host does not shorten",
    "Idefics2ForConditionalGeneration": "its resampler mixes all patches in each token, so none has a place on the "
    "picture",
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
