"""Top-k: at a few blocks, keep the patches that the class token attends to most, and drop the others.

What: the plainest pruning, which a study of ten reducers finds hard to beat. Source: Haurum et al., arXiv 2308.04657
("Which Tokens to Use?", where it is EViT without its fused token), JoakimHaurum/TokenReduction. Where: between
attention and MLP of the chosen blocks.

Departures: kept patches stay in raster order (there: by score; the model does not see the difference), distillation
token and registers are never dropped. Attention dropout does not reach the scores. A model without a class token is
ranked by the attention that each patch receives.
"""

from __future__ import annotations

from dataclasses import dataclass

from vistok.catalogue.card import Card, Outcome, ViTTrial
from vistok.core.select import topk
from vistok.host.keep import Keep
from vistok.host.vit import KeepRate, TokenState, ViTEvidence

CARD = Card(
    title="Which Tokens to Use? Investigating Token Reduction in Vision Transformers (its Top-K baseline)",
    kind="training-free",
    site="between attention and MLP of chosen encoder blocks",
    paper="Haurum et al., 2023, arXiv 2308.04657",
    repository="JoakimHaurum/TokenReduction",
    mechanism=("attention",),
    needs=("class-token attention of the block (received attention where there is no class token)",),
    score="class-token attention, mean over heads",
    allocate="the same share at each chosen block",
    select="top-k",
    claim="A surprisingly strong baseline: above a random choice of as many patches.",
)


@dataclass(frozen=True)
class TopK(KeepRate):
    """Top-k by class-token attention, at several blocks."""

    keep: Keep = 0.7
    """Share of the patches that stay at each block (rounded up), or their number."""
    layers: tuple[int, ...] | None = None
    """Blocks, from 0; None: after each quarter of the depth, 3, 6, 9 of 12."""

    def reduce(self, state: TokenState, evidence: ViTEvidence, count: int) -> TokenState:
        return state.keep(topk(evidence.class_row.mean(1), count))


def claim(trial: ViTTrial) -> Outcome:
    """The abstract's finding, against the control; off the shelf, 50% of the patches at each of three blocks."""
    chance = trial.accuracy("random-drop", 0.5)
    best = trial.accuracy(TopK(keep=0.5))
    return Outcome("accuracy at keep rate 0.5, against random", baseline=chance, value=best, holds=best > chance)
