"""vistok-tiny-qwen: the same world on the classes of Qwen2.5-VL.

No class token, window attention in all but two vision layers, a 2 x 2 merger, multimodal rotary positions, pictures of
any size: 4 px patches merged to 8 px tokens, so that a 112 px picture is 196 visual tokens as in vistok-tiny.

It learns from vistok-tiny: its language model starts from that one's weights (a rotary position that is the same on all
three axes is the ordinary one), and its merged tokens are drawn to that one's projected patches, which lie on the same
grid. So a fraction of the training is enough.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from transformers import (
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from .. import load, load_processor
from ..tokenizer import build_tokenizer
from ..training import Prefix, Recipe, Stage
from . import vistok_tiny

IMAGE_SIZE, PATCH, MERGE, WIDTH = 112, 4, 2, 128
GRID = IMAGE_SIZE // (PATCH * MERGE)
START, IMAGE, END, VIDEO = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"


def build() -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """The model before its own training, with the language model of vistok-tiny, and its processor."""
    tokenizer = build_tokenizer((START, IMAGE, END), others=(VIDEO,))
    start, image, end, video = tokenizer.convert_tokens_to_ids([START, IMAGE, END, VIDEO])
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 4,
            "hidden_size": WIDTH,
            "intermediate_size": 3 * WIDTH,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "window_size": 8 * PATCH,
            "fullatt_block_indexes": [1, 3],
            "out_hidden_size": 192,
        },
        text_config={
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 8, 8]},
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": True,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    inherit(model, tokenizer)
    model.generation_config.max_new_tokens = 64
    pixels = {
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": IMAGE_SIZE * IMAGE_SIZE, "longest_edge": 2 * IMAGE_SIZE * IMAGE_SIZE},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**pixels),
        chat_template=tokenizer.chat_template,
    )
    return model, processor


@cache
def teacher() -> LlavaForConditionalGeneration:
    """The shipped vistok-tiny, frozen."""
    return load("vistok-tiny").requires_grad_(False)


def inherit(model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    """Copy vistok-tiny's language model: the layers as they are, the embeddings token by token."""
    theirs = teacher().model.language_model
    ours = model.model.language_model
    ours.layers.load_state_dict(theirs.layers.state_dict() | zero_biases(ours.layers))
    ours.norm.load_state_dict(theirs.norm.state_dict())
    numbers = load_processor("vistok-tiny").tokenizer.get_vocab()
    shared = [(ours_id, numbers[token]) for token, ours_id in tokenizer.get_vocab().items() if token in numbers]
    mine, old = torch.tensor(shared).T
    with torch.no_grad():
        ours.embed_tokens.weight[mine] = theirs.embed_tokens.weight[old]


def zero_biases(layers: nn.Module) -> dict[str, Tensor]:
    """Qwen's query, key and value projections have biases, Llama's have none."""
    state = layers.state_dict()
    return {name: torch.zeros_like(value) for name, value in state.items() if name.endswith("_proj.bias")}


def teach(pixels: Tensor) -> Tensor:
    """vistok-tiny's visual tokens of the same pictures."""
    with torch.no_grad():
        return vistok_tiny.prefix(teacher(), pixels, first_token=0).embeds[:, 1:]


def patchify(pixels: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B * h * w, 3 * 2 * p * p), rows as the image processor lays them out (2 x 2 blocks)."""
    batch, height, width, _ = pixels.shape
    scaled = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    block = MERGE * PATCH
    cut = scaled.reshape(batch, 3, height // block, MERGE, PATCH, width // block, MERGE, PATCH)
    rows = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None].expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)
    return rows.reshape(batch * (height // PATCH) * (width // PATCH), -1)


def prefix(model: Qwen2_5_VLForConditionalGeneration, pixels: Tensor, first_token: int) -> Prefix:
    """``<s><|vision_start|>``, the merged patches, ``<|vision_end|>``, as ``Qwen2_5_VLModel.forward`` lays them out."""
    batch, config = len(pixels), model.config
    grid = torch.tensor([[1, pixels.shape[1] // PATCH, pixels.shape[2] // PATCH]], device=pixels.device)
    merged = model.model.visual(patchify(pixels), grid_thw=grid.expand(batch, -1)).pooler_output
    tokens = merged.view(batch, -1, merged.shape[-1])
    wrap = torch.tensor([first_token, config.vision_start_token_id, config.vision_end_token_id], device=pixels.device)
    first, start, end = model.get_input_embeddings()(wrap)[:, None, None].expand(-1, batch, -1, -1)
    ids = torch.full((batch, tokens.shape[1] + 3), config.image_token_id, device=pixels.device)
    ids[:, 0], ids[:, 1], ids[:, -1] = wrap
    kinds = (ids == config.image_token_id).int()
    positions, _ = model.model.get_rope_index(ids, kinds, image_grid_thw=grid.expand(batch, -1))
    embeds = torch.cat([first, start, tokens.to(first.dtype), end], dim=1)
    return Prefix(embeds, positions, slice(2, 2 + tokens.shape[1]), patches=tokens, summary=tokens.mean(1))


RECIPE = Recipe(
    name="vistok-tiny-qwen",
    stages=(
        Stage("patches", steps=1300, batch_size=16, peak_lr=2e-3, language=False, tasks=vistok_tiny.TASKS),
        Stage("questions", steps=600, batch_size=16, peak_lr=1e-3, language=True, tasks=vistok_tiny.TASKS),
    ),
    image_size=IMAGE_SIZE,
    grid=GRID,
    label_width=192,
    build=build,
    prefix=prefix,
    teach=teach,
)
