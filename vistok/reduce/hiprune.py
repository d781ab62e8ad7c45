"""HiPrune: a few object tokens with their neighbours from a middle encoder layer, the rest from a deep one.

What: middle layers of a vision encoder look at objects, deep ones hold global context. Both layers score a token by the
attention it receives. *Anchors* are the best tokens of the middle layer, *buffers* their neighbours on the grid,
*registers* the best remaining tokens of the deep layer. No class token is needed. Source: Liu et al., arXiv 2508.00553,
Danielement321/HiPrune. Where: between the encoder and the language model, once; a picture that was cut is reduced part
by part. For Qwen2.5-VL the authors use layer 16 of 32 and the last, ``HiPrune(object_layer=15, layer=-1)``: two of the
few that attend to the whole picture (scores of windowed layers compare only inside a window).

Departures: neighbours end at the border of the grid. Those of the released code run over into the next row and are
clamped to the first and last token: ``parity="authors"``. Where a tiny budget cannot hold the anchors and all their
buffers, anchors go first (the released code fails there).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core.position import grid_neighbours
from vistok.core.select import topk
from vistok.host.recipe import Recipe, SlotNeeds
from vistok.host.reducer import Evidence

CARD = Card(
    title="HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models",
    kind="training-free",
    site="projector output, before the language model",
    paper="Liu et al., 2025, arXiv 2508.00553",
    repository="Danielement321/HiPrune",
    mechanism=("attention",),
    needs=("attention that each token receives at a middle and at a deep encoder layer",),
    score="received attention, middle layer for anchors, deep layer for the rest",
    allocate="a fifth of alpha * keep anchors, their neighbours as buffers, the rest registers",
    select="top-k, grid neighbours, top-k",
    claim="Keeps 99.3% of the dense accuracy with 33.3% of the visual tokens.",
    departures=("neighbours of a token at the border do not wrap into the next row",),
)


@dataclass(frozen=True)
class HiPrune(Recipe):
    """Anchors, buffers and registers."""

    alpha: float = 0.1
    """Share of the budget, in [0, 1], for anchors and buffers; 0 is top-k at the deep layer."""
    object_layer: int | float = 9 / 24
    """Middle encoder layer, as an index or a share of the depth (layer 9 of CLIP-L's 24, counted from 1)."""
    layer: int = -2
    """Deep encoder layer."""
    parity: Literal["paper", "authors"] = "paper"
    """"authors": neighbours wrap over the grid's border as in the released code."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: got {self.alpha}, must be between 0 and 1")
        if self.parity not in ("paper", "authors"):
            raise ValueError(f"parity: got {self.parity!r}, must be 'paper' or 'authors'")

    @property
    def slot_needs(self) -> SlotNeeds:
        layers = {"received_attention": (self.object_layer, self.layer)}
        return {"score": layers, "select": layers}

    def scores(self, evidence: Evidence) -> Tensor:
        _, deep = evidence.received_attention
        return deep

    def pick(self, evidence: Evidence, scores: Tensor, keep: int) -> Tensor:
        if evidence.grid is None:
            raise ValueError("evidence: HiPrune needs the tokens of a whole grid; these were reduced before")
        middle, _ = evidence.received_attention
        anchors = topk(middle, round(keep * self.alpha / 5))
        buffers = grid_neighbours(anchors, evidence.grid, wrap=self.parity == "authors")
        first = scores.masked_fill(buffers, torch.finfo(scores.dtype).max).scatter(1, anchors, torch.inf)
        return topk(first, keep)


def claim(trial: Trial) -> Outcome:
    """The abstract: up to 99.3% of the task accuracy with 33.3% of the tokens."""
    dense = trial.accuracy(None)
    pruned = trial.accuracy(HiPrune(), keep=1 / 3)
    return Outcome("accuracy with 1/3 of the tokens", baseline=dense, value=pruned, holds=pruned >= 0.993 * dense)
