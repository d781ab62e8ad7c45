"""tokenflow-tiny: one id a place and scale for meaning and pixels both."""

from __future__ import annotations

from ..visual_tokenizers import SEEING, TokenizerRecipe, sight
from ..vit_training import Pace

RECIPE = TokenizerRecipe(
    name="tokenflow-tiny",
    system="tokenflow",
    hyper=dict(
        **SEEING,
        image=48,
        codes=512,
        semantic_dim=8,
        pixel_dim=8,
        scales=(1, 2, 4, 8, 12),
        drop=0.0,
        feature_depth=1,
        width=16,
        mults=(1, 2, 3),
        blocks=1,
        latent=48,
        decoder=(12, 1),
    ),
    pace=Pace(steps=300, batch_size=16, peak_lr=2e-3, warmup=40),
    about="Semantic and pixel codebooks share their ids; the semantic side reads vistok-vit (TokenFlow).",
    given=lambda: {"vision": sight()},
)
