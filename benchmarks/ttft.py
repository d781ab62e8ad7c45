"""Time to the first token with fewer visual tokens: every reducer against dense and against the bound.

The model has random weights: a 336 px picture in 14 px patches (576 visual tokens), CLIP tower and Llama decoder both
of width 512 with 12 layers, and LLaVA's own classes. *dense* is the model as it is. The *bound* is the same model whose
language model is handed K tokens of the picture by hand, with no vistok in it: nothing that selects can be faster. All
are measured in turn in one run (A B C A B C ...), the first round is not counted, medians are reported.

python -m benchmarks.ttft [--keep 64] [--repeats 7] [--json]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vistok

GOAL = 1.10
TEXT = 24


def build(width: int = 512, layers: int = 12) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    shape = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape, image_size=336, patch_size=14),
        text_config=LlamaConfig(**shape, vocab_size=1000),
        image_token_index=999,
    )
    return LlavaForConditionalGeneration(config).eval()


def inputs_of(model: LlavaForConditionalGeneration) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(5, 900, (1, TEXT), generator=generator)
    picture = torch.full((1, 576), model.config.image_token_id)
    ids = torch.cat([torch.tensor([[1]]), picture, words], dim=1)
    pixels = torch.randn(1, 3, 336, 336, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def bound(model: LlavaForConditionalGeneration, inputs: dict[str, Tensor], keep: int) -> None:
    """The first token from the picture's first ``keep`` tokens, at their own positions, gathered by hand."""
    features = torch.cat(model.get_image_features(inputs["pixel_values"]).pooler_output)[None, :keep]
    ids = inputs["input_ids"]
    words = model.get_input_embeddings()(torch.cat([ids[:, :1], ids[:, 577:]], dim=1))
    positions = torch.cat([torch.arange(1 + keep), torch.arange(577, ids.shape[1])])[None]
    embeds = torch.cat([words[:, :1], features, words[:, 1:]], dim=1)
    hidden = model.model.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=True).last_hidden_state
    model.lm_head(hidden[:, -1:]).argmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    model = build()
    inputs = inputs_of(model)

    def reduced(slug: str) -> Callable[[], None]:
        def run() -> None:
            with vistok.apply(model, slug, keep=arguments.keep):
                model(**inputs, logits_to_keep=1).logits.argmax(-1)

        return run

    runs: dict[str, Callable[[], object]] = {
        "dense": lambda: model(**inputs, logits_to_keep=1).logits.argmax(-1),
        "bound": lambda: bound(model, inputs, arguments.keep),
    }
    staged = {c.slug for c in vistok.systems("reduce") if "layer" in c.site}
    runs |= {card.slug: reduced(card.slug) for card in vistok.systems("reduce")}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for number in range(arguments.repeats + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                if number:
                    taken[name].append(1e3 * (time.perf_counter() - start))
    dense = statistics.median(taken["dense"])
    floor = statistics.median(taken["bound"])
    for name, times in taken.items():
        middle = statistics.median(times)
        # Pair by pair within a round, so that a slow stretch of the machine cancels out.
        ratio = statistics.median(a / b for a, b in zip(times, taken["bound"], strict=True))
        row = {
            "method": name,
            "ms": round(middle, 1),
            "ms_min": round(min(times), 1),
            "ms_max": round(max(times), 1),
            "over_bound": round(ratio, 3),
            "speed_up": round(dense / middle, 2),
            "goal": None if name in staged or name in ("dense", "bound") else GOAL,
        }
        if arguments.json:
            print(json.dumps(row))
        else:
            goal = "" if row["goal"] is None else f"  goal <= {GOAL:.2f}: {'met' if ratio <= GOAL else 'MISSED'}"
            print(
                f"{name:24} {middle:8.1f} ms ({row['ms_min']}..{row['ms_max']})  {row['speed_up']:5.2f} x dense's speed"
                f"  {ratio:5.2f} x the bound's time{goal}"
            )
    if not arguments.json:
        print(
            f"K = {arguments.keep} of 576; bound {floor:.1f} ms; {platform.processor() or platform.machine()}, "
            f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}"
        )


if __name__ == "__main__":
    main()
