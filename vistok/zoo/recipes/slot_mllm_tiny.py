"""slot-mllm-tiny: 8 slots that compete for the patches."""

from __future__ import annotations

from ..visual_tokenizers import SEEING, TokenizerRecipe, sight
from ..vit_training import Pace

RECIPE = TokenizerRecipe(
    name="slot-mllm-tiny",
    system="slot-mllm",
    hyper=dict(
        **SEEING,
        tokens=8,
        codes=256,
        depth=4,
        dim=16,
        image=32,
        features=64,
        reader=(64, 4, 2),
        decode_depth=1,
        vector=64,
        patch=4,
        drawn=(64, 2, 2),
        steps=8,
    ),
    pace=Pace(steps=600, batch_size=16, peak_lr=2e-3, warmup=40),
    about="Each slot takes a share of the patches of vistok-vit; a flow draws the picture from them (Slot-MLLM).",
    given=lambda: {"vision": sight()},
)
