"""DivPrune: keep the tokens that differ most from one another.

What: importance keeps look-alikes. Choosing tokens is a max-min diversity problem: of all sets of that size, take the
one whose closest pair is farthest apart. Solved greedily: first the token that is farthest from its nearest neighbour,
then always the one farthest from its nearest chosen token; distance is 1 - cosine of the projected tokens. Neither
attention nor the question is looked at. Source: Alvar et al., arXiv 2503.02175, vbdi/divprune. Where: between the
projector and the language model, once; a picture that was cut is reduced as a whole.

Departures: none in the choice. A zero vector counts as unlike any other token (the released cosine is 0 / 0 there).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core.select import farthest_points
from vistok.host.recipe import Recipe
from vistok.host.reducer import Evidence
from vistok.reduce.fastervlm import FasterVLM
from vistok.reduce.random import Random

CARD = Card(
    title="DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
    kind="training-free",
    site="projector output, before the language model",
    paper="Alvar et al., 2025, arXiv 2503.02175",
    repository="vbdi/divprune",
    mechanism=("similarity",),
    score="cosine distance to the nearest chosen token",
    select="greedy max-min diversity from the most isolated token",
    claim="At high pruning ratios, here 10% of the visual tokens, it is more accurate than pruning by importance.",
)


@dataclass(frozen=True)
class DivPrune(Recipe):
    """Greedy max-min diversity. No hyper-parameters; a larger ``keep`` keeps a superset."""

    whole_picture: ClassVar[bool] = True
    greedy: ClassVar[bool] = True

    def pick(self, evidence: Evidence, scores: Tensor, keep: int) -> Tensor:
        return farthest_points(evidence.features, keep, "isolated", "cosine")


def claim(trial: Trial) -> Outcome:
    """The abstract: diverse tokens stand for all better than important ones, also at high pruning ratios.

    Importance is class-token attention here (FasterVLM); 10% is about the ratio of the paper's main table.
    """
    important = trial.accuracy(FasterVLM(), keep=0.1)
    diverse = trial.accuracy(DivPrune(), keep=0.1)
    chance = trial.accuracy(Random(), keep=0.1)
    return Outcome(
        "accuracy with 10% of the tokens, diverse over important ones",
        baseline=important,
        value=diverse,
        holds=diverse > max(important, chance),
        note=f"tokens at random: {chance:.1%}",
    )
