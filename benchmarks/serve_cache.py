"""Time to the first token of a second question on the same picture, with and without the server's encoder cache.

Two models: vistok-tiny, whose encoder is as small as its decoder; and LLaVA's own classes with random weights, the
encoder of CLIP-L at 336 px (width 1024, 24 layers, 576 visual tokens) before a decoder of width 1024 with 4 layers.
Each as it is and with a method that reads the encoder's attention. A request runs as in the server: picture
preprocessing, chat template, encoder, language model, first token. *none* has no cache, *first* has an empty one, which
the request fills, and *second* one that has seen the picture. All are measured in turn in one run (A B C A B C ...),
the first round is not counted, medians are reported.

python -m benchmarks.serve_cache [--repeats 9] [--device cpu] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from benchmarks.common import PATCH, SIDE, in_turn, machine, machine_line, ratio
from vistok.serve.cache import FeatureCache
from vistok.serve.media import digest
from vistok.serve.runner import Ask, Runner, Shown
from vistok.world import sample
from vistok.zoo import load, load_processor

QUESTIONS = "describe the picture .", "is there a red star ?"
METHODS: tuple[tuple[str | None, float | None], ...] = ((None, None), ("fastervlm", 0.25))
MAX_BYTES = 2**30


def tiny(device: str) -> tuple[Any, Any]:
    """vistok-tiny and its processor."""
    return load("vistok-tiny", device=device), load_processor("vistok-tiny")


def large_encoder(device: str) -> tuple[Any, Any]:
    """CLIP-L and four layers of a language model, with vistok-tiny's words."""
    processor = load_processor("vistok-tiny")
    side = {"height": SIDE, "width": SIDE}
    processor.image_processor.size = processor.image_processor.crop_size = side
    processor.patch_size = PATCH
    tokenizer = processor.tokenizer
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=SIDE,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=4,
            num_attention_heads=16,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(processor.image_token),
    )
    return LlavaForConditionalGeneration(config).eval().to(device), processor


def request(image: Image.Image, question: str, method: str | None, keep: float | None) -> Ask:
    """A question on a picture, answered by one token."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    pictures = (Shown(image, digest(image)),)
    return Ask([{"role": "user", "content": content}], pictures, max_new_tokens=1, method=method, keep=keep)


def measure(model: Any, processor: Any, method: str | None, keep: float | None, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each run: {"none": ..., "first": ..., "second": ...}."""
    image = Image.fromarray(next(iter(sample("scenes", 1, seed=5, size=112, split="test"))).image)
    asked, later = (request(image, question, method, keep) for question in QUESTIONS)
    known = FeatureCache(model, MAX_BYTES)
    plain = Runner(model, processor)

    def answer(runner: Runner, ask: Ask) -> None:
        runner([ask], lambda row, event: None, lambda row: False)

    def cached(cache: FeatureCache) -> Callable[[], None]:
        runner = Runner(model, processor, around=cache.around)
        return lambda: answer(runner, later)

    empty = iter([cached(FeatureCache(model, MAX_BYTES)) for _ in range(repeats + 1)])
    answer(Runner(model, processor, around=known.around), asked)
    runs: dict[str, Callable[[], object]] = {
        "none": lambda: answer(plain, later),
        "first": lambda: next(empty)(),
        "second": cached(known),
    }
    return in_turn(runs, repeats, str(model.device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    for name, make in (("vistok-tiny", tiny), ("clip-l, 4 layers", large_encoder)):
        model, processor = make(arguments.device)
        for method, keep in METHODS:
            taken = measure(model, processor, method, keep, arguments.repeats)
            for run, times in taken.items():
                row = {
                    "model": name,
                    "method": method or "dense",
                    "cache": run,
                    "ms": round(statistics.median(times), 1),
                    "ms_min": round(min(times), 1),
                    "ms_max": round(max(times), 1),
                    "of_none": round(ratio(times, taken["none"]), 3),
                }
                if arguments.json:
                    print(json.dumps({**row, **machine(arguments.device)}))
                else:
                    print(
                        f"{name:18}{row['method']:12}{run:8}{row['ms']:9.1f} ms ({row['ms_min']}..{row['ms_max']})"
                        f"  {row['of_none']:.3f} of the time without a cache"
                    )
    if not arguments.json:
        print(machine_line(arguments.device))


if __name__ == "__main__":
    main()
