"""one-d-piece-tiny: 64 tokens of which any beginning decodes."""

from __future__ import annotations

from ..visual_tokenizers import TokenizerRecipe
from ..vit_training import Pace

RECIPE = TokenizerRecipe(
    name="one-d-piece-tiny",
    system="one-d-piece",
    hyper=dict(size="T", tokens=64, image=64, patch=8, codes=1024, dim=8, per="sample"),
    pace=Pace(steps=1200, batch_size=16, peak_lr=2e-3, warmup=60),
    about="Training cuts the tail, so that the first tokens hold what counts most (One-D-Piece).",
)
