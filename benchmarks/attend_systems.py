"""What single systems of the family ``attend`` are measured by beyond their claims. Figures for docs, not tests.

``infsa``: by number of tokens, peak memory and time of fused softmax attention and of the forms of infinite
self-attention (one head of 64 channels, no gradients), and the cosine of the linear form's and the power form's weights
with the true dominant eigenvector of the quadratic map, left (of keys) and right (of queries). Two kinds of queries and
keys: "mixed", of mean 0, and "drift", with a common part, as biases and norms give. What is quadratic is left out above
``--quadratic`` tokens. Peak memory is beyond the inputs and, on a CPU, the growth of the resident set, Linux only.

``lra``: every mixer of ``vistok.attend.lra`` on every task: accuracy, parameters, steps a second, and peak memory of a
step. Below a task's name what the commonest answer and a count of the tokens reach. "free": its parameters are not
within a tenth of those of attention to all tokens. ``--save`` keeps the cells in a file, from which a run goes on.

``growth``: milliseconds and operations (torch's counter: products of matrices, convolutions and attention) of every
mixer alone, without gradients, by number of tokens, and the exponents of both between the last two: log of the costs'
ratio over log of the tokens'. "claimed" is what the mixer's formula gives for large N with the settings it has in
``vistok.attend.lra``: biformer's number of regions, and transnext's and s2aformer's pooling, are fixed there, which
leaves them quadratic with a small factor. Where exponents of time fall short of it, other parts still take most.

python -m benchmarks.attend_systems infsa [--tokens 4096 16384 65536] [--quadratic 16384] [--repeats 3] [--threads 1]
python -m benchmarks.attend_systems lra [--tasks pixels text] [--mixers dense transnext] [--steps 400] [--train 4000]
                                        [--seed 0] [--threads 1] [--save FILE]
python -m benchmarks.attend_systems growth [--tokens 1024 4096 16384] [--mixers gna davit] [--repeats 3] [--threads 1]
All: [--device cpu] of infsa alone; [--markdown] prints a table for a page instead of one for a terminal.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import in_turn, machine_line
from vistok.attend.infsa import POWER_STEPS, dominant, infsa, key_weights
from vistok.attend.lra import LENGTHS, MIXERS, SMALL, TASKS, LongRangeArena, Mixer, commonest, counted
from vistok.bench.attend_trial import AttendTrial
from vistok.bench.resources import peak_bytes
from vistok.world.lra import Sequences

DIM = 64
DRIFT = 0.5
"""The common part of queries and of keys, in standard deviations of the rest."""
MIB = 2**20


def infsa_rows(tokens: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a form of attention: MiB, milliseconds, and cosines where it has weights of keys."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, tokens, DIM, generator=generator).to(options.device) for _ in range(3))
    runs: dict[str, Callable[[], Tensor]] = {
        "softmax": lambda: scaled_dot_product_attention(q, k, v),
        "pure": lambda: infsa(q, k, v, "pure"),
        "linear": lambda: infsa(q, k, v, "linear"),
        "power": lambda: infsa(q, k, v, "power"),
    }
    if tokens > options.quadratic:
        runs = {name: run for name, run in runs.items() if name in ("linear", "power")}
    with torch.inference_mode():
        taken = in_turn(runs, options.repeats, options.device)
        needed = {name: peak_bytes(torch.device(options.device), run) for name, run in runs.items()}
    rows = {
        name: {"tokens": tokens, "form": name, "ms": statistics.median(taken[name]), "mib": mib(needed[name])}
        for name in runs
    }
    if tokens <= options.quadratic:
        for kind, shift in (("mixed", 0.0), ("drift", DRIFT)):
            for name, found in cosines(q + shift, k + shift).items():
                rows[name] |= {f"{kind}_{side}": value for side, value in found.items()}
    return list(rows.values())


def cosines(q: Tensor, k: Tensor) -> dict[str, dict[str, float]]:
    """By form, of its weights with the left and the right eigenvector, and of equal weights with the left one."""
    left, right = dominant(q, k, steps=20), dominant(q, k, left=False, steps=20)
    found = {}
    for name, steps in (("linear", 1), ("power", POWER_STEPS)):
        weights = key_weights(q, k, steps)
        sides = {"left": (weights, left), "right": (weights, right), "equal": (torch.ones_like(left), left)}
        found[name] = {side: float(cosine_similarity(a, b, dim=2).mean()) for side, (a, b) in sides.items()}
    return found


def mib(size: int | None) -> float | None:
    """Bytes in MiB."""
    return None if size is None else size / MIB


def lra_cell(arena: LongRangeArena, name: str, task: tuple[Sequences, Sequences], seed: int) -> dict[str, Any]:
    """What a mixer reached on a task, and the peak memory of a step of its training."""
    score = arena.run(AttendTrial(seed), name, task)
    net = arena.build(name, task[0], free=True)
    tokens, labels = (torch.tensor(part[: arena.batch]) for part in (task[0].tokens, task[0].labels))

    def step() -> None:
        torch.autograd.grad(cross_entropy(net(tokens), labels), list(net.parameters()))

    return asdict(score) | {"mib": mib(peak_bytes(torch.device("cpu"), step))}


def lra_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a mixer, first two without a network; cells are written as they come."""
    arena = replace(SMALL, steps=options.steps)
    key = f"{arena}, {options.train} rows, seed {options.seed}"
    path = Path(options.save) if options.save else None
    kept: dict[str, Any] = json.loads(path.read_text()) if path and path.exists() else {}
    cells = kept.setdefault(key, {})
    rows: dict[str, dict[str, Any]] = {name: {"mixer": name} for name in ("commonest", "counted", *options.mixers)}
    for task_name in options.tasks:
        task = TASKS[task_name](LENGTHS[task_name], options.train, 400, options.seed)
        rows["commonest"][task_name] = {"accuracy": commonest(*task)}
        rows["counted"][task_name] = {"accuracy": counted(*task)}
        for name in options.mixers:
            cell = f"{name} {task_name}"
            if cell not in cells:
                cells[cell] = lra_cell(arena, name, task, options.seed)
                if path:
                    path.write_text(json.dumps(kept, indent=1))
                print(f"{cell}: {cells[cell]['accuracy']:.1%}", flush=True)
            rows[name][task_name] = cells[cell]
    return list(rows.values())


