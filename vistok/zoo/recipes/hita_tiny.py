"""hita-tiny: 16 holistic tokens, then a token a patch."""

from __future__ import annotations

from ..visual_tokenizers import TokenizerRecipe
from ..vit_training import Pace

RECIPE = TokenizerRecipe(
    name="hita-tiny",
    system="hita",
    hyper=dict(
        image=32,
        width=20,
        mults=(1, 1, 2),
        blocks=1,
        dim=96,
        depth=2,
        heads=3,
        mlp=384,
        dropout=0.0,
        carriers=16,
        codes=512,
        carrier_dim=8,
        patch_dim=8,
        vision="",
    ),
    pace=Pace(steps=700, batch_size=16, peak_lr=2e-3, warmup=40),
    about="Holistic tokens stand in front of the patches, and both are causal (Hita, without a vision model).",
)
