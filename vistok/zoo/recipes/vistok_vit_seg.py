"""vistok-vit-seg: which shape each pixel of a scene shows, by a linear head on every patch; begins as vistok-vit."""

from __future__ import annotations

from functools import partial

from ..vit import begun_as_classifier
from ..vit_tasks import Scenes
from ..vit_training import Pace, ViTRecipe

RECIPE = ViTRecipe(
    name="vistok-vit-seg",
    task=Scenes(),
    pace=Pace(steps=500, batch_size=32, peak_lr=1e-3, warmup=30),
    build=partial(begun_as_classifier, len(Scenes.classes)),
    about="It says which shape each pixel of a scene shows: its `head` reads every patch, and the logits are enlarged.",
    held_out=500,
)
