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
import statistics
from collections.abc import Callable

import torch

import vistok
from benchmarks.common import bound, build, first_token, in_turn, inputs_of, machine, machine_line, ratio
from vistok import catalogue

GOAL = 1.10


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
                first_token(model, inputs)

        return run

    runs: dict[str, Callable[[], object]] = {
        "dense": lambda: first_token(model, inputs),
        "bound": lambda: bound(model, inputs, arguments.keep),
    }
    staged = {c.slug for c in catalogue.methods("reduce") if "layer" in c.site}
    runs |= {card.slug: reduced(card.slug) for card in catalogue.methods("reduce")}
    with torch.inference_mode():
        taken = in_turn(runs, arguments.repeats)
    dense = statistics.median(taken["dense"])
    for name, times in taken.items():
        middle = statistics.median(times)
        over = ratio(times, taken["bound"])
        row = {
            "method": name,
            "ms": round(middle, 1),
            "ms_min": round(min(times), 1),
            "ms_max": round(max(times), 1),
            "over_bound": round(over, 3),
            "speed_up": round(dense / middle, 2),
            "goal": None if name in staged or name in ("dense", "bound") else GOAL,
        }
        if arguments.json:
            print(json.dumps({**row, **machine()}))
        else:
            goal = "" if row["goal"] is None else f"  goal <= {GOAL:.2f}: {'met' if over <= GOAL else 'MISSED'}"
            print(
                f"{name:24} {middle:8.1f} ms ({row['ms_min']}..{row['ms_max']})  {row['speed_up']:5.2f} x dense's speed"
                f"  {over:5.2f} x the bound's time{goal}"
            )
    if not arguments.json:
        print(f"K = {arguments.keep} of 576; {machine_line()}")


if __name__ == "__main__":
    main()
