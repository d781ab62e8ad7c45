"""BUS: precision of the patches that a caption chooses, on the thing it names, against choices that see no caption."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean
from typing import Any

from vistok.bench.vit_trial import ViTTrial
from vistok.vit.bus import KEPT, Chooser, _Pointer, learn, precision

TITLE: str = "BUS: patches that the caption chooses, of the one thing of several that it names"


def study(trial: ViTTrial, quick: bool = False) -> Iterator[dict[str, Any]]:
    """Precision over the seeds of the training. "another caption": the trained selector, given that of another picture;
    what it finds are things, whichever. The choices without a caption are not trained."""
    steps, seeds = (2, 1) if quick else (400, 3)
    models = [learn(trial, steps, seed) for seed in range(seeds)]
    choosers: list[tuple[Chooser, list[_Pointer | None]]] = [
        ("chance", [None]),
        ("class token", [None]),
        ("another caption", [*models]),
        ("caption", [*models]),
    ]
    for chooser, nets in choosers:
        found = [precision(trial, chooser, net) for net in nets]
        yield {
            "chosen by": chooser,
            "patches kept": KEPT,
            "steps": 0 if nets == [None] else steps,
            "seeds": len(nets),
            "precision": mean(found),
            "lowest": min(found),
            "highest": max(found),
        }
