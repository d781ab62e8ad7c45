"""The same small network on a grid (64 tokens of 32 px pictures) with one bottleneck after another, equal steps and
pictures, codes of 8 channels where the bottleneck leaves a choice: which codebooks collapse as they grow. Usage: share
of the codes that held-out pictures use; perplexity: of the same counts, over books their product. Product: two books of
the root of the codes each; FSQ: the levels nearest to the size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch

from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.core.quantize import count_ids, perplexity
from vistok.parts.quantize import (
    FSQ,
    LFQ,
    Bottleneck,
    EMAQuantizer,
    IBQuantizer,
    Product,
    SimVQuantizer,
    VectorQuantizer,
)
from vistok.tokenize.vq_grid import VQGrid


def _factors(codes: int) -> tuple[int, int]:
    """Two powers of two, as alike as can be, whose product is ``codes``."""
    half = 2 ** (int(math.log2(codes)) // 2)
    return half, codes // half


TITLE = "Collapse: how much of a codebook is used"
SIZES = (512, 4096)
DIM = 8
FSQ_LEVELS = {512: (8, 8, 8), 4096: (7, 5, 5, 5, 5)}
BOTTLENECKS: dict[str, Callable[[int], Bottleneck]] = {
    "VQ": lambda k: VectorQuantizer(k, DIM, restart_after=None),
    "VQ, unit length": lambda k: VectorQuantizer(k, DIM, norm="both", restart_after=None),
    "VQ, restart": lambda k: VectorQuantizer(k, DIM, restart_after=20),
    "VQ, unit length, restart": lambda k: VectorQuantizer(k, DIM, norm="both", restart_after=20),
    "VQ, rotation": lambda k: VectorQuantizer(k, DIM, gradient="rotation", restart_after=None),
    "EMA": lambda k: EMAQuantizer(k, DIM, restart_after=None),
    "SimVQ": lambda k: SimVQuantizer(k, DIM),
    "IBQ": lambda k: IBQuantizer(k, DIM, restart_after=None),
    "product": lambda k: Product([VectorQuantizer(n, DIM // 2, norm="both", restart_after=20) for n in _factors(k)]),
    "FSQ": lambda k: FSQ(FSQ_LEVELS[k]),
    "LFQ": lambda k: LFQ(int(math.log2(k))),
}


def study(trial: TokenizeTrial, quick: bool = False) -> Iterator[dict[str, Any]]:
    """A row for each bottleneck and size."""
    steps, sizes = (2, SIZES[:1]) if quick else (150, SIZES)
    for (name, build), size in product(BOTTLENECKS.items(), sizes):
        torch.manual_seed(trial.seed)
        bottleneck = build(size)
        model = VQGrid("T", trial.size, trial.size // 8).build(bottleneck)
        trial.fit(model, steps)
        with torch.no_grad():
            ids = torch.cat([model.encode(real).ids for real, _ in trial.held_out()])
        columns = (ids if ids.dim() == 3 else ids[..., None]).unbind(-1)
        each = [float(perplexity(count_ids(c, n))) for c, n in zip(columns, bottleneck.sizes, strict=True)]
        yield {
            "bottleneck": name,
            "codes": math.prod(bottleneck.sizes),
            "steps": steps,
            "usage": trial.usage(model),
            "perplexity": math.prod(each),
            "PSNR_dB": trial.psnr(model),
        }
