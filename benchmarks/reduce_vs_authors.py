"""What the evidence of a method costs, beside the authors' usual way of getting it.

The usual way: switch fused attention off (``attn_implementation="eager"``) and have the whole model return its
attention maps (``output_attentions=True``). Ours: fused attention stays on, and only the rows that the method reads are
computed. For methods that read the encoder the vision tower runs alone; for those that read the language model, the
language model (at the method's own schedule of counts, against the same schedule with nothing scored).

time ratio = (ours - plain) / (usual - plain), medians of runs in turn; memory ratio = the same of the bytes that each
way needs at its peak beyond what was held before (resident memory, Linux). Random weights, N = 2880 visual tokens
(LLaVA-NeXT's thumbnail and four crops).

python -m benchmarks.reduce_vs_authors [--methods a,b] [--repeats 3] [--layers 6] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

import vistok
from benchmarks.common import build, first_token, in_turn, inputs_of, machine, machine_line
from benchmarks.reduce_overhead import Given
from vistok import catalogue
from vistok.bench.resources import peak_bytes
from vistok.host.reducer import Reducer
from vistok.host.vision import ATTENTION_FIELDS

GOAL_TIME, GOAL_MEMORY = 0.2, 0.1
TOKENS = 2880
KEEP = {"encoder": 64, "decoder": TOKENS // 2}
"""Half for the decoder's, so that the first layers see all tokens, as in the methods' papers: at a mean of 64 over six
layers there would be nothing to score."""
WAYS = ("plain", "ours", "usual")


def reads(method: Reducer) -> str:
    """Where the method reads attention: "encoder", "decoder" or "" (neither)."""
    if any(name in ATTENTION_FIELDS for name in method.needs):
        return "encoder"
    return "decoder" if any(name.startswith("llm_") for name in method.layer_needs) else ""


def runs_of(model: Any, method: Reducer) -> dict[str, Callable[[], None]]:
    """The three ways. ``usual`` and ``plain`` leave the model as they found it."""
    inputs = inputs_of(model)
    pictures = {name: inputs[name] for name in ("pixel_values", "image_sizes")}

    def encode() -> None:
        model.get_image_features(**pictures)

    def encode_ours() -> None:
        with vistok.apply(model, method, keep=KEEP["encoder"]):
            encode()

    def usual(part: Any, run: Callable[[], None]) -> Callable[[], None]:
        def eager() -> None:
            part.set_attn_implementation("eager")
            handle = part.register_forward_pre_hook(
                lambda module, args, kwargs: (args, {**kwargs, "output_attentions": True}), with_kwargs=True
            )
            try:
                run()
            finally:
                handle.remove()
                part.set_attn_implementation("sdpa")

        return eager

    if reads(method) == "encoder":
        return {"plain": encode, "ours": encode_ours, "usual": usual(model.model.vision_tower, encode)}

    def answer(applied: Reducer) -> Callable[[], None]:
        def run() -> None:
            with vistok.apply(model, applied, keep=KEEP["decoder"]):
                first_token(model, inputs)

        return run

    given = answer(Given(method))
    return {"plain": given, "ours": answer(method), "usual": usual(model.model.language_model, given)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="", help="comma-separated; default: all that read attention")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    model = build(TOKENS, layers=options.layers)
    names = options.methods.split(",") if options.methods else [card.slug for card in catalogue.methods("reduce")]
    for slug in names:
        method = vistok.create(slug)
        if not reads(method):
            continue
        try:
            runs = runs_of(model, method)
            runs["ours"]()
        except ValueError as error:
            print(f"{slug:24} cannot work on this model: {error}", file=sys.stderr)
            continue
        times = in_turn(runs, options.repeats)
        middle = {way: statistics.median(times[way]) for way in WAYS}
        memory = {way: peak_bytes(model.device, runs[way]) or 0 for way in WAYS}
        time_ratio = (middle["ours"] - middle["plain"]) / (middle["usual"] - middle["plain"])
        memory_ratio = (memory["ours"] - memory["plain"]) / max(1, memory["usual"] - memory["plain"])
        row = {
            "method": slug,
            "reads": reads(method),
            **{f"{way}_ms": round(middle[way], 1) for way in WAYS},
            **{f"{way}_mib": round(memory[way] / 2**20) for way in WAYS},
            "time_ratio": round(time_ratio, 3),
            "memory_ratio": round(memory_ratio, 3),
            "met": time_ratio <= GOAL_TIME and memory_ratio <= GOAL_MEMORY,
        }
        if options.json:
            print(json.dumps({**row, **machine()}), flush=True)
        else:
            print(
                f"{slug:24} {row['reads']:8} ms {row['plain_ms']:8.1f} {row['ours_ms']:8.1f} {row['usual_ms']:8.1f}"
                f"  ratio {row['time_ratio']:6.3f}   MiB {row['plain_mib']:6} {row['ours_mib']:6} {row['usual_mib']:6}"
                f"  ratio {row['memory_ratio']:6.3f}  {'met' if row['met'] else 'MISSED'}",
                flush=True,
            )
    if not options.json:
        print(f"plain, ours, usual; goals: time <= {GOAL_TIME}, memory <= {GOAL_MEMORY}; {machine_line()}")


if __name__ == "__main__":
    main()
