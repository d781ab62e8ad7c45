"""vistok-vit-place: descriptors by which a place is found again from another point of view; begins as vistok-vit."""

from __future__ import annotations

from typing import Any

from ..vit import load_vit
from ..vit_tasks import Places
from ..vit_training import Pace, ViTRecipe


def build() -> Any:
    """The shipped vistok-vit without a head."""
    model = load_vit("vistok-vit", device="cpu")
    model.reset_classifier(0)
    return model


RECIPE = ViTRecipe(
    name="vistok-vit-place",
    task=Places(),
    pace=Pace(steps=300, batch_size=64, peak_lr=5e-4, warmup=20),
    build=build,
    about="Its patches, pooled by generalised mean, describe a place, so that another view of it is found by them.",
    held_out=1000,
)