def lra_table(rows: Sequence[dict[str, Any]], tasks: Sequence[str]) -> list[list[str]]:
    """Accuracies in percent by task, their mean, and of the first task parameters, steps a second and MiB."""
    table = [["mixer", *tasks, "mean", "parameters", "steps/s", "MiB a step"]]
    for row in rows:
        found = [100 * row[task]["accuracy"] for task in tasks]
        first = row[tasks[0]]
        line = [row["mixer"], *(f"{value:.1f}" for value in (*found, statistics.mean(found)))]
        if "parameters" in first:
            line += [f"{first['parameters']}{' (free)' if first['free'] else ''}", f"{first['steps_per_second']:.1f}"]
            line += ["" if first["mib"] is None else f"{first['mib']:.0f}"]
        table.append(line + [""] * (len(table[0]) - len(line)))
    return table


def infsa_table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A line a row; what was not measured is empty."""
    table = [["tokens", "form", "ms", "MiB", *(f"{kind} {side}" for kind in KINDS for side in SIDES)]]
    for row in rows:
        values = [row["ms"], row["mib"], *(row.get(f"{kind}_{side}") for kind in KINDS for side in SIDES)]
        digits = (1, 1, *[3] * (len(values) - 2))
        cells = ["" if v is None else f"{v:.{d}f}" for v, d in zip(values, digits, strict=True)]
        table.append([str(row["tokens"]), row["form"], *cells])
    return table


CLAIMED = {
    "dense": 2,
    "biformer": 2,
    "catanet": 1,
    "davit": 1,
    "dependencyvit": 2,
    "faster-na": 1,
    "gna": 1,
    "halonet": 1,
    "infsa": 1,
    "infsa-pure": 2,
    "plainmamba": 1,
    "raftmlp": 1.5,
    "s2aformer": 2,
    "softhgnn": 1,
    "tapadl": 2,
    "transnext": 2,
}
"""Exponents of N in the formula of a mixer's operations, for large N."""
WIDTH, HEADS = 64, 4


