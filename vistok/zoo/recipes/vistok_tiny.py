"""vistok-tiny: a LLaVA that sees the world. CLIP-style tower with a class token, MLP projector, Llama decoder.

112 px pictures in 8 px patches: 196 visual tokens. The class token is trained to tell what is in the picture, as CLIP's
is, so that methods that score by its attention find what they expect.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from ..tokenizer import build_tokenizer
from ..training import Prefix, Recipe, Stage

IMAGE_SIZE, PATCH, WIDTH = 112, 8, 192
GRID = IMAGE_SIZE // PATCH


def build() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The untrained model and its processor."""
    tokenizer = build_tokenizer(("<image>",))
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        hidden_act="gelu",
        projection_dim=WIDTH,
    )
    text = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=GRID * GRID,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.max_new_tokens = 64
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size=size, do_center_crop=False, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    return model, processor


def prefix(model: LlavaForConditionalGeneration, pixels: Tensor, first_token: int) -> Prefix:
    """``<s>`` and the projected patches, as ``LlavaModel.forward`` lays them out."""
    scaled = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    seen = model.model.vision_tower(scaled, output_hidden_states=True)
    patches = seen.hidden_states[model.config.vision_feature_layer][:, 1:]
    first = model.get_input_embeddings()(torch.full((len(pixels), 1), first_token, device=pixels.device))
    embeds = torch.cat([first, model.model.multi_modal_projector(patches).to(first.dtype)], dim=1)
    positions = torch.arange(embeds.shape[1], device=pixels.device).expand(len(pixels), -1)
    return Prefix(embeds, positions, slice(1, embeds.shape[1]), patches, seen.pooler_output)


TASKS = (("scenes", 0.4), ("words", 0.2), ("charts", 0.2), ("forms", 0.2))
HARDER = (("scenes", 0.4), ("words", 0.35), ("charts", 0.1), ("forms", 0.15))
RECIPE = Recipe(
    name="vistok-tiny",
    stages=(
        Stage("patches", steps=1200, batch_size=32, peak_lr=2e-3, language=False, tasks=TASKS),
        Stage("questions", steps=3400, batch_size=16, peak_lr=1.5e-3, language=True, tasks=TASKS),
        Stage("words and places", steps=1000, batch_size=16, peak_lr=1e-3, language=True, tasks=HARDER),
        # A language model that has only ever seen whole pictures takes any gap in them for content: it counts twice, it
        # repeats a digit. Large models are not like that, and what a method keeps would not show.
        Stage(
            "fewer tokens", steps=900, batch_size=16, peak_lr=8e-4, language=True, tasks=HARDER, drop=0.5, encoder=False
        ),
    ),
    image_size=IMAGE_SIZE,
    grid=GRID,
    label_width=WIDTH,
    build=build,
    prefix=prefix,
)
