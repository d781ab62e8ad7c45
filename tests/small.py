"""A LLaVA with vistok-tiny's processor and tokens, but small and untrained, so that tests of commands are quick."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from vistok.zoo.recipes.vistok_tiny import build


def save_small_model(folder: Path, answer_length: int = 0) -> Path:
    """Write the model (2 + 2 layers of width 32, 196 visual tokens) as a Hugging Face folder.

    ``answer_length``: of a masked-diffusion model, whose mask is the token ``<unk>``; 0: it is a causal one.
    """
    torch.manual_seed(0)
    whole, processor = build()
    config = whole.config
    for part in (config.vision_config, config.text_config):
        part.hidden_size, part.intermediate_size = 32, 64
        part.num_hidden_layers, part.num_attention_heads = 2, 2
    config.vision_config.projection_dim = 32
    config.text_config.num_key_value_heads = 2
    config.text_config.head_dim = 16
    if getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = config.text_config.layer_types[:2]
    small = LlavaForConditionalGeneration(config)
    if answer_length:
        small.config.mask_token_id = processor.tokenizer.unk_token_id
        small.config.answer_length = answer_length
    small.generation_config = whole.generation_config
    small.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
