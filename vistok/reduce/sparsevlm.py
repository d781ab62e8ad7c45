"""SparseVLM: the words that the picture is about say which visual tokens stay; the best of the others are recycled.

What: not every word of a question has to do with the picture. The *text raters* are the question's tokens that the
visual tokens match best: softmax over the text of the products of visual and text embeddings at the language model's
input, mean over visual tokens, at least its mean over the text. Inside the language model visual tokens are ranked by
the raters' attention, mean over heads and raters. The best stay; of the others the best 30% are clustered (density
peaks) into a tenth as many tokens, the means of the clusters; the rest is dropped. Source: Zhang et al.,
arXiv 2410.04417, Gumpest/SparseVLMs (version 1.0). Where: before the decoder layers at 1/16, 3/16 and 15/32 of the
depth (2, 6 and 15 of 32); the tokens of a picture that was cut are ranked together.

``keep`` is the mean over the decoder's layers and counts recycled tokens. The stages' counts are in the proportion of
the released ones for 192 of 576 (300, 200 and 110), scaled to the mean; where the layers before the first stage would
spend more than 3/4 of the budget the stages move towards layer 0 (``vistok.core.stages.stages_from_all``). With
``scale`` each stage keeps, as in the first release, ``scale`` * rank + ``bias`` tokens, the rank being that of the
raters' attention to the visual tokens (13.5 and 0 there for 192 of 576), and ``keep`` says only where stages are.

Departures: recycled tokens stand where their clusters' centres stood, and positions stay those of the picture (the
released code puts them behind the others and closes the gaps). A stage acts before the layer whose attention ranks the
tokens, not after it: the first stage's choice is the released one, but tokens are recycled from the states that enter
the layer. A question no token of which is above the mean is rated by its best token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core.cluster import dpc_knn
from vistok.core.merge import size_weighted_mean
from vistok.core.position import rest
from vistok.core.score import received
from vistok.core.select import topk
from vistok.core.stages import raster_slots, stages_from_all
from vistok.core.tensors import take, upcast
from vistok.host.reducer import Evidence, LayerNeed, LayerSpec, Reducer, Reduction, Schedule

CARD = Card(
    title="SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference",
    kind="training-free",
    site="decoder layers at 1/16, 3/16 and 15/32 of the depth",
    paper="Zhang et al., 2024, arXiv 2410.04417",
    repository="Gumpest/SparseVLMs",
    needs=(
        "question embeddings, and visual tokens as the language model gets them",
        "attention of the question's tokens to the visual tokens at three decoder layers",
    ),
    mechanism=("attention", "query"),
    score="attention of the question's visually relevant tokens, mean over heads",
    allocate="falling counts by stage, or in proportion to the rank of the attention",
    select="top-k",
    merge="the best 30% of the others into a tenth as many density-peak clusters",
    claim="Keeps 93% of the dense accuracy with 78% of the visual tokens removed.",
    departures=("recycled tokens stand at their clusters' centres", "tokens keep their positions"),
)


@dataclass(frozen=True)
class SparseVLM(Reducer):
    """Top-k by the attention of chosen question tokens, in stages, with recycling."""

    shape: tuple[float, ...] = (300, 200, 110)
    """What the counts of the stages are proportional to."""
    depths: tuple[float, ...] = (1 / 16, 3 / 16, 15 / 32)
    """Where in the decoder the stages begin, as shares of its layers."""
    recycled: float = 0.3
    """Share of the tokens that do not stay from which clusters are made, the best first; 0: none is recycled."""
    clusters: float = 0.1
    """Clusters made of them, as a share of their number."""
    scale: float | None = None
    """None: counts from ``keep``. A number: tokens that stay in a stage, for each unit of the attention's rank."""
    bias: float = 0.0
    """Added to ``scale`` * rank."""

    whole_picture: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.depths or list(self.depths) != sorted(self.depths) or not all(0 <= d < 1 for d in self.depths):
            raise ValueError(f"depths: got {self.depths}, must rise within [0, 1)")
        if len(self.shape) != len(self.depths):
            raise ValueError(f"shape: got {len(self.shape)}, must be one for each of the {len(self.depths)} depths")
        if list(self.shape) != sorted(self.shape, reverse=True) or self.shape[-1] <= 0:
            raise ValueError(f"shape: got {self.shape}, must be positive and not rise")
        if not 0 <= self.recycled <= 1:
            raise ValueError(f"recycled: got {self.recycled}, must be in [0, 1]")
        if not 0 < self.clusters <= 1:
            raise ValueError(f"clusters: got {self.clusters}, must be in (0, 1]")
        if self.scale is not None and self.scale <= 0:
            raise ValueError(f"scale: got {self.scale}, must be greater than 0, or None")

    @property
    def one_at_a_time(self) -> bool:  # type: ignore[override]
        return self.scale is not None

    @property
    def needs(self) -> Mapping[str, LayerSpec]:
        return {"text": None, "encoder_features": None, "project": None}

    @property
    def layer_needs(self) -> Mapping[str, LayerNeed]:
        return {"llm_attention": "text"}

    def schedule(self, num_tokens: int, keep: int, num_layers: int) -> Schedule:
        return Schedule(num_tokens, stages_from_all(self.depths, self.shape, keep, num_tokens, num_layers))

    def compress(self, evidence: Evidence, keep: int) -> Reduction:
        return self.at_layer(evidence, keep, 0)

    def at_layer(self, evidence: Evidence, keep: int, layer: int) -> Reduction:
        x, n = evidence.features, evidence.num_tokens
        if keep in (0, n):
            return Reduction.select(x, torch.arange(keep, device=x.device).expand(len(x), keep))
        raters = self.raters(evidence)
        stay = self.count(n, keep) if self.scale is None else self.count_by_rank(evidence.llm_attention, raters)
        among, most = self.recycling(n - stay)
        merged = most if self.scale is not None else keep - stay

        score = received(evidence.llm_attention, raters)
        best = topk(score, stay)
        others = rest(best, n)
        others = take(others, topk(take(score, others), among))
        values = take(x, others)
        centres = dpc_knn(values, merged, neighbours=merged) if merged else others[:, :0]
        group = nearest(values, centres) if merged else torch.full_like(others, -1)
        places = torch.arange(stay, device=x.device).expand_as(best)
        source = torch.full(x.shape[:2], -1, dtype=torch.int64, device=x.device)
        source = source.scatter(1, best, places).scatter(1, others, torch.where(group < 0, -1, group + stay))
        tokens = torch.cat([take(x, best), size_weighted_mean(values, group, merged).tokens], 1)
        anchors = torch.cat([best, take(others, centres)], 1)
        carry = raters.unsqueeze(1).expand(-1, stay + merged, -1)
        return Reduction(*raster_slots(anchors, tokens, source), carry)

    def raters(self, evidence: Evidence) -> Tensor:
        """(B, T) bool: the question's tokens that rate, found once, where all visual tokens are there; later stages are
        told with each token."""
        return text_raters(evidence) if evidence.carry is None else evidence.carry[:, 0]

    def token_scores(self, evidence: Evidence, layer: int | None = None) -> Tensor:
        return received(evidence.llm_attention, self.raters(evidence))

    def recycling(self, left: int) -> tuple[int, int]:
        """How many of ``left`` tokens that do not stay are clustered, and into how many clusters."""
        if not self.recycled or not left:
            return 0, 0
        among = min(int(self.recycled * left) + 1, left)
        return among, min(int(self.clusters * among) + 1, among)

    def count(self, num_tokens: int, keep: int) -> int:
        """Tokens that stay, so that with their clusters they are ``keep``; at least half of them."""
        least = keep - keep // 2
        fits = (stay for stay in range(keep, least, -1) if stay + self.recycling(num_tokens - stay)[1] <= keep)
        return next(fits, least)

    def count_by_rank(self, attention: Tensor, raters: Tensor) -> int:
        """Tokens that stay for the rank of the rows of ``raters`` (1, Q) bool in ``attention`` (1, H, Q, N)."""
        if len(attention) != 1:
            raise ValueError(f"evidence: got {len(attention)} pictures, but with scale the count is each picture's own")
        rank = int(torch.linalg.matrix_rank(upcast(attention.mean(1))[raters]))
        return min(max(int(rank * (self.scale or 0) + self.bias), 1), attention.shape[3] - 1)


