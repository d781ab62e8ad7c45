"""ToMe as a reducer: similar tokens are merged pair by pair, before the language model, until ``keep`` are left.

What: bipartite soft matching. Every second token finds the most similar of the others; the pairs that are most alike
become one token, the mean of all that it is made of, weighted by how many those are. ToMe itself does this inside the
vision encoder, a few tokens in each layer; here its matching alone is the baseline of merging by similarity: on the
encoder's output, in ``rounds`` rounds of equal cuts (more where a round would have to merge over half of the tokens).
Source: Bolya et al., arXiv 2210.09461, facebookresearch/ToMe. Where: encoder output, before the projector; part by part
of a cut picture.

Similarity is the cosine of the keys' mean over heads. Departures: the keys of a merged token are its members' mean
(ToMe: those of the next layer), and tokens stay in raster order between rounds, so that neighbours meet. The language
model is not told how large a token is (ToMe adds log size to the attention).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core.merge import bipartite_soft_matching, size_weighted_mean
from vistok.core.tensors import upcast
from vistok.host.reducer import Evidence, LayerSpec, Reducer, Reduction

CARD = Card(
    title="Token Merging: Your ViT But Faster (ToMe's matching, before the language model)",
    kind="training-free",
    site="encoder output, before the projector",
    paper="Bolya et al., 2022, arXiv 2210.09461",
    repository="facebookresearch/ToMe",
    mechanism=("similarity",),
    needs=("keys of one encoder layer, mean over its heads",),
    score="cosine of keys to the best match among every second token",
    select="the pairs most alike merge, in rounds",
    merge="mean of the tokens of a slot, weighted by size",
    claim="Half of the visual tokens cost at most 0.3 percentage points of accuracy.",
)


@dataclass(frozen=True)
class ToMeMerge(Reducer):
    """Bipartite soft matching on the encoder's keys, in rounds."""

    rounds: int = 8
    """In how many rounds the tokens are merged, at least; 1 merges as many at once as there are pairs for."""
    layer: int = -2
    """Encoder layer whose keys are compared."""

    space: ClassVar[Literal["projected", "encoder"]] = "encoder"

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds: got {self.rounds}, must be 1 or more")

    @property
    def needs(self) -> Mapping[str, LayerSpec]:
        return {"encoder_features": None, "encoder_mean_keys": self.layer}

    def compress(self, evidence: Evidence, keep: int) -> Reduction:
        keys, x = upcast(evidence.encoder_mean_keys), evidence.encoder_features
        b, n, _ = x.shape
        source = anchor = torch.arange(n, device=x.device).expand(b, n)
        size = keys.new_ones(b, n)
        for cut in cuts(n, keep, self.rounds):
            merged = bipartite_soft_matching(keys, cut, size=size)
            keys, size = merged.tokens, merged.size
            source, anchor = merged.source.gather(1, source), anchor.gather(1, merged.anchor)
        return Reduction(anchor, size_weighted_mean(x, source, keep).tokens, source)


def cuts(n: int, keep: int, rounds: int) -> list[int]:
    """How many of ``n`` tokens each round merges away: equal parts of what is to go, at most half of what is there."""
    out: list[int] = []
    while n > keep:
        out.append(min(-(-(n - keep) // max(rounds - len(out), 1)), n // 2))
        n -= out[-1]
    return out


def claim(trial: Trial) -> Outcome:
    """The abstract: twice the throughput of an encoder that merges inside, for 0.2 to 0.3% of accuracy.

    Here merging is done behind the encoder, so that only the accuracy can be held against the paper.
    """
    dense = trial.accuracy(None)
    merged = trial.accuracy(ToMeMerge(), keep=0.5)
    return Outcome("accuracy with half of the tokens", baseline=dense, value=merged, holds=merged >= dense - 0.003)
