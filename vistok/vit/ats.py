"""ATS: sample tokens by what they give the class token, instead of taking the best.

What: a token's significance is the class token's attention to it times the length of its values, summed over heads and
scaled to sum 1. Points at even steps on the axis of its cumulative sum pick tokens (inverse transform sampling): a
significant token surely, of many less significant neighbours every so many. A token that several points pick stays
once, so the number that stays depends on the picture. Parameter-free; gradients flow as through any gather. Source:
Fayyaz et al., arXiv 2111.15667, adaptivetokensampling/ATS. Where: between attention and MLP of the chosen blocks
(released: 3 to 11 of 12), with the values that come of computing attention's sampled rows only.

Departures. A batch has one number of tokens, so by default ``keep`` sets it, and the points are as many as it takes for
so many *different* tokens: level-filled shares min(1, level * significance), which sum to the count, are sampled at
1/2, 3/2, ... That is the paper's sampling, with as many points as tokens, wherever no token would be picked twice.
``samples`` gives the paper's own, with a number by picture: alone a picture keeps exactly those sampled; in a batch all
keep as many as the one with the most, filled up by the most significant others (released: by zeros and masks). A
cumulative sum is inverted exactly (paper and code: the token whose sum is nearest, which may be the neighbour of the
one that a point lies in). ``parity="authors"``: attention summed over heads times the length of all heads' values,
tokens in rising order of that, and (with ``samples``) their points and their nearest sum. A model without a class token
is scored by the attention that each patch receives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vistok.catalogue.card import Card, Outcome, ViTTrial
from vistok.core.allocate import level_quotas
from vistok.core.select import topk
from vistok.core.tensors import length, take
from vistok.host.keep import Keep
from vistok.host.vit import KeepRate, Stage, TokenState, ViTEvidence

CARD = Card(
    title="Adaptive Token Sampling for Efficient Vision Transformers (ATS)",
    kind="training-free",
    site="between attention and MLP of chosen encoder blocks",
    paper="Fayyaz et al., 2022, arXiv 2111.15667",
    repository="adaptivetokensampling/ATS",
    mechanism=("attention",),
    needs=("class-token attention of the block (received attention where there is no class token)", "its values"),
    score="class-token attention times the length of the values, summed over heads",
    allocate="the same share at each chosen block, or by picture",
    select="inverse transform sampling at even steps",
    claim="Sampling keeps more accuracy than the top-k of as many tokens.",
    departures=("a sampled token is the one that a point lies in, not its neighbour",),
)


@dataclass(frozen=True)
class ATS(KeepRate):
    """Inverse transform sampling of tokens, at several blocks."""

    keep: Keep = 0.7
    """Share of the patches that stay at each block (rounded up), or their number."""
    layers: tuple[int, ...] | None = None
    """Blocks, from 0; by default those after each quarter of the depth."""
    samples: int | None = None
    """In place of ``keep``: points at each block, of which the different tokens stay, 2 or more (the released code has
    as many as patches). The number then depends on the picture, ``plan`` gives bounds, and it does not compile."""
    parity: Literal["paper", "authors"] = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples is not None and (not isinstance(self.samples, int) or self.samples < 2):
            raise ValueError(f"samples: got {self.samples!r}, must be a number of points, 2 or more")
        if self.parity not in ("paper", "authors"):
            raise ValueError(f"parity: got {self.parity!r}, must be 'paper' or 'authors'")

    def count(self, tokens: int, stage: Stage) -> int:
        if self.samples is None:
            return super().count(tokens, stage)
        return max(1, min(self.samples, tokens - 1))

    def reduce(self, state: TokenState, evidence: ViTEvidence, count: int) -> TokenState:
        with torch.no_grad():
            score = significance(evidence, self.parity)
            along = score.argsort(dim=1, stable=True) if self.parity == "authors" else None
            share = score if along is None else take(score, along)
            if self.samples is None:
                want = torch.full_like(share[:, 0], count, dtype=torch.int64)
                room = torch.ones_like(share, dtype=torch.int64)
                hit = _steps(level_quotas(share, want, room))
            else:
                hit = _steps(share * self.samples) if along is None else _nearest(share, self.samples)
                count = int(hit.sum(1).max())
            if along is not None:
                hit = torch.zeros_like(hit).scatter(1, along, hit)
            index = topk(score + 2.0 * hit, count)  # sampled ones before all others: no score is above 1
        return state.keep(index)


def significance(evidence: ViTEvidence, parity: Literal["paper", "authors"] = "paper") -> Tensor:
    """(B, K) float64, sum 1: attention of the class token times the length of the values, summed over heads.

    "authors": summed attention times the length of the values of all heads together.
    """
    row, values = evidence.class_row, evidence.values[:, :, evidence.prefix :]
    if parity == "authors":
        score = row.sum(1) * length(values.transpose(1, 2).flatten(2))
    else:
        score = (row * length(values).repeat_interleave(row.shape[1] // values.shape[1], 1)).sum(1)
    score = score.double() + torch.finfo(torch.float32).tiny
    return score / score.sum(1, keepdim=True)


def _steps(lengths: Tensor) -> Tensor:
    """(B, K) bool: which of the pieces of ``lengths`` (B, K), end to end, one of the points 1/2, 3/2, ... lies in."""
    passed = (lengths.cumsum(1) + 0.5).floor()
    return torch.diff(passed, dim=1, prepend=torch.zeros_like(passed[:, :1])) > 0


def _nearest(share: Tensor, samples: int) -> Tensor:
    """(B, K) bool, as released: the tokens whose cumulative ``share`` (B, K), rising, is nearest to one of the points.

    The sum is scaled to 0 for the first token and 1 for the last; the points go from its smallest value above 0 to 1.
    """
    total = share.cumsum(1)
    total = (total - total[:, :1]) / (total[:, -1:] - total[:, :1]).clamp_min(torch.finfo(total.dtype).tiny)
    start = total.masked_fill(total <= 0, torch.inf).amin(1, keepdim=True).clamp_max(1)
    points = start + (1 - start) * torch.linspace(0, 1, samples, device=share.device, dtype=share.dtype)
    after = torch.searchsorted(total, points).clamp(1, max(share.shape[1] - 1, 1))
    nearer = points - total.gather(1, after - 1) <= total.gather(1, after) - points
    return torch.zeros_like(share, dtype=torch.bool).scatter(1, after - nearer.long(), True)


def claim(trial: ViTTrial) -> Outcome:
    """The paper's ablation behind its abstract's "preserving the accuracy": sampling is better than taking the best.

    Off the shelf, 50% of the patches at each of three blocks.
    """
    best = trial.accuracy("topk", 0.5)
    sampled = trial.accuracy(ATS(keep=0.5))
    return Outcome("accuracy at keep rate 0.5, against top-k", baseline=best, value=sampled, holds=sampled > best)
