"""Model cards of the small vision transformers: measured on held-out pictures, whole and with few tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vistok.host import apply

if TYPE_CHECKING:
    from .vit_training import ViTRecipe

KEEPS = (0.7, 0.5, 0.3)
MODEL_CARD = """\
---
library_name: timm
pipeline_tag: {tag}
license: apache-2.0
---
# {name}

A small {kind} ({parameters:.1f} M parameters, {grid}x{grid} patches at {size} px, {depth} blocks). {about}
`vistok train {name}` makes it again, with seed {seed}. This file is generated.

## On held-out pictures

{pictures} pictures (split `test`, seed 1): other photographs than in training, digits by other writers. *Random*: at
the first block a random choice of patches stays, the others are dropped (`random-drop`).

| tokens | {columns} |
|---|{rule}|
{rows}

## Recipe

{task}: {steps} steps of {batch} pictures, peak learning rate {lr:g}, {seen} pictures in all.
"""
_TAGS = {"objects": "image-classification", "scenes": "image-segmentation", "places": "image-feature-extraction"}


def evaluate_vit(recipe: ViTRecipe, model: Any, n: int, keep: float = 1.0) -> dict[str, float]:
    """The task's figures on n held-out pictures, with a random share ``keep`` of the patches after the first block."""
    if keep == 1:
        return recipe.task.score(model, n, size=recipe.image_size)
    restore = "nearest" if recipe.task.name == "scenes" else False
    with apply(model, "random-drop", keep=keep, layers=(0,), restore=restore):
        return recipe.task.score(model, n, size=recipe.image_size)


def write_vit_card(recipe: ViTRecipe, model: Any, folder: Path, *, pictures: int | None = None) -> Path:
    """Measure the model with all and with random shares of its tokens, and write ``folder/README.md``.

    ``pictures``: held-out pictures, by default as many as the recipe says.
    """
    n = recipe.held_out if pictures is None else pictures
    found = {"all": evaluate_vit(recipe, model, n)}
    found |= {f"random {keep:.0%}": evaluate_vit(recipe, model, n, keep) for keep in KEEPS}
    names = list(found["all"])
    rows = [f"| {row} | " + " | ".join(f"{got[name]:.1%}" for name in names) + " |" for row, got in found.items()]
    text = MODEL_CARD.format(
        tag=_TAGS[recipe.task.name],
        name=recipe.name,
        kind=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        grid=model.patch_embed.grid_size[0],
        size=recipe.image_size,
        depth=len(model.blocks),
        about=recipe.about,
        seed=recipe.seed,
        pictures=n,
        columns=" | ".join(names),
        rule="|".join("---:" for _ in names),
        rows="\n".join(rows),
        task=recipe.task.name,
        steps=recipe.steps,
        batch=recipe.pace.batch_size,
        lr=recipe.pace.peak_lr,
        seen=recipe.steps * recipe.pace.batch_size,
    )
    path = folder / "README.md"
    path.write_text(text, encoding="utf-8")
    return path
