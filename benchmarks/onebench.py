"""How well a ranking is recovered from sparse measurements: pairs and Plackett-Luce (ONEBench) beside averages.

Simulated models whose true order is known. A share of the measurements is hidden, at random ("gaussian", "gumbel", and
"units": data sets whose scores lie in 0 .. 1, 0 .. 10, 0 .. 100 and 0 .. 1000), or so that easy data sets were run by
weak models and hard ones by strong models ("biased"). Prints Kendall's tau against the truth, mean over the seeds: of
the fit (ILSR), of its first pass, and of plain means, means normalised by data set, Borda's points and Elo's ratings.

python -m benchmarks.onebench [--models 100] [--samples 2000] [--seeds 5] [--json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import numpy as np

from benchmarks.common import machine, machine_line
from vistok.bench.onebench import fit_pl, kendall, to_pairs
from vistok.bench.onebench_averages import borda, elo, mean_normalised, mean_score
from vistok.bench.onebench_simulated import hide, simulate, simulate_biased

MISSING = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)
ALPHA = 0.01
SETS = 10


def ranks(matrix: np.ndarray, sets: np.ndarray) -> dict[str, Callable[[], np.ndarray]]:
    wins = to_pairs(matrix)
    return {
        "fit": lambda: fit_pl(wins, ALPHA, 1e-9),
        "one pass": lambda: fit_pl(wins, ALPHA, one_pass=True),
        "mean": lambda: mean_score(matrix),
        "normalised": lambda: mean_normalised(matrix, sets),
        "borda": lambda: borda(matrix),
        "elo": lambda: elo(matrix),
    }


def simulated(case: str, options: argparse.Namespace, share: float, seed: int) -> tuple[np.ndarray, ...]:
    """(matrix with holes, truth, the set of each sample)"""
    if case == "biased":
        scores, truth, sets, weights = simulate_biased(options.models, SETS, options.samples // SETS, seed=seed)
        return hide(scores, share, seed, weights), truth, sets
    scores, truth = simulate(options.models, options.samples, "gumbel" if case == "gumbel" else "gaussian", seed)
    sets = np.arange(options.samples) * SETS // options.samples
    if case == "units":
        scores = scores * 10.0 ** (sets % 4)
    return hide(scores, share, seed), truth, sets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    for case in ("gaussian", "gumbel", "units", "biased"):
        for share in MISSING:
            taus: dict[str, list[float]] = {}
            for seed in range(options.seeds):
                matrix, truth, sets = simulated(case, options, share, seed)
                for name, rank in ranks(matrix, sets).items():
                    taus.setdefault(name, []).append(kendall(rank(), truth))
            row = {name: round(float(np.mean(found)), 3) for name, found in taus.items()}
            if options.json:
                print(json.dumps({"case": case, "missing": share, **row, **machine()}), flush=True)
                continue
            if share == MISSING[0]:
                print(f"\n{case:9} missing" + "".join(f"{name:>12}" for name in row))
            print(f"{'':9} {share:7.0%}" + "".join(f"{value:12.3f}" for value in row.values()), flush=True)
    if not options.json:
        print(f"\n{options.models} models, {options.samples} samples, {options.seeds} seeds; {machine_line()}")


if __name__ == "__main__":
    main()
