"""FasterVLM: keep the visual tokens that the vision encoder's class token attends to most.

What: text-to-image attention inside the language model drifts towards late tokens and is spread thin; the class token's
attention is sharp, and known before the language model runs. Source: Zhang et al., arXiv 2412.01818,
Theia-4869/FasterVLM. Where: between the projector and the language model, once.

Departures: none in the choice. Positions stay those of the picture (the released code closes the gaps; the host's
``position="recompact"`` does so), and the parts of a cut picture share the budget by size, which for parts of one size
is the released equal split. An encoder without a class token is ranked by received attention instead, pooled over the
patches of a token: outside the paper, and reported to be poor across a pixel shuffle (issue #4 of the repository).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core.score import cls_mean
from vistok.host.recipe import Recipe, SlotNeeds
from vistok.host.reducer import Evidence

CARD = Card(
    title="[CLS] Attention is All You Need for Training-Free Visual Token Pruning (FasterVLM)",
    kind="training-free",
    site="projector output, before the language model",
    paper="Zhang et al., 2024, arXiv 2412.01818",
    repository="Theia-4869/FasterVLM",
    mechanism=("attention",),
    needs=("class-token attention of one encoder layer (received attention where there is no class token)",),
    score="class-token attention, mean over heads",
    select="top-k",
    claim="Keeps at least 90% of the dense accuracy with 5% of the visual tokens.",
)


@dataclass(frozen=True)
class FasterVLM(Recipe):
    """Top-k by class-token attention. No gradient, no state; a larger ``keep`` keeps a superset."""

    layer: int = -2
    """Encoder layer whose attention ranks the tokens; -2 is the layer that made LLaVA's features."""

    @property
    def slot_needs(self) -> SlotNeeds:
        return {"score": {"cls_attention": self.layer}}

    def scores(self, evidence: Evidence) -> Tensor:
        return cls_mean(evidence.cls_attention)


def claim(trial: Trial) -> Outcome:
    """The abstract: 95% of the tokens removed, 90% of the performance of LLaVA-1.5-7B kept."""
    dense = trial.accuracy(None)
    pruned = trial.accuracy(FasterVLM(), keep=0.05)
    return Outcome("accuracy with 5% of the tokens", baseline=dense, value=pruned, holds=pruned >= 0.9 * dense)
