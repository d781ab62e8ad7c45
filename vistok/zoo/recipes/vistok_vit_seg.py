"""vistok-vit-seg: which shape each pixel of a scene shows, by a linear head on every patch; begins as vistok-vit."""

from __future__ import annotations

from typing import Any

from ..vit import load_vit
from ..vit_tasks import Scenes
from ..vit_training import Pace, ViTRecipe


def build() -> Any:
    """The shipped vistok-vit with another head."""
    model = load_vit("vistok-vit", device="cpu")
    model.reset_classifier(len(Scenes.classes))
    return model


RECIPE = ViTRecipe(
    name="vistok-vit-seg",
    task=Scenes(),
    pace=Pace(steps=500, batch_size=32, peak_lr=1e-3, warmup=30),
    build=build,
    about="It says which shape each pixel of a scene shows: its `head` reads every patch, and the logits are enlarged.",
    held_out=500,
)
