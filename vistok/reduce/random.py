"""Random tokens: the control that a method which claims to know what matters has to beat.

What: a uniformly random choice without replacement. It depends on the seed and the number of tokens only, so that a
picture is reduced alike alone, in any batch and on any device; a larger ``keep`` keeps a superset. All pictures of one
size keep the same places: average over seeds. Where: between the projector and the language model, once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.host.choices import select_random
from vistok.host.recipe import Recipe
from vistok.host.reducer import Evidence

CARD = Card(
    title="Random tokens (control)",
    kind="control",
    site="projector output, before the language model",
    paper="",
    select="random, with a seed",
    claim="Keeps the share of the answer's pixels that it keeps of the tokens: 25%, give or take 5 points.",
)


@dataclass(frozen=True)
class Random(Recipe):
    """A random choice over the whole picture, also where it was cut into parts."""

    seed: int = 0
    """The same seed keeps the same places."""

    whole_picture: ClassVar[bool] = True

    def pick(self, evidence: Evidence, scores: Tensor, keep: int) -> Tensor:
        return select_random(evidence, scores, keep, self.seed)


def claim(trial: Trial) -> Outcome:
    """Evidence recall over five seeds; the noise is that of choosing 5 times a quarter of a few hundred places."""
    recall = sum(trial.evidence_recall(Random(seed), keep=0.25) for seed in range(5)) / 5
    return Outcome(
        "evidence recall with 25% of the tokens", baseline=0.25, value=recall, holds=abs(recall - 0.25) <= 0.05
    )
