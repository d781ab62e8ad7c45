"""vistok-vit: a classifier of one object over clutter, the class token read by the head, as ViT and DeiT do it.

144 patches and a class token, twelve blocks. Every patch's class is learned along (token labelling), in training only.
"""

from __future__ import annotations

from functools import partial

from ..vit import build_vit
from ..vit_tasks import Objects
from ..vit_training import Pace, ViTRecipe

RECIPE = ViTRecipe(
    name="vistok-vit",
    task=Objects(),
    pace=Pace(steps=5000, batch_size=32, peak_lr=2e-3, warmup=100, sparse=2000),
    build=partial(build_vit, len(Objects.classes)),
    about="It says which of 18 objects, handwritten digits and drawn shapes, lies on clutter and covers 10 to 30%.",
)
