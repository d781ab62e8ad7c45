"""AIM's merging alone: halve the visual tokens again and again by merging each even one into its likeness.

What: rounds of bipartite matching before the language model. Of the tokens at even places those most similar (cosine)
to one at an odd place are merged into it, by a plain mean that counts a slot of several tokens once. A round halves
the tokens, the last one merges what is still too many; the paper's default is two rounds, 25%. Source: the first half
of AIM (Zhong et al., arXiv 2412.03248, LaVi-Lab/AIM), see the system ``aim``. Where: between the projector and the
language model, once, each part of a cut picture by itself.

Departures: slots stand where their destinations stood. The released code puts tokens that were not merged first, by
falling similarity: ``parity="authors"``, where the values stand in that order on ascending places. (The rounds are the
same: each works on the order that the released code leaves.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core.merge import soft_matching_rounds
from vistok.host.reducer import Evidence, Reducer, Reduction

CARD = Card(
    title="AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning (merging alone)",
    kind="training-free",
    site="projector output, before the language model",
    paper="Zhong et al., 2024, arXiv 2412.03248",
    repository="LaVi-Lab/AIM",
    mechanism=("similarity",),
    score="cosine of tokens at even places to those at odd places",
    merge="rounds of bipartite soft matching, plain means",
    claim="Merging to 25% of the visual tokens, the paper's default, preserves the performance (95% of the accuracy).",
    departures=("slots stand at their destinations' places, not in order of similarity",),
)


@dataclass(frozen=True)
class AIMMerge(Reducer):
    """Bipartite soft matching in rounds."""

    parity: Literal["paper", "authors"] = "paper"
    """"authors": the order of slots of the released code."""

    def __post_init__(self) -> None:
        if self.parity not in ("paper", "authors"):
            raise ValueError(f"parity: got {self.parity!r}, must be 'paper' or 'authors'")

    def compress(self, evidence: Evidence, keep: int) -> Reduction:
        order: Literal["raster", "author"] = "author" if self.parity == "authors" else "raster"
        anchor, tokens, source = soft_matching_rounds(evidence.features, keep, order)
        return Reduction(anchor.sort(1).values, tokens, source)


def claim(trial: Trial) -> Outcome:
    """The abstract's "preserving the performance", for its first half; 95% is what we call preserved."""
    dense, merged = trial.accuracy(None), trial.accuracy(AIMMerge(), keep=0.25)
    return Outcome("accuracy with 25% of the tokens", baseline=dense, value=merged, holds=merged >= 0.95 * dense)
