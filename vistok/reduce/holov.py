"""HoloV: share the budget over bands of the picture, then keep each band's best tokens by class-token attention.

What: top-k over the whole picture keeps look-alike tokens of one highlighted object. The raster sequence is cut into
contiguous chunks of equal length; a token scores its class-token attention plus the variance of its similarity to the
rest of its chunk; each chunk gets tokens in proportion to its mean score, and spends them on its most attended ones
(the combined score only allocates). Source: Zou et al., arXiv 2510.02912, obananas/HoloV. Where: between the encoder
and the language model, once; a picture that was cut is reduced part by part. Without a class token: received attention.

The released scores scale the variances of a chunk to the mean of its attention, so that the mean score is (1 + beta)
times the mean attention, up to an epsilon: the allocation hardly depends on the variance. Kept as published.

Departures: what a full chunk cannot take is shared among the others, and a chunk of one token is scored on the scale of
the others. The released code loses the excess, fills up with zero vectors, leaves the attention of a lone token a
thousand times too small, and puts the tokens of a chunk in order of attention: ``parity="authors"``, where the values
stand in that order on ascending places (closest to the released runs with the host's ``position="recompact"``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core.allocate import even_sizes, split_budget
from vistok.core.score import cls_mean, cosine
from vistok.core.select import topk_per_group
from vistok.core.tensors import take
from vistok.host.recipe import Recipe, Shares, SlotNeeds
from vistok.host.reducer import Evidence, Reduction

CARD = Card(
    title="Don't Just Chase Highlighted Tokens in MLLMs: Revisiting Visual Holistic Context Retention (HoloV)",
    kind="training-free",
    site="projector output, before the language model",
    paper="Zou et al., 2025, arXiv 2510.02912",
    repository="obananas/HoloV",
    mechanism=("attention", "similarity"),
    needs=("class-token attention of one encoder layer (received attention where there is no class token)",),
    score="class-token attention + beta * variance of similarity inside the chunk",
    allocate="chunks of the raster sequence in proportion to their mean score",
    select="top-k by class-token attention in each chunk",
    claim="Keeps 95.8% of the dense accuracy with 88.9% of the visual tokens pruned.",
    departures=(
        "the excess of a full chunk goes to other chunks instead of being filled up with zero vectors",
        "a chunk of one token is scored on the scale of the others",
        "tokens stand in raster order, not in order of attention inside a chunk",
    ),
)


@dataclass(frozen=True)
class HoloV(Recipe):
    """Chunk budgets by attention and similarity variance, top-k by attention inside a chunk."""

    chunks: int | None = None
    """Number of chunks; None: the released rule, 1024 / 576 * N / keep (16 for 64 of 576), in 1..N."""
    beta: float = 0.09
    """Weight of the variance term; 0 allocates by mean attention."""
    layer: int = -2
    """Encoder layer whose class-token attention is used."""
    parity: Literal["paper", "authors"] = "paper"
    """"authors": excess lost and filled up with zero vectors, order of attention inside a chunk."""

    def __post_init__(self) -> None:
        if self.chunks is not None and self.chunks < 1:
            raise ValueError(f"chunks: got {self.chunks}, must be 1 or more, or None")
        if self.beta < 0:
            raise ValueError(f"beta: got {self.beta}, must be 0 or more")
        if self.parity not in ("paper", "authors"):
            raise ValueError(f"parity: got {self.parity!r}, must be 'paper' or 'authors'")

    @property
    def slot_needs(self) -> SlotNeeds:
        return {"score": {"cls_attention": self.layer}}

    def sizes(self, num_tokens: int, keep: int) -> list[int]:
        """Tokens of each chunk, as even as possible, the larger ones first."""
        return even_sizes(num_tokens, int(1024 / 576 * num_tokens / keep) if self.chunks is None else self.chunks)

    def chunk_scores(self, features: Tensor, attention: Tensor, sizes: list[int]) -> Tensor:
        """(B, P) mean token score of each chunk of ``features`` (B, N, D) with ``attention`` (B, N)."""
        scores, first = [], 0
        for length in dict.fromkeys(sizes):  # at most two lengths, each in one run
            part = slice(first, first := first + length * sizes.count(length))
            x = features[:, part].unflatten(1, (-1, length)).flatten(0, 1)
            a = 1e3 * attention[:, part].reshape(-1, length)
            if length > 1:
                v = similarity_variance(x)
                a = a + self.beta * v * a.abs().mean(1, keepdim=True) / (v.mean(1, keepdim=True) + 1e-6)
            elif self.parity == "authors":
                a = a / 1e3
            scores.append(a.mean(1).view(len(features), -1))
        return torch.cat(scores, 1)

    def scores(self, evidence: Evidence) -> Tensor:
        return cls_mean(evidence.cls_attention)

    def allocate(self, evidence: Evidence, scores: Tensor, keep: int) -> Shares:
        sizes = self.sizes(evidence.num_tokens, keep)
        chunks = self.chunk_scores(evidence.features, scores, sizes)
        return Shares(sizes, split_budget(chunks, keep, capacity=torch.tensor([sizes]), leftover="weight"))

    def compress(self, evidence: Evidence, keep: int) -> Reduction:
        return super().compress(evidence, keep) if self.parity == "paper" else self._released(evidence, keep)

    def reduce(self, evidence: Evidence, keep: int) -> Reduction:
        if self.parity == "authors" and keep == evidence.num_tokens and not evidence.crops:
            return self.compress(evidence, keep)  # the released code has no short cut for all tokens
        return super().reduce(evidence, keep)

    def _released(self, evidence: Evidence, keep: int) -> Reduction:
        """Chunk after chunk; one that was cut in order of attention, a whole one in raster order; then zero vectors."""
        attention, sizes = self.scores(evidence), self.sizes(evidence.num_tokens, keep)
        place = torch.arange(evidence.num_tokens, device=attention.device)
        room = torch.tensor(sizes, device=attention.device)
        budgets = split_budget(self.chunk_scores(evidence.features, attention, sizes), keep, leftover="weight")
        budgets = torch.minimum(budgets, room)
        order = torch.where((budgets == room).repeat_interleave(room, 1), -place, attention)
        budgets = torch.cat([budgets, keep - budgets.sum(1, keepdim=True)], 1)  # of a last group: the zero vectors
        picks = topk_per_group(pad(order, (0, keep)), [*sizes, keep], budgets)
        source = torch.full((len(picks), len(place) + keep), -1, device=picks.device)
        source = source.scatter(1, picks, place[:keep].expand_as(picks))[:, : len(place)]
        tokens = take(pad(evidence.features, (0, 0, 0, keep)), picks)
        places = (source < 0).int().sort(dim=1, stable=True).indices[:, :keep]  # zero vectors: any place that is free
        return Reduction(places.sort(1).values, tokens, source)


def similarity_variance(x: Tensor) -> Tensor:
    """(C, n) of chunks ``x`` (C, n, D), n > 1: spread of each token's cosines around their mean over the n - 1 others.

    As released: the zeroed diagonal counts as one of the n deviations, and the sum is divided by n - 1. Equal tokens:
    mean 1, so 1 / (n - 1).
    """
    similarity = cosine(x)
    similarity.diagonal(dim1=1, dim2=2).zero_()
    others = x.shape[1] - 1
    mean = similarity.sum(2, keepdim=True) / others
    return (similarity - mean).square().sum(2) / others


def claim(trial: Trial) -> Outcome:
    """The abstract: LLaVA-1.5 keeps 95.8% of its performance with 88.9% of the tokens pruned (64 of 576)."""
    dense = trial.accuracy(None)
    pruned = trial.accuracy(HoloV(), keep=1 / 9)
    return Outcome("accuracy with 1/9 of the tokens", baseline=dense, value=pruned, holds=pruned >= 0.958 * dense)
