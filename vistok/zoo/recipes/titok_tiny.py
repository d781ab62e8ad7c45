"""titok-tiny: 64 tokens without a grid, learnt on pixels in one stage."""

from __future__ import annotations

from ..visual_tokenizers import TokenizerRecipe
from ..vit_training import Pace

RECIPE = TokenizerRecipe(
    name="titok-tiny",
    system="titok",
    hyper=dict(size="T", tokens=64, image=64, patch=8, codes=1024, dim=8),
    pace=Pace(steps=1200, batch_size=16, peak_lr=2e-3, warmup=60),
    about="Latent tokens read the picture by attention; any of them may look anywhere (TiTok).",
)