def growth_rows(options: argparse.Namespace) -> list[list[str]]:
    """A line a mixer: milliseconds at each number of tokens, exponents of time and of operations, and the claimed."""
    sizes = sorted(options.tokens)
    table = [["mixer", *(f"ms at {n}" for n in sizes), "exponent, time", "exponent, operations", "claimed"]]
    for name in options.mixers:
        taken, operations = [], []
        for n in sizes:
            side = math.isqrt(n)
            torch.manual_seed(0)
            mixer = MIXERS[name]
            mix = mixer.make(WIDTH, HEADS, (side, side), 0).eval()
            x, mask = torch.randn(1, side * side, WIDTH), torch.ones(1, side * side, dtype=torch.bool)

            def run(mixer: Mixer = mixer, mix: Any = mix, x: Tensor = x, mask: Tensor = mask, side: int = side) -> Any:
                return mixer.call(mix, x, (side, side), mask)

            with torch.inference_mode():
                taken.append(statistics.median(in_turn({name: run}, options.repeats, "cpu")[name]))
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                run()
            operations.append(counter.get_total_flops())
        step = math.log(sizes[-1] / sizes[-2])
        slopes = [math.log(cost[-1] / cost[-2]) / step for cost in (taken, operations)]
        cells = [*(f"{ms:.1f}" for ms in taken), *(f"{slope:.2f}" for slope in slopes), f"{CLAIMED[name]:g}"]
        table.append([name, *cells])
        print("  ".join(table[-1]), flush=True)
    return table


KINDS, SIDES = ("mixed", "drift"), ("left", "right", "equal")


def show(table: Sequence[Sequence[str]], markdown: bool) -> None:
    """Print a table whose first line is its head."""
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in table]
        print("\n".join([lines[0], "|" + " --- |" * len(table[0]), *lines[1:]]))
        return
    wide = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        print("  ".join(cell.rjust(w) for cell, w in zip(row, wide, strict=True)))


def main() -> None:
    """Parse the command line and print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="system", required=True)
    graph, arena, growth = parts.add_parser("infsa"), parts.add_parser("lra"), parts.add_parser("growth")
    growth.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    growth.add_argument("--mixers", nargs="+", choices=list(MIXERS), default=list(MIXERS))
    growth.add_argument("--repeats", type=int, default=3)
    graph.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 65536])
    graph.add_argument("--quadratic", type=int, default=16384, help="the most tokens of what is quadratic")
    graph.add_argument("--repeats", type=int, default=3)
    graph.add_argument("--device", default="cpu")
    arena.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    arena.add_argument("--mixers", nargs="+", choices=list(MIXERS), default=list(MIXERS))
    arena.add_argument("--steps", type=int, default=SMALL.steps)
    arena.add_argument("--train", type=int, default=4000)
    arena.add_argument("--seed", type=int, default=0)
    arena.add_argument("--save", help="a JSON file of cells")
    for part in (graph, arena, growth):
        part.add_argument("--threads", type=int, default=1)
        part.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine_line(getattr(options, "device", "cpu")))
    if options.system == "infsa":
        show(infsa_table([row for n in options.tokens for row in infsa_rows(n, options)]), options.markdown)
    elif options.system == "growth":
        show(growth_rows(options), options.markdown)
    else:
        show(lra_table(lra_rows(options), options.tasks), options.markdown)


if __name__ == "__main__":
    main()
