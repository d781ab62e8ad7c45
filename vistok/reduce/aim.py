"""AIM: merge similar visual tokens before the language model, then prune them layer by layer by PageRank inside it.

What: before the language model, rounds of bipartite matching halve the tokens (see ``aim-merge``). Inside it a layer's
attention is a graph over all tokens; five steps of PageRank from a uniform start rank them by head, and the root mean
square over the heads is a token's importance. From the middle of the decoder on, fewer and fewer of the most important
visual tokens stay, by a straight line down to none; text always stays. Source: Zhong et al., arXiv 2412.03248,
LaVi-Lab/AIM. Where: projector output, each part of a cut picture by itself; then between 14/28 and 22/28 of the depth.

``keep`` is the mean over the decoder's layers. The published line (7/8 of the tokens in layer 15 of Qwen2-7B's 28, 1/8
in layer 21, none from layer 22 on) says how many must enter for that, and merging leaves so many; whole counts are
rounded such that the mean is exact. Where even all tokens are too few, none is merged and the line falls less steeply.

Departures: a layer's tokens are ranked by its own attention before it runs (the released code: by that of the layer
before, once it has run). Dropped tokens are gone; the released code masks them as keys only, so that their queries go
on handing out importance. PageRank under a causal mask favours early tokens; that is the published method.
``parity="authors"`` gives the released order of merged slots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core.merge import soft_matching_rounds
from vistok.core.select import topk
from vistok.host.reducer import Evidence, LayerNeed, Reducer, Reduction, Schedule

CARD = Card(
    title="AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning",
    kind="training-free",
    site="projector output, before the language model; decoder layers from 1/2 to 11/14 of the depth",
    paper="Zhong et al., 2024, arXiv 2412.03248",
    repository="LaVi-Lab/AIM",
    needs=("PageRank of the attention at decoder layers in the second half",),
    mechanism=("similarity", "attention"),
    score="cosine of tokens at even places to those at odd places; inside the language model PageRank of the attention",
    allocate="a straight line over the decoder's layers, down to none",
    select="top-k by PageRank, root mean square over heads",
    merge="rounds of bipartite soft matching, plain means",
    claim="Preserves the performance (here 95% of the accuracy) at a seventh of the cost (here of the visual tokens).",
    departures=(
        "merged slots stand at their destinations' places, not in order of similarity",
        "dropped tokens take no further part in the ranking",
    ),
)


@dataclass(frozen=True)
class AIM(Reducer):
    """Merging before the language model, PageRank pruning inside."""

    start: float = 14 / 28
    """Where in the decoder the fall begins, as a share of its layers: the last to see all tokens that enter."""
    stop: float = 22 / 28
    """The first that sees none."""
    temperature: float = 0.1
    """Of the softmax of the attention that PageRank follows; below 1 sharper than the model's own."""
    iterations: int = 5
    """Steps of PageRank."""
    parity: Literal["paper", "authors"] = "paper"
    """"authors": the order of merged slots of the released code."""

    def __post_init__(self) -> None:
        if not 0 < self.start < self.stop:
            raise ValueError(f"start and stop: got {self.start} and {self.stop}, must rise from above 0")
        if self.temperature <= 0:
            raise ValueError(f"temperature: got {self.temperature}, must be greater than 0")
        if self.iterations < 0:
            raise ValueError(f"iterations: got {self.iterations}, must be 0 or more")
        if self.parity not in ("paper", "authors"):
            raise ValueError(f"parity: got {self.parity!r}, must be 'paper' or 'authors'")

    @property
    def layer_needs(self) -> Mapping[str, LayerNeed]:
        return {"llm_importance": (self.temperature, self.iterations)}

    def schedule(self, num_tokens: int, keep: int, num_layers: int) -> Schedule:
        counts = linear_counts(keep, num_tokens, linear_rates(num_layers, self.start, self.stop))
        falls = [layer for layer in range(1, num_layers) if counts[layer] < counts[layer - 1]]
        return Schedule(counts[0], {layer: counts[layer] for layer in falls})

    def compress(self, evidence: Evidence, keep: int) -> Reduction:
        order: Literal["raster", "author"] = "author" if self.parity == "authors" else "raster"
        anchor, tokens, source = soft_matching_rounds(evidence.features, keep, order)
        return Reduction(anchor.sort(1).values, tokens, source)

    def at_layer(self, evidence: Evidence, keep: int, layer: int) -> Reduction:
        return Reduction.select(evidence.features, topk(importance(evidence.llm_importance), keep))

    def token_scores(self, evidence: Evidence, layer: int | None = None) -> Tensor | None:
        return None if layer is None else importance(evidence.llm_importance)  # before it, pairs are scored


def importance(rank: Tensor) -> Tensor:
    """(B, N) root mean square over heads of PageRank (B, H, N), in float64: the squares of the ranks of tokens that
    little leads to would be 0 in float32."""
    return rank.double().square().mean(1).sqrt()


def linear_rates(num_layers: int, start: float = 14 / 28, stop: float = 22 / 28) -> list[float]:
    """The share of the tokens that each layer sees: 1 up to ``start`` (a share of the depth), from there on a straight
    line to 0 at ``stop``."""
    first, last = start * num_layers, stop * num_layers
    return [min(1.0, max(0.0, (last - layer) / (last - first))) for layer in range(num_layers)]


def linear_counts(mean: int, limit: int, rates: Sequence[float]) -> list[int]:
    """Tokens in each layer: whole, not rising, at most ``limit``, near ``rates`` times the first, exactly ``mean`` on
    average (1 <= mean <= limit). If ``limit`` would have to be exceeded, the fall is scaled down instead."""
    layers, total = len(rates), mean * len(rates)
    level = total / sum(rates)
    if level > limit:
        slope = (limit * layers - total) / (limit * (layers - sum(rates)))
        rates, level = [1 - slope * (1 - rate) for rate in rates], limit
    flat = sum(rate == 1 for rate in rates)
    first = min(max(round(level), mean), limit, total // flat)  # from mean to total // flat the rest can be spread
    counts = [first] * flat
    left = total - sum(counts)
    for layer in range(flat, layers):
        ahead = sum(rates[layer:])
        share = rates[layer] / ahead if ahead else 1 / (layers - layer)
        counts.append(min(counts[-1], math.ceil(left * share - 1e-9)))
        left -= counts[-1]
    return counts


def claim(trial: Trial) -> Outcome:
    """The abstract: a 7-fold reduction in FLOPs while preserving the performance. Cost is taken as the number of visual
    tokens, averaged over the layers; 95% of the accuracy is what we call preserved."""
    dense, reduced = trial.accuracy(None), trial.accuracy(AIM(), keep=1 / 7)
    return Outcome("accuracy with 1/7 of the tokens", baseline=dense, value=reduced, holds=reduced >= 0.95 * dense)
