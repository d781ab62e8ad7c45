"""What the benchmarks share: models with random weights, runs in turn, ratios of pairs, and what they ran on."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

TEXT = 24
IMAGE = 999
SIDE, PATCH = 336, 14
THUMBNAIL = (SIDE // PATCH) ** 2


def build(tokens: int = 576, width: int = 512, layers: int = 12) -> Any:
    """LLaVA's own classes with random weights, CLIP tower and Llama decoder of one width and depth.

    ``tokens``: a square number, one picture in 14 px patches (576: of 336 px); or 2880, LLaVA-NeXT's thumbnail and four
    crops of a square picture (its 48 newlines not counted).
    """
    side = math.isqrt(tokens)
    if side**2 != tokens and tokens != 5 * THUMBNAIL:
        raise ValueError(f"tokens: got {tokens}, must be a square number or {5 * THUMBNAIL}")
    cut = side**2 != tokens
    torch.manual_seed(0)
    shape = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
    }
    vision = CLIPVisionConfig(**shape, image_size=SIDE if cut else side * PATCH, patch_size=PATCH)
    text = LlamaConfig(**shape, vocab_size=1000, max_position_embeddings=4096)
    if not cut:
        return LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
        ).eval()
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_grid_pinpoints=[[2 * SIDE, 2 * SIDE]],
    )
    return LlavaNextForConditionalGeneration(config).eval()


def inputs_of(model: Any) -> dict[str, Tensor]:
    """One picture and a question of ``TEXT`` tokens after it."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(5, 900, (1, TEXT), generator=generator)
    cut = isinstance(model, LlavaNextForConditionalGeneration)
    side = model.config.vision_config.image_size
    length = THUMBNAIL + 4 * THUMBNAIL + 2 * SIDE // PATCH if cut else (side // PATCH) ** 2
    ids = torch.cat([torch.tensor([[1]]), torch.full((1, length), IMAGE), words], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if cut:
        pixels = torch.randn(1, 5, 3, SIDE, SIDE, generator=generator)
        return {**inputs, "pixel_values": pixels, "image_sizes": torch.tensor([[2 * SIDE, 2 * SIDE]])}
    return {**inputs, "pixel_values": torch.randn(1, 3, side, side, generator=generator)}


def first_token(model: Any, inputs: dict[str, Tensor]) -> None:
    """The first token with the model as it is, or with what is applied to it."""
    model(**inputs, logits_to_keep=1).logits.argmax(-1)


def bound(model: Any, inputs: dict[str, Tensor], keep: int) -> None:
    """The first token from the picture's first ``keep`` tokens, at their own positions, gathered by hand."""
    pictures = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    features = torch.cat(list(model.get_image_features(**pictures).pooler_output))[None, :keep]
    ids = inputs["input_ids"]
    after = ids.shape[1] - TEXT
    words = model.get_input_embeddings()(torch.cat([ids[:, :1], ids[:, after:]], dim=1))
    positions = torch.cat([torch.arange(1 + keep), torch.arange(after, ids.shape[1])])[None].to(ids.device)
    embeds = torch.cat([words[:, :1], features.to(words.dtype), words[:, 1:]], dim=1)
    hidden = model.model.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=True).last_hidden_state
    model.lm_head(hidden[:, -1:]).argmax(-1)


def in_turn(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    device: str = "cpu",
    warm: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds of every run, all measured in turn (A B C A B C ...); the first ``warm`` rounds are not counted.

    ``clock``: in seconds; ``time.process_time`` on a machine that others use too (of one thread, it is the wall time
    that an idle core would have taken).
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + warm):
        for name, run in runs.items():
            wait(device)
            start = clock()
            run()
            wait(device)
            if number >= warm:
                taken[name].append(1e3 * (clock() - start))
    return taken


def wait(device: str) -> None:
    """Until the device has done all it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def ratio(times: list[float], others: list[float]) -> float:
    """Median over rounds of one's time over the other's, so that a slow stretch of the machine cancels out."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    where = {
        "cpu": (names or [platform.processor() or platform.machine()])[0],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {**where, "gpu": torch.cuda.get_device_name(device)} if device.startswith("cuda") else where


def machine_line(device: str = "cpu") -> str:
    """``machine`` in one line."""
    return ", ".join(f"{key} {value}" for key, value in machine(device).items())
