"""The second question about a picture: with the tokens chosen for the first one, chosen anew, and with all of them.

Two-turn dialogues of the world: two questions of a picture whose evidence overlaps least. Turn one is read with the
picture and given its right answer; turn two is asked on the same cache. *reuse-first* keeps the choice of turn one,
*reselect* makes a new one (``vistok.apply(..., reselect=True)``), *keep-all* is the dense model. Prints the accuracy of
the second answer with its 95% interval, the difference from reuse-first on the same dialogues, and milliseconds a
dialogue (both turns, batch of 32).

python -m benchmarks.reduce_dialogues [--methods random,fastv,sparsevlm,cdpruner,mmtok] [--keep 0.1] [--n 400] [--json]
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from benchmarks.common import machine, machine_line
from vistok.bench.measure import answer_all
from vistok.bench.protocols import multi_turn
from vistok.bench.statistics import paired_bootstrap, wilson
from vistok.world import sample
from vistok.zoo import DEFAULT, load, load_processor

METHODS = "random,fastervlm,fastv,sparsevlm,cdpruner,mmtok"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--n", type=int, default=400, help="pictures of the world, of all tasks in turn")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    model, processor = load(options.model), load_processor(options.model)
    asked = multi_turn(list(sample("all", options.n, split="test")))

    def measure(name: str, turn: str) -> tuple[list[bool], float]:
        start = time.perf_counter()
        found = answer_all(model, processor, name, options.keep, asked, reselect=turn == "reselect")
        spent = (time.perf_counter() - start) * 1e3 / len(asked)
        return [bool(one.correct) for one in found], spent

    def show(name: str, protocol: str, right: list[bool], spent: float, first: list[bool] | None) -> None:
        low, high = wilson(sum(right), len(right))
        row = {
            "method": name,
            "protocol": protocol,
            "keep": 1.0 if protocol == "keep-all" else options.keep,
            "dialogues": len(right),
            "accuracy": sum(right) / len(right),
            "interval": [low, high],
            "over_reuse_first": None if first is None else paired_bootstrap(right, first),
            "milliseconds": round(spent, 2),
        }
        if options.json:
            print(json.dumps({**row, **machine()}), flush=True)
            return
        gain = "" if first is None else "  over reuse-first {:+.1%} .. {:+.1%}".format(*paired_bootstrap(right, first))
        print(
            f"{name:12} {protocol:12} {row['accuracy']:6.1%} [{low:.1%}, {high:.1%}]  {spent:6.1f} ms{gain}", flush=True
        )

    show("dense", "keep-all", *measure("dense", "keep-all"), None)
    for name in options.methods.split(","):
        first, spent = measure(name, "reuse-first")
        show(name, "reuse-first", first, spent, None)
        show(name, "reselect", *measure(name, "reselect"), first)
    if not options.json:
        print(f"keep {options.keep}; {len(asked)} dialogues; {machine_line()}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
