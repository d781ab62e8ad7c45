"""DynamicViT's learnt choice against EViT's attention and a random choice, each fine-tuned at equal tokens."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean
from typing import Any

import torch

from vistok.bench.vit_trial import ViTTrial
from vistok.vit.dynamicvit import DynamicViT, train
from vistok.vit.evit import EViT
from vistok.vit.random_drop import RandomDrop

TITLE = "DynamicViT against EViT and random, at equal tokens and steps"


def study(trial: ViTTrial, quick: bool = False) -> Iterator[dict[str, Any]]:
    """Accuracy over the seeds, half of the tokens left at each of three steps; EViT's fused token is counted.

    DynamicViT chooses before the block in whose middle the others choose, and learns from the classifier besides. Its
    predictors are new: half of its steps go to them alone (``train``).
    """
    steps, batch, seeds = (2, 4, 1) if quick else (100, 32, 2)
    vit = trial.classifier
    patches, system = vit.patch_embed.num_patches, DynamicViT(keep=0.5)
    layers = system.method(vit).layers
    counts = [int(patches * 0.5**step) for step in (1, 2, 3)]
    evit = [EViT(count - 1, layers=(layer,)) for count, layer in zip(counts, layers, strict=True)]
    chance = [RandomDrop(count, layers=(layer,), seed=None) for count, layer in zip(counts, layers, strict=True)]
    for name, methods in (("DynamicViT", None), ("EViT", evit), ("random", chance)):
        found = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = system.build(vit) if methods is None else trial.fresh()
            if methods is None:
                train(trial, system, model, steps, batch_size=batch, seed=seed)
                found.append(trial.accuracy(model=model))
            else:
                trial.fit(model, steps, method=methods, batch_size=batch, seed=seed)
                found.append(trial.accuracy(methods, model=model))
        yield {
            "choice": name,
            "tokens": counts[-1],
            "of": patches,
            "steps": steps,
            "seeds": seeds,
            "accuracy": mean(found),
            "lowest": min(found),
            "highest": max(found),
            "plain": trial.accuracy(),
        }
