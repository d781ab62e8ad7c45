"""What choosing the tokens costs: every reducer against the same run with the tokens given.

For a method that acts before the language model the given run is the plain model whose language model is handed the
picture's first K tokens by hand, with no vistok in it. For a method with stages inside the language model it is the
same schedule of counts, with the first tokens kept at each stage: what the method adds is its scores. Random weights,
width 512, 12 layers, LLaVA's own classes at N = 576 and LLaVA-NeXT's at N = 2880 (see benchmarks.common.build); each
method in turn with its given run (A B A B), the first round is not counted, ratios are medians of pairs. "select" is
what the session itself counts for evidence and method, which a noisy machine blurs less.

python -m benchmarks.reduce_overhead [--tokens 576 2880] [--keep 64] [--repeats 5] [--methods a,b] [--device cuda]
                                     [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import vistok
from benchmarks.common import bound, build, first_token, in_turn, inputs_of, machine, machine_line, ratio
from vistok import catalogue
from vistok.host.reducer import Evidence, Reducer, Reduction, Schedule

GOAL_BEFORE, GOAL_STAGED = 1.05, 1.15


@dataclass(frozen=True)
class Given(Reducer):
    """The counts of another method, and the first tokens at every stage: nothing is scored."""

    like: Reducer = field(default_factory=Reducer)

    def schedule(self, num_tokens: int, keep: int, num_layers: int) -> Schedule:
        return self.like.schedule(num_tokens, keep, num_layers)

    def select(self, evidence: Evidence, keep: int) -> Tensor:
        return torch.arange(keep, device=evidence.features.device).expand(len(evidence.features), keep)

    def at_layer(self, evidence: Evidence, keep: int, layer: int) -> Reduction:
        return Reduction.select(evidence.features, self.select(evidence, keep))


def rows_of(tokens: int, keep: int, repeats: int, methods: list[str], device: str) -> Iterator[dict[str, Any]]:
    """One row a method that can work on this model; the others say why not."""
    model = build(tokens).to(device)
    inputs = {name: value.to(device) for name, value in inputs_of(model).items()}
    layers = model.config.get_text_config().num_hidden_layers

    spent: list[float] = []

    def reduced(method: Any) -> Callable[[], None]:
        def run() -> None:
            with vistok.apply(model, method, keep=keep) as session:
                first_token(model, inputs)
            spent.append(session.milliseconds["select"])

        return run

    dense = in_turn({"dense": lambda: first_token(model, inputs)}, repeats, device)["dense"]
    for slug in methods:
        reducer = vistok.create(slug)
        staged = bool(reducer.schedule(tokens, keep, layers).layers)
        given = reduced(Given(reducer)) if staged else lambda: bound(model, inputs, keep)
        try:
            times = in_turn({"given": given, "method": reduced(reducer)}, repeats, device)
            select = statistics.median(spent[-1 : -2 * repeats : -2] if staged else spent[-repeats:])
        except ValueError as error:
            yield {"method": slug, "tokens": tokens, "refused": str(error)}
            continue
        over, goal = ratio(times["method"], times["given"]), GOAL_STAGED if staged else GOAL_BEFORE
        yield {
            "method": slug,
            "tokens": tokens,
            "keep": keep,
            "staged": staged,
            "ms": round(statistics.median(times["method"]), 1),
            "given_ms": round(statistics.median(times["given"]), 1),
            "select_ms": round(select, 1),
            "dense_ms": round(statistics.median(dense), 1),
            "ratio": round(over, 3),
            "goal": goal,
            "met": over <= goal,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[576, 2880])
    parser.add_argument("--keep", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--methods", default="", help="comma-separated; default: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    methods = options.methods.split(",") if options.methods else [card.slug for card in catalogue.methods("reduce")]
    for tokens in options.tokens:
        for row in rows_of(tokens, options.keep, options.repeats, methods, options.device):
            if options.json:
                print(json.dumps({**row, **machine(options.device)}), flush=True)
            elif "refused" in row:
                print(f"{row['method']:24} N {tokens:5}  cannot work on this model: {row['refused']}")
            else:
                print(
                    f"{row['method']:24} N {tokens:5}  {row['ms']:8.1f} ms  given {row['given_ms']:8.1f}  "
                    f"select {row['select_ms']:7.1f}  "
                    f"dense {row['dense_ms']:8.1f}  ratio {row['ratio']:5.3f}  goal <= {row['goal']:.2f}: "
                    f"{'met' if row['met'] else 'MISSED'}{'  (staged)' if row['staged'] else ''}",
                    flush=True,
                )
    if not options.json:
        print(f"K = {options.keep}; {machine_line(options.device)}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
