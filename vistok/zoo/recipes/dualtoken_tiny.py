"""dualtoken-tiny: meaning and pixels as two stacks of residual codes."""

from __future__ import annotations

from ..visual_tokenizers import SEEING, TokenizerRecipe, sight
from ..vit_training import Pace

RECIPE = TokenizerRecipe(
    name="dualtoken-tiny",
    system="dualtoken",
    hyper=dict(
        **SEEING,
        image=48,
        layer_semantic=10,
        layer_pixel=4,
        layer_shortcut=2,
        depth=2,
        codes=256,
        dim=16,
        heads=6,
        latent=48,
        width=20,
        mults=(1, 2, 2),
        blocks=1,
    ),
    pace=Pace(steps=300, batch_size=16, peak_lr=2e-3, warmup=40),
    about="A deep layer of vistok-vit gives semantic codes, a shallow one those of pixels (DualToken).",
    given=lambda: {"vision": sight()},
)