def text_raters(evidence: Evidence) -> Tensor:
    """(B, T) bool: the question's tokens that the visual tokens match best, at the language model's input."""
    visual = evidence.project(evidence.encoder_features) if evidence.project else evidence.features
    mask = torch.ones(evidence.text.shape[:2], dtype=torch.bool, device=visual.device)
    mask = mask if evidence.text_mask is None else evidence.text_mask
    match = upcast(visual) @ upcast(evidence.text).transpose(1, 2)
    match = match.masked_fill(~mask[:, None], torch.finfo(match.dtype).min).softmax(2).mean(1) * mask
    mean = match.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
    return (match >= torch.minimum(mean, match.amax(1, keepdim=True))) & mask


def nearest(x: Tensor, centres: Tensor) -> Tensor:
    """(B, N) int64: for each row of ``x`` (B, N, D) the nearest of ``centres`` (B, C), a centre's own for itself."""
    wide = upcast(x)
    distance = torch.cdist(wide, take(wide, centres), compute_mode="donot_use_mm_for_euclid_dist")
    slots = torch.arange(centres.shape[1], device=x.device).expand_as(centres)
    return distance.argmin(2).scatter(1, centres, slots)


def claim(trial: Trial) -> Outcome:
    """The abstract: 93% of the accuracy with a compression ratio of 78% (128 of 576 tokens)."""
    dense = trial.accuracy(None)
    pruned = trial.accuracy(SparseVLM(), keep=2 / 9)
    return Outcome("accuracy with 2/9 of the tokens", baseline=dense, value=pruned, holds=pruned >= 0.93 * dense)
