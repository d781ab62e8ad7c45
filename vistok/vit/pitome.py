"""PiToMe: tokens in a crowd merge, tokens that stand alone are protected.

What: between attention and MLP of every block each token gets an energy, the mean over all tokens of a kinked function
of the cosine of their keys: high in the middle of a large cluster, low for an isolated token. The 2 r tokens of highest
energy are split by alternate rank; each of the one half merges into the most similar of the other, as a mean weighted
by size. The rest stays as it is. ToMe splits by place instead, and may merge whatever it likes. Source: Tran et al.,
arXiv 2405.16148, hchautran/PiToMe. Where: every block, off the shelf.

Departures: slots lie in raster order of the patches they stand at (released: by falling energy, which rotary positions
and maps do not survive). ``parity="authors"`` gives two things of the released code that the paper does not have: the
energy's upper branch is s - m, not s (an ELU), and the first half of the blocks protects no token: all are split by
alternate rank, and the r most similar pairs merge. The released patches give their sizes to attention by choice only:
``proportional=False`` for those that do not. The variant for text encoders (a Gaussian energy) is left out: no text
goes through the models here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vistok.catalogue.card import Card, Outcome, ViTTrial
from vistok.core.merge import soft_matching
from vistok.core.tensors import ranking, take, unit
from vistok.host.keep import Keep, check_keep
from vistok.host.vit import Stage, TokenState, ViTEvidence, ViTReducer

CARD = Card(
    title="Accelerating Transformers with Spectrum-Preserving Token Merging (PiToMe)",
    kind="training-free",
    site="between attention and MLP of every encoder block",
    paper="Tran et al., 2024, arXiv 2405.16148",
    repository="hchautran/PiToMe",
    mechanism=("similarity",),
    needs=("keys of the block, mean over heads", "an additive mask row for attention in proportion to size"),
    score="energy: how crowded the neighbourhood of a token's key is",
    allocate="the same share of the tokens at every block",
    select="the 2 r of highest energy, split by alternate rank",
    merge="mean weighted by size, into the most similar",
    claim="Off the shelf it loses less accuracy than ToMe at as many tokens in every block.",
    departures=(
        "the energy's upper branch is not shifted by the margin",
        "tokens are protected in the first half of the blocks too",
    ),
)


@dataclass(frozen=True)
class PiToMe(ViTReducer):
    """Merging by energy in every block."""

    ratio: float = 0.9
    """Share of the tokens that each block leaves, 0.5 to 1; the number that merge away is rounded down."""
    keep: Keep | None = None
    """Instead of ``ratio``: the share of the patches, or their number, to be left at the end, by equal steps."""
    margin: float = 0.9
    """Cosine from which tokens count as alike in the first block; it falls in proportion to depth, towards 0.
    Released: 0.9 for MAE, AugReg and BLIP, 0.95 for CLIP, 0.75 for DeiT."""
    alpha: float = 1.0
    """How much tokens below the margin count against one another."""
    proportional: bool = True
    """Whether merged tokens attend in proportion to their size."""
    parity: Literal["paper", "authors"] = "paper"
    """"authors": energy and first half of the blocks as in the released code for DeiT."""

    def __post_init__(self) -> None:
        if not 0.5 <= self.ratio <= 1:
            raise ValueError(f"ratio: got {self.ratio!r}, must be between 0.5 and 1: a token in two can merge away")
        if self.keep is not None:
            check_keep(self.keep)
        if not -1 <= self.margin <= 1:
            raise ValueError(f"margin: got {self.margin!r}, must be a cosine, between -1 and 1")
        if not self.alpha >= 0:
            raise ValueError(f"alpha: got {self.alpha!r}, must be 0 or more")
        if self.parity not in ("paper", "authors"):
            raise ValueError(f"parity: got {self.parity!r}, must be 'paper' or 'authors'")

    def count(self, tokens: int, stage: Stage) -> int:
        if self.keep is not None:
            return stage.by_equal_steps(self.keep, tokens)
        return tokens - math.floor(tokens - tokens * self.ratio)

    def reduce(self, state: TokenState, evidence: ViTEvidence, count: int) -> TokenState:
        stage, r, keys = evidence.stage, state.num_slots - count, evidence.keys[:, state.prefix :]
        margin = self.margin * (1 - stage.layer / stage.depth)
        by_energy = ranking(energy(keys, margin, self.alpha, self.parity))
        split_all = self.parity == "authors" and stage.layer < stage.depth // 2
        free = by_energy if split_all else by_energy[:, : 2 * r]
        even, into = soft_matching(take(keys, free), r)
        free = free + state.prefix
        return state.merge_pairs(take(free, even[:, :r]), take(free, into))


@torch.no_grad()
def energy(
    keys: Tensor, margin: float, alpha: float = 1.0, parity: Literal["paper", "authors"] = "paper", block: int = 256
) -> Tensor:
    """(B, K): mean over all tokens of f(s), s their cosine to ``keys`` (B, K, d); high in a crowd.

    f(s) is s from ``margin`` m upwards, or s - m (parity "authors"), and alpha (exp(s - m) - 1) below it. Worked out
    for ``block`` tokens at a time: memory O(B block K).
    """
    rows = unit(keys)
    sums = []
    for part in rows.split(block, 1):
        over = torch.bmm(part, rows.transpose(1, 2)).sub_(margin)
        # Sums of plain passes: on a CPU these take less than half of the time of ``elu`` and of counting booleans.
        below = over.clamp_max(0).exp_().sum(2) - over.shape[2]
        above = over.clamp_min(0).sum(2)
        if parity == "paper":
            above += margin * over.ge_(0).sum(2)
        sums.append(above + alpha * below)
    return torch.cat(sums, 1) / keys.shape[1]


def claim(trial: ViTTrial) -> Outcome:
    """The abstract: 0.5% of accuracy lost against 2.6% (ViT-H of MAE, off the shelf). Twelve of 144 patches are left.

    That is half of the tokens on average; ToMe has as many in every block.
    """
    tome = trial.accuracy("tome", 12)
    merged = trial.accuracy(PiToMe(keep=12))
    return Outcome(
        "accuracy with half of the operations, against ToMe", baseline=tome, value=merged, holds=merged > tome
    )
