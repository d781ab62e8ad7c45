"""Random patches: the control that a method which claims to know what matters has to beat.

What: a uniformly random choice without replacement at a few blocks. With a ``seed`` it depends on that, the block and
the number of tokens only, so that a picture is reduced alike alone and in any batch; without one each picture and each
pass draws anew, which is what training wants (patch dropout in mid-model). Where: between attention and MLP of the
chosen blocks, as Top-k and EViT.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.catalogue.card import Card, Outcome, ViTTrial
from vistok.core.select import topk
from vistok.host.keep import Keep
from vistok.host.vit import KeepRate, TokenState, ViTEvidence

CARD = Card(
    title="Random patches inside the encoder (control)",
    kind="control",
    site="between attention and MLP of chosen encoder blocks",
    paper="",
    allocate="the same share at each chosen block",
    select="random, with a seed",
    claim="Its patches are of the object as often as any: the share of the picture, give or take 5 points.",
)


@dataclass(frozen=True)
class RandomDrop(KeepRate):
    """A random choice of patches, at several blocks."""

    keep: Keep = 0.7
    """Share of the patches that stay at each block (rounded up), or their number."""
    layers: tuple[int, ...] | None = None
    """Blocks, from 0; None: after each quarter of the depth, 3, 6, 9 of 12."""
    seed: int | None = 0
    """The same seed keeps the same places; None: drawn anew for each picture and pass, by torch's own generator."""

    def reduce(self, state: TokenState, evidence: ViTEvidence, count: int) -> TokenState:
        b, k, device = len(state.x), state.num_slots, state.x.device
        if self.seed is None:
            return state.keep(topk(torch.rand(b, k, device=device), count))
        places = torch.arange(k, device=device) + 1 + (self.seed * 4099 + evidence.stage.layer) * 65537
        return state.keep(topk(_scrambled(places)[None], count).expand(b, -1))


def _scrambled(x: Tensor) -> Tensor:
    """Whole numbers (int64) to numbers in 0..2**32-1 without visible order, different ones to different ones.

    Integer arithmetic only: alike on all devices, and ``torch.compile`` can trace it (a random generator it cannot).
    """
    for _ in range(2):
        x = ((x & 0xFFFFFFFF) ^ ((x & 0xFFFFFFFF) >> 16)) * 0x45D9F3B
    return (x & 0xFFFFFFFF) ^ ((x & 0xFFFFFFFF) >> 16)


def claim(trial: ViTTrial) -> Outcome:
    """Precision of the kept patches on the object's mask over five seeds, against the mask's share of all patches."""
    scores = [trial.mask_score(RandomDrop(keep=0.5, seed=seed)) for seed in range(5)]
    chance = scores[0].chance
    precision = sum(score.precision for score in scores) / 5
    near = abs(precision - chance) <= 0.05
    return Outcome("kept patches that are of the object", baseline=chance, value=precision, holds=near)
