"""Descriptors of places by ImAge's tokens against GeM and mean pooling of the same backbone, fine-tuned alike, under
small and large changes of viewpoint; with the tokens begun at clusters or as noise, and with one token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vistok.bench.vit_trial import ViTTrial
from vistok.vit.image_vpr import ImAge, PooledDescriptor, sample_features
from vistok.zoo.vit import to_pixels
from vistok.zoo.vit_tasks import Places

TITLE = "ImAge: implicit aggregation against pooling, under viewpoint change"


def study(trial: ViTTrial, quick: bool = False) -> Iterator[dict[str, Any]]:
    """Recall@1 where views differ by half and in full. All rows: the zoo's model for places, whose blocks from 8 on
    are trained for ``steps`` steps with the multi-similarity loss and its miner; equal views for equal ``seed``. Other
    beginnings and numbers of tokens are measured with one seed."""
    steps, batch, seeds = (2, 4, (0,)) if quick else (30, 32, (0, 1, 2))
    system, start = ImAge(), trial.fresh(Places()).eval()
    views = Places().draw(0, 8 if quick else 64, seed=0, size=trial.size).images
    features = sample_features(start, to_pixels(views, start))
    ways: dict[str, Callable[[], nn.Module]] = {
        "GeM": lambda: PooledDescriptor(start, system.insert_at, "gem"),
        "mean": lambda: PooledDescriptor(start, system.insert_at, "mean"),
        "ImAge, 8 tokens": lambda: system.build(start, features),
        "ImAge, 8 tokens begun as noise": lambda: system.build(start),
        "ImAge, 1 token": lambda: replace(system, n_tokens=1).build(start, features),
    }
    for way, build in ways.items():
        for seed in seeds[:1] if "noise" in way or "1 token" in way else seeds:
            torch.manual_seed(seed)
            model = build()
            trial.fit(model, steps, task=Places(), loss=system.loss, batch_size=batch, seed=seed)
            with torch.no_grad():
                width = model(to_pixels(views[:1], model)).shape[1]
            yield {
                "descriptor": way,
                "values": width,
                "steps": steps,
                "seed": seed,
                "recall@1, change 0.5": trial.recall(model=model, pooling="mean", change=0.5),
                "recall@1, change 1.0": trial.recall(model=model, pooling="mean", change=1.0),
            }
