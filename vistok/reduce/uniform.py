"""Uniform tokens: every so-manieth token of the grid, the control of a method that only looks at the picture's layout.

What: the grid is cut into ``keep`` nearly square cells of nearly equal size, and the middle token of each stays.
Where: between the projector and the language model, once; a picture that was cut is reduced part by part.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.host.choices import uniform
from vistok.host.recipe import Recipe
from vistok.host.reducer import Evidence

CARD = Card(
    title="Uniform grid of tokens (control)",
    kind="control",
    site="projector output, before the language model",
    paper="",
    select="the middle token of each of K cells of the grid",
    claim="Keeps the share of the answer's pixels that it keeps of the tokens: 25%, give or take 5 points.",
)


@dataclass(frozen=True)
class Uniform(Recipe):
    """A regular subset of the grid."""

    def pick(self, evidence: Evidence, scores: Tensor, keep: int) -> Tensor:
        return uniform(evidence, scores, keep)


def claim(trial: Trial) -> Outcome:
    """Evidence recall: what is drawn anywhere in the picture is hit as often as any other place."""
    recall = trial.evidence_recall(Uniform(), keep=0.25)
    return Outcome(
        "evidence recall with 25% of the tokens", baseline=0.25, value=recall, holds=abs(recall - 0.25) <= 0.05
    )
