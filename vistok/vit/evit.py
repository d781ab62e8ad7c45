"""EViT: keep the patches that the class token attends to, and fuse the others into one token.

What: in a few blocks, between attention and MLP, the patches of largest class-token attention stay and one token takes
the rest in: their sum weighted by that attention (not divided by its sum, so it is as small as their share). No
parameters, no extra loss: a ViT is trained, or fine-tuned, with it. Source: Liang et al., arXiv 2202.07800,
youweiliang/evit. Where: blocks 4, 7 and 10 of 12.

Departures: kept patches stay in raster order before the fused token (``order="author"``: by falling score, as
released; the model does not see the difference). The released code takes a distillation token for a patch; here
prefix tokens are never chosen from. Attention dropout does not reach the scores. A model without a class token is
ranked, and its fused token weighted, by the attention that each patch receives. The fused token's place, for rotary
positions, is that of the best patch in it.

Training with a schedule, one short ``with`` a step:

    rate = KeepRateSchedule(base=0.7)
    for step, (pixels, labels) in enumerate(loader):
        with vistok.apply(model, EViT(keep=rate(step / len(loader)))):
            loss = criterion(model(pixels), labels)
            loss.backward()
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vistok.catalogue.card import Card, Outcome, ViTTrial
from vistok.core.position import order, rest
from vistok.core.select import topk
from vistok.core.tensors import take
from vistok.host.keep import Keep
from vistok.host.vit import KeepRate, TokenState, ViTEvidence

CARD = Card(
    title="Not All Patches are What You Need: Expediting ViTs via Token Reorganizations (EViT)",
    kind="trained",
    site="between attention and MLP of chosen encoder blocks",
    paper="Liang et al., 2022, arXiv 2202.07800",
    repository="youweiliang/evit",
    mechanism=("attention",),
    needs=("class-token attention of the block (received attention where there is no class token)",),
    score="class-token attention, mean over heads",
    allocate="the same share at each chosen block",
    select="top-k",
    merge="one token, the sum of the others weighted by their scores",
    claim="Keeps the accuracy to within 0.3 percentage points at keep rate 0.7 (DeiT-S: 50% faster).",
    departures=("the distillation token is not taken for a patch",),
)


@dataclass(frozen=True)
class KeepRateSchedule:
    """The keep rate in training: 1 until ``start``, then down to ``base`` along half a cosine of ``length`` epochs."""

    base: float = 0.7
    start: float = 10
    """Epoch at which it begins to fall; before it the rate is 1."""
    length: float = 100
    """Epochs until it is ``base``."""
    maximum: float = 1.0
    """Where the fall begins."""

    def __call__(self, epoch: float) -> float:
        """The rate at ``epoch``, counted from 0, with fractions."""
        if epoch < self.start:
            return 1.0
        done = min((epoch - self.start) / self.length, 1.0) if self.length else 1.0
        return self.base + (self.maximum - self.base) * (math.cos(math.pi * done) + 1) / 2


def reorganize(
    state: TokenState, score: Tensor, count: int, fuse: bool = True, policy: Literal["raster", "author"] = "raster"
) -> TokenState:
    """The ``count`` slots of largest ``score`` (B, K), and behind them, if ``fuse``, the sum of the others weighted by
    their scores, not normalised. Gradients reach the others through that sum only."""
    index = order(topk(score, count), policy)
    if not fuse:
        return state.keep(index, policy)
    others = rest(index, state.num_slots)
    weight = take(score, others)
    fused = torch.bmm(weight[:, None].to(state.x.dtype), take(state.slots, others))
    into = torch.full_like(state.anchor, count)
    into = into.scatter(1, index, torch.arange(count, device=index.device).expand_as(index))
    best = others.gather(1, weight.argmax(1, keepdim=True))
    return state.regroup(torch.cat([take(state.slots, index), fused], 1), into, torch.cat([index, best], 1))


@dataclass(frozen=True)
class EViT(KeepRate):
    """Attentive patches stay, the others become one token, at several blocks."""

    keep: Keep = 0.7
    """Share of the tokens that stay at each block, an earlier fused one counted (rounded up), or their number."""
    layers: tuple[int, ...] | None = None
    """Blocks, from 0; None: after each quarter of the depth, which is the paper's 3, 6, 9 of 12."""
    fuse: bool = True
    """Whether the others become a token; they are dropped otherwise."""
    order: Literal["raster", "author"] = "raster"
    """Of the kept tokens: as they lie on the picture, or by falling score."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ("raster", "author"):
            raise ValueError(f"order: got {self.order!r}, must be 'raster' or 'author'")

    @property
    def extra(self) -> int:
        return int(self.fuse)

    def reduce(self, state: TokenState, evidence: ViTEvidence, count: int) -> TokenState:
        return reorganize(state, evidence.class_row.mean(1), count, self.fuse, self.order)


def claim(trial: ViTTrial) -> Outcome:
    """The abstract: DeiT-S 50% faster for 0.3% of accuracy. Here the zoo's classifier, not trained with it."""
    dense = trial.accuracy()
    reduced = trial.accuracy(EViT())
    return Outcome("accuracy at keep rate 0.7", baseline=dense, value=reduced, holds=reduced >= dense - 0.003)
