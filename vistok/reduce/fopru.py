"""FoPru: keep the most significant visual tokens by encoder attention, one by one or in whole rows of the picture.

What: significance is the attention that a token receives (mean over queries) or gives (mean over keys), whichever
varies more over the picture. "rank" keeps the best tokens; "row" keeps the image rows of largest summed significance,
so that lines of text stay whole. Source: Jiang et al., arXiv 2411.14164; no code was released. Where: between the
encoder and the language model, once; a picture that was cut is reduced part by part.

Departures: the paper does not say how it chooses between received and given attention; the rule of larger variance is
that of two public re-implementations. The budget is exact: where ``keep`` is no multiple of the row's width, the best
tokens of the next row fill it (the paper keeps floor(ratio * rows) rows, at least one).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core.select import rows, topk
from vistok.host.recipe import Recipe, SlotNeeds
from vistok.host.reducer import Evidence

CARD = Card(
    title="FoPru: Focal Pruning for Efficient Large Vision-Language Models",
    kind="training-free",
    site="projector output, before the language model",
    paper="Jiang et al., 2024, arXiv 2411.14164",
    mechanism=("attention",),
    needs=("attention that each token receives and gives at one encoder layer",),
    score="received or given attention, whichever varies more",
    select="top-k, or whole rows",
    claim="With 25% of the visual tokens accuracy stays within 1 point of the dense model's.",
)


@dataclass(frozen=True)
class FoPru(Recipe):
    """Top-k tokens or rows by the attention that they receive (or give)."""

    strategy: Literal["rank", "row"] = "rank"
    """The best tokens ("rank") or the best rows of the grid ("row")."""
    layer: int = -2
    """Encoder layer whose attention ranks the tokens."""

    def __post_init__(self) -> None:
        if self.strategy not in ("rank", "row"):
            raise ValueError(f"strategy: got {self.strategy!r}, must be 'rank' or 'row'")

    @property
    def slot_needs(self) -> SlotNeeds:
        return {"score": {"received_attention": self.layer, "given_attention": self.layer}}

    def scores(self, evidence: Evidence) -> Tensor:
        """(B, N) the one of the two vectors that varies more in that picture; received where they vary alike."""
        received, given = evidence.received_attention, evidence.given_attention
        varies_more = given.double().var(1, keepdim=True) > received.double().var(1, keepdim=True)
        return torch.where(varies_more, given, received)

    def pick(self, evidence: Evidence, scores: Tensor, keep: int) -> Tensor:
        if self.strategy == "rank":
            return topk(scores, keep)
        if evidence.grid is None:
            raise ValueError("strategy: 'row' needs the tokens of a whole grid; these were reduced before, use 'rank'")
        width = evidence.grid[1]
        best = rows(scores, evidence.grid, -(-keep // width))
        whole, last = best.split([keep // width * width, best.shape[1] - keep // width * width], 1)
        return torch.cat([whole, last.gather(1, topk(scores.gather(1, last), keep % width))], 1)


def claim(trial: Trial) -> Outcome:
    """As public summaries of the paper give it: at 25% within 1 point on several data sets."""
    dense = trial.accuracy(None)
    pruned = trial.accuracy(FoPru(), keep=0.25)
    return Outcome("accuracy with 25% of the tokens", baseline=dense, value=pruned, holds=pruned >= dense - 0.01)
