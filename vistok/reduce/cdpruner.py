"""CDPruner: keep a set of tokens that are relevant to the question and unlike one another, as one criterion.

What: attention keeps duplicates, diversity alone does not know the question. A determinantal point process with the
kernel ``r_i cos(x_i, x_j) r_j``, x the projected tokens and r their relevance to the question scaled to [0, 1] over the
picture, is largest for sets that have both, and has a fast greedy maximum. Source: Zhang et al., arXiv 2506.10967,
Theia-4869/CDPruner. Where: between the projector and the language model, once; a picture that was cut is
reduced part by part. Relevant are tokens whose mean cosine to the question's tokens is large.

Departures: the paper takes that cosine between CLIP's image and text embeddings where the encoder has a text tower. No
host here has one loaded, so that it is taken between the projected tokens and the question's embeddings at the language
model's input. The released code turns the sign around for CLIP, whose patches are less similar to a text
the better they match it; here it does not (``negative=True`` does). Relevance is scaled over one part of a cut picture,
not over all parts; where all tokens are equally relevant, or there is no question, diversity alone decides. Past the
rank of the features nothing adds volume, and the first tokens left over follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core.score import text_similarity
from vistok.core.select import greedy_dpp_features
from vistok.host.choices import quality
from vistok.host.recipe import Recipe, SlotNeeds
from vistok.host.reducer import Evidence

CARD = Card(
    title="Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs (CDPruner)",
    kind="training-free",
    site="projector output, before the language model",
    paper="Zhang et al., 2025, arXiv 2506.10967",
    repository="Theia-4869/CDPruner",
    needs=("question embeddings",),
    mechanism=("similarity", "query"),
    score="mean cosine to the question's tokens, scaled to [0, 1]",
    select="greedy MAP of a determinantal point process, quality times similarity",
    claim="Keeps 94% of the dense accuracy with 5.6% of the visual tokens.",
    departures=(
        "relevance from the language model's input embeddings, not from CLIP's text tower, and with its natural sign",
        "relevance is scaled over each part of a cut picture, not over all parts",
    ),
)


@dataclass(frozen=True)
class CDPruner(Recipe):
    """Determinantal point process conditioned on the question."""

    theta: float | None = None
    """Weight of relevance against diversity in [0, 1): r becomes ``exp(r theta / (2 (1 - theta)))``, up to a factor.
    None: r itself, as released; 0: diversity alone."""
    negative: bool = False
    """True: relevant are the tokens least similar to the question, as released for CLIP embeddings."""

    greedy: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.theta is not None and not 0 <= self.theta < 1:
            raise ValueError(f"theta: got {self.theta}, must be in [0, 1), or None")

    @property
    def slot_needs(self) -> SlotNeeds:
        return {"score": {"text": None}}

    def scores(self, evidence: Evidence) -> Tensor:
        similarity = text_similarity(evidence.features, evidence.text, evidence.text_mask)
        return -similarity if self.negative else similarity

    def weights(self, scores: Tensor) -> Tensor:
        """(B, N), greater than 0: what each token counts for in the kernel."""
        scaled = quality(scores)
        return scaled if self.theta is None else ((scaled - 1) * self.theta / (2 * (1 - self.theta))).exp()

    def relevance(self, evidence: Evidence) -> Tensor:
        """``weights`` of its own scores."""
        return self.weights(self.scores(evidence))

    def pick(self, evidence: Evidence, scores: Tensor, keep: int) -> Tensor:
        return greedy_dpp_features(evidence.features, keep, self.weights(scores))


def claim(trial: Trial) -> Outcome:
    """The abstract: LLaVA with 95% fewer FLOPs keeps 94% of its accuracy (LLaVA-NeXT, 160 of 2880 tokens)."""
    dense = trial.accuracy(None)
    pruned = trial.accuracy(CDPruner(), keep=1 / 18)
    return Outcome("accuracy with 1/18 of the tokens", baseline=dense, value=pruned, holds=pruned >= 0.94 * dense)
