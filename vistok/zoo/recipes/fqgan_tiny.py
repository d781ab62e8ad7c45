"""fqgan-tiny: two small books on one map, one of which learns to tell what is seen."""

from __future__ import annotations

from ..visual_tokenizers import TokenizerRecipe, sight
from ..vit_training import Pace

RECIPE = TokenizerRecipe(
    name="fqgan-tiny",
    system="fqgan",
    hyper=dict(
        codes=256,
        dim=4,
        image=32,
        teacher_dims=(96,),
        width=20,
        mults=(1, 2, 4),
        blocks=1,
        adapter_width=96,
        adapter_depth=1,
        latent=48,
        reader=(96, 1),
        heads=3,
    ),
    pace=Pace(steps=600, batch_size=16, peak_lr=2e-3, warmup=40),
    about="Two books of 256 codes a place; the first learns the features of vistok-vit (FQGAN).",
    given=lambda: {"teachers": [sight(prefix=True)]},
)
