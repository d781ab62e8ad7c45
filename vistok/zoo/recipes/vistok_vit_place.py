"""vistok-vit-place: descriptors by which a place is found again from another point of view; begins as vistok-vit."""

from __future__ import annotations

from functools import partial

from ..vit import begun_as_classifier
from ..vit_tasks import Places
from ..vit_training import Pace, ViTRecipe

RECIPE = ViTRecipe(
    name="vistok-vit-place",
    task=Places(),
    pace=Pace(steps=300, batch_size=64, peak_lr=5e-4, warmup=20),
    build=partial(begun_as_classifier, 0),
    about="Its patches, pooled by generalised mean, describe a place, so that another view of it is found by them.",
    held_out=1000,
)
