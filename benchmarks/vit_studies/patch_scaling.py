"""One small Adventurer at patches of 8, 4, 2 and 1 pixels, on equal pictures, and the law of its error."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean, stdev
from typing import Any

from vistok.bench.vit_trial import ViTTrial
from vistok.vit.patch_scaling import PatchSweep, fit_power_law, small_adventurer, sweep_glimpses

TITLE = "Patchification scaling: error against tokens, which pixels of a 16 px glimpse are the object's"


def study(trial: ViTTrial, quick: bool = False) -> Iterator[dict[str, Any]]:
    """Error (share of the pixels) and loss on held-out glimpses, mean of the seeds, from the largest patch to a pixel.

    "deviation": of the seeds' errors. "law": the fitted a N^-b + c of the errors at that N. "mflops": millions of
    operations for a picture.
    """
    steps, seeds, pictures = (1, 1, 16) if quick else (100, 3, 256)
    sweep = PatchSweep(small_adventurer, (8, 4, 2, 1), 16)
    points = list(sweep_glimpses(trial, sweep, steps, range(seeds), pictures))
    tokens = sorted({point.tokens for point in points})
    error = {n: [point.error for point in points if point.tokens == n] for n in tokens}
    law = fit_power_law(tokens, [mean(error[n]) for n in tokens])
    for n in tokens:
        same = [point for point in points if point.tokens == n]
        yield {
            "patch": same[0].patch,
            "tokens": n,
            "steps": steps,
            "seeds": seeds,
            "mflops": same[0].flops / 1e6,
            "loss": mean(point.loss for point in same),
            "error": mean(error[n]),
            "deviation": stdev(error[n]) if seeds > 1 else 0.0,
            "law": law(n),
            "a": law.a,
            "b": law.b,
            "c": law.c,
        }
