"""A ViT that goes on with 16 semantic tokens, against one cut to as many of its blocks as cost no less."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from statistics import mean
from typing import Any

import torch

from vistok.bench.vit_trial import ViTTrial
from vistok.vit.stvit_semantic import SemanticTokenViT, operations

TITLE = "STViT with semantic tokens against a shorter plain ViT, at equal operations"


def study(trial: ViTTrial, quick: bool = False) -> Iterator[dict[str, Any]]:
    """Accuracy over the seeds after equal steps, both from the zoo's classifier; "whole" is that one as it is."""
    steps, batch, seeds = (2, 4, 1) if quick else (100, 32, 3)
    vit = trial.classifier
    size, window = vit.patch_embed.img_size[0], vit.patch_embed.grid_size[0] // 2
    system = SemanticTokenViT(window=window, shortcut=True, layer_scale=0.1)  # as the system's claim, and why there
    semantic = system.build(vit)
    whole, wanted = operations(vit, size), operations(semantic, size)
    blocks = next(n for n in range(1, len(vit.blocks) + 1) if operations(first(vit, n), size) >= wanted)
    for name in ("semantic tokens", f"the first {blocks} of {len(vit.blocks)} blocks"):
        found = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = system.build(vit) if name == "semantic tokens" else first(vit, blocks)
            trial.fit(model, steps, peak_lr=5e-4, batch_size=batch, seed=seed)
            found.append(trial.accuracy(model=model))
        yield {
            "network": name,
            "operations": operations(model, size) / whole,
            "steps": steps,
            "seeds": seeds,
            "accuracy": mean(found),
            "lowest": min(found),
            "highest": max(found),
            "whole": trial.accuracy(),
        }


def first(vit: Any, blocks: int) -> Any:
    """A copy of a timm ViT with its first ``blocks`` blocks."""
    short = copy.deepcopy(vit)
    del short.blocks[blocks:]
    return short
