"""vq-grid-tiny: one token a patch, the plain baseline of the other tokenizers."""

from __future__ import annotations

from ..visual_tokenizers import TokenizerRecipe
from ..vit_training import Pace

RECIPE = TokenizerRecipe(
    name="vq-grid-tiny",
    system="vq-grid",
    hyper=dict(size="T", image=64, patch=8, codes=1024, dim=8),
    pace=Pace(steps=1200, batch_size=16, peak_lr=2e-3, warmup=60),
    about="A code for each of 8 x 8 patches; restart keeps the codebook in use.",
)
