"""flextok-tiny: 16 tokens of which any beginning is drawn, by a flow."""

from __future__ import annotations

from ..visual_tokenizers import TokenizerRecipe
from ..vit_training import Pace

RECIPE = TokenizerRecipe(
    name="flextok-tiny",
    system="flextok",
    hyper=dict(
        size="T",
        tokens=16,
        image=32,
        patch=4,
        levels=(8, 8, 5, 5),
        steps=8,
        guidance=1.5,
        teacher_dim=0,
        zero_init=False,
    ),
    pace=Pace(steps=1200, batch_size=16, peak_lr=2e-3, warmup=40),
    about="Registers are causal and their tail is masked in training; the decoder draws from noise (FlexTok).",
)
