"""vistok-tiny-diffusion: vistok-tiny with a masked-diffusion language head, as LaViDa makes one of a causal model.

Everything is taken from vistok-tiny, and one token is added, ``<mask>``; vision tower and projector stay as they are.
An answer is a region of eight tokens after the prompt, which all begin masked; ``vistok.host.DiffusionDecoder`` fills
them. The configuration says so: ``mask_token_id`` and ``answer_length``.
"""

from __future__ import annotations

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from .. import load, load_processor
from ..diffusion import ANSWER_LENGTH, MASK, diffusion_loss, pack_regions
from ..training import Recipe, Stage
from .vistok_tiny import GRID, IMAGE_SIZE, TASKS, WIDTH, prefix


def build() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The shipped vistok-tiny with a token more, and its processor."""
    model, processor = load("vistok-tiny", device="cpu"), load_processor("vistok-tiny")
    processor.tokenizer.add_special_tokens({"extra_special_tokens": [MASK]}, replace_extra_special_tokens=False)
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    mask, asked = processor.tokenizer.convert_tokens_to_ids([MASK, "<assistant>"])
    table = model.get_input_embeddings().weight
    with torch.no_grad():  # the token at which the causal model says an answer's first word
        table[mask] = table[asked]
    model.config.mask_token_id = mask
    model.config.answer_length = ANSWER_LENGTH
    return model, processor


RECIPE = Recipe(
    name="vistok-tiny-diffusion",
    stages=(
        Stage(
            "masked answers",
            steps=800,
            batch_size=16,
            peak_lr=1.5e-3,
            language=True,
            tasks=TASKS,
            drop=0.4,
            encoder=False,
        ),
    ),
    image_size=IMAGE_SIZE,
    grid=GRID,
    label_width=WIDTH,
    build=build,
    prefix=prefix,
    pack=pack_regions,
    objective=diffusion_loss,
)
