"""The plain model with eager attention, which returns its maps."""

from __future__ import annotations

import copy

import torch
from transformers import DynamicCache


def eager_maps(family, inputs):
    """(attentions, keys) of every decoder layer of the plain model with eager attention."""
    model = copy.deepcopy(family.model)
    model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        cache = DynamicCache()  # without a configuration it keeps the keys that a window has left behind
        out = model(**inputs, output_attentions=True, use_cache=True, past_key_values=cache)
    return out.attentions, [layer.keys for layer in out.past_key_values.layers]
