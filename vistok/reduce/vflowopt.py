"""VFlowOpt: prune by one importance map in three places, recycle what is pruned, and tune the strategy by search.

What: how much to drop where is a small vector of numbers, so let a black-box search find it: the strategy under which
the last token's final hidden state moves least (``vistok.bench.search``). The map: attention that a patch receives from
the patches that themselves receive much, plus, if wanted, the entropy of its pixels. The least important tokens leave
before the language model, but those of one cell of a coarse grid leave one token behind: their mean, weighted by
importance, at the place of the most important. The same map ranks the tokens again after 9/28 and 18/28 of the
decoder's layers. Source: Yang et al., arXiv 2508.05211, sihany077/VFlowOpt. Where: projector output, then two decoder
layers.

Defaults: the strategy that the authors ship for 25% of the tokens of LLaVA-OneVision-7B. For 50% it is threshold 28.68,
cell 11.76, ratios 0.7487 and 0.487; for 10% 39.26, 17.39, 1.0 and 0.6011. The pixels' entropy is off in all three.

``keep`` is the mean over the decoder's layers: the ratios give the shape, and the counts solve it exactly (the paper
fixes the first count and one ratio, and solves for the other). So many tokens leave that the rest and the recycled ones
add up to the count; where there are more cells than places, the best cells get one. The released code reckons with
whole cells, so that its count is only approximate: ``parity="authors"``. For pictures in one piece, several pictures
and video the released code prunes without recycling: ``recycle=False``.

Departures: cells do not reach across the parts of a cut picture. The released entropy wraps negative (normalised) pixel
values around; here grey values are stretched to 256 levels of the picture's own range, which is all that can be known
of their scale; no released number depends on it. Where no patch receives more than the threshold, all count (released:
not a number). Weights that entropy made negative count as 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core.merge import size_weighted_mean
from vistok.core.score import received
from vistok.core.stages import stage_counts, stage_starts
from vistok.core.tensors import ranking, take, upcast
from vistok.host.reducer import Evidence, LayerSpec, Reducer, Reduction, Schedule

CARD = Card(
    title="VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization",
    kind="calibrated",
    site="projector output, before the language model; decoder layers at 9/28 and 18/28 of the depth",
    paper="Yang et al., 2025, arXiv 2508.05211",
    repository="sihany077/VFlowOpt",
    mechanism=("attention",),
    needs=("patch-to-patch attention of one encoder layer", "pixels of the patches, where entropy has a weight"),
    score="attention received from the patches that receive much, plus the patch's entropy",
    allocate="ratios between three stages, found by search",
    select="top-k, by the same map in every stage",
    merge="pruned tokens of one grid cell into their importance-weighted mean",
    claim="Keeps 90% of the dense accuracy with 90% of the visual tokens pruned.",
    departures=(
        "the count is exact, not approximate",
        "cells do not reach across the parts of a cut picture",
        "entropy of the stretched grey values, not of wrapped ones",
        "a threshold that no patch exceeds counts all patches, and negative weights count as 0",
    ),
)


@dataclass(frozen=True)
class VFlowOpt(Reducer):
    """Prune with recycling, then twice by the same map inside the language model."""

    threshold: float = 34.76
    """Only patches that receive more than this many times the mean attention are asked; 0: all are."""
    entropy: float = 0.0
    """Weight of the (softmax) entropy of a patch's grey values beside the attention."""
    cell: float = 15.58
    """Side of a grid cell in tokens, not necessarily whole; pruned tokens of one cell become one."""
    ratio_1: float = 0.9833
    """Tokens after the first decoder stage as a share of those before it."""
    ratio_2: float = 0.8773
    """The same of the second decoder stage."""
    recycle: bool = True
    """False: what is pruned is gone."""
    depths: tuple[float, float] = (9 / 28, 18 / 28)
    """Where in the decoder the later stages act, as shares of its layers."""
    layer: int = -1
    """Encoder layer whose attention makes the map."""
    parity: Literal["paper", "authors"] = "paper"
    """"authors": the approximate count of the released code."""

    whole_picture: ClassVar[bool] = True
    search_space: ClassVar[Mapping[str, tuple[float, float]]] = {
        "threshold": (0.0, 50.0),
        "cell": (3.0, 24.0),
        "entropy": (-1.0, 1.0),
        "ratio_1": (8 / 15, 1.0),
        "ratio_2": (0.4, 1.0),
    }
    """What ``vistok.bench.search`` tunes unless told otherwise: the paper's ranges, ratio_2 free instead of solved."""

    def __post_init__(self) -> None:
        if self.threshold < 0:
            raise ValueError(f"threshold: got {self.threshold}, must be 0 or more")
        if self.cell < 1:
            raise ValueError(f"cell: got {self.cell}, must be 1 or more")
        for name in ("ratio_1", "ratio_2"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, must be in (0, 1]")
        if not 0 < self.depths[0] <= self.depths[1] < 1:
            raise ValueError(f"depths: got {self.depths}, must be two shares that rise within (0, 1)")
        if self.parity not in ("paper", "authors"):
            raise ValueError(f"parity: got {self.parity!r}, must be 'paper' or 'authors'")

    @property
    def one_at_a_time(self) -> bool:  # type: ignore[override]
        """True if the count is the released, approximate one."""
        return self.parity == "authors"

    @property
    def needs(self) -> Mapping[str, LayerSpec]:
        pixels: Mapping[str, LayerSpec] = {"patch_pixels": None} if self.entropy else {}
        return {"encoder_attention": self.layer, **pixels}

    def schedule(self, num_tokens: int, keep: int, num_layers: int) -> Schedule:
        shape = {0: 1.0}
        ratios = (self.ratio_1, self.ratio_1 * self.ratio_2)
        for depth, ratio in zip(self.depths, ratios, strict=True):
            for start in stage_starts((depth,), num_layers):  # none in a model of so few layers
                shape[start] = ratio
        ends = [*list(shape)[1:], num_layers]
        lengths = tuple(end - start for start, end in zip(shape, ends, strict=True))
        counts = stage_counts(lengths, tuple(shape.values()), keep, num_tokens)
        return Schedule(counts[0], dict(zip(list(shape)[1:], counts[1:], strict=True)))

    # The map --------------------------------------------------------------------------------------------------------

    def importance(self, evidence: Evidence) -> Tensor:
        """(B, N) at least float32; each part of a cut picture has a map of its own."""
        attention, parts, first = evidence.encoder_attention, [], 0
        entropy = patch_entropy(evidence.patch_pixels) if self.entropy else None
        for size in [h * w for h, w in evidence.crops] or [evidence.num_tokens]:
            part = slice(first, first := first + size)
            rows = upcast(attention[:, :, part, part])
            got = received(rows)
            asked = got > self.threshold * got.mean(1, keepdim=True)
            score = received(rows, asked | ~asked.any(1, keepdim=True))
            parts.append(score if entropy is None else score + self.entropy * entropy[:, part].softmax(1))
        return torch.cat(parts, 1)

    # Prune with recycling -------------------------------------------------------------------------------------------

    def compress(self, evidence: Evidence, keep: int) -> Reduction:
        """The rest and what was recycled; ``carry`` (B, K) is the map, for a recycled token that of its best member."""
        score, x = self.importance(evidence), evidence.features
        if not self.recycle:
            kept = Reduction.select(x, ranking(score)[:, :keep])
            return Reduction(kept.keep, kept.tokens, kept.source, take(score, kept.keep))
        b, n = score.shape
        cell, cells = self._cells(evidence)
        cell = cell.expand(b, n)
        order = ranking(score)
        rank = torch.empty_like(order).scatter(1, order, torch.arange(n, device=x.device).expand_as(order))
        leaving = rank >= n - self._leave(cell.gather(1, order.flip(1)), keep).unsqueeze(1)

        # The most important token of a cell that leaves stands for them all.
        best = rank.new_full((b, cells + 1), n)
        best = best.scatter_reduce(1, torch.where(leaving, cell, cells), rank, "amin").gather(1, cell)
        stays = ~leaving | (rank == best)
        count = keep if self.parity == "paper" else int(stays[0].sum())
        places = ranking(score, stays)[:, :count].sort(1).values
        slots = torch.arange(count, device=x.device).expand(b, count)
        slot = torch.full_like(order, -1).scatter(1, places, slots)
        source = torch.where(leaving, slot.gather(1, order.gather(1, best.clamp_max(n - 1))), slot)

        # Weights count within a slot only: where they are all 0, any will do.
        weight = score.clamp_min(0)
        into = torch.where(source < 0, count, source)
        total = weight.new_zeros(b, count + 1).scatter_add(1, into, weight)
        weight = torch.where(total.gather(1, into) > 0, weight, 1)
        tokens = size_weighted_mean(x, source, count, weight, places).tokens
        return Reduction(places, tokens, source, take(score, places))

    def _leave(self, cell: Tensor, keep: int) -> Tensor:
        """(B,) how many tokens leave, whose cells (B, N) are given from the least important token on."""
        b, n = cell.shape
        if self.parity == "authors":
            return torch.full((b,), min(n, n - keep + int(n / self.cell**2)), device=cell.device)
        by_cell, at = cell.sort(dim=1, stable=True)
        new = torch.ones_like(cell)
        new[:, 1:] = by_cell.diff(dim=1) > 0
        new = torch.empty_like(cell).scatter(1, at, new)
        # Once i + 1 tokens left, this many are left: it falls by 0 or 1, so that every count above the cells' occurs.
        left = n + (new - 1).cumsum(1)
        return ((left > keep).sum(1) + 1).clamp_max(n)

    def _cells(self, evidence: Evidence) -> tuple[Tensor, int]:
        """(N,) int64 the grid cell of each token, and how many there are."""
        parts, count = [], 0
        for h, w in evidence.crops or (evidence.grid or (1, evidence.num_tokens),):
            rows, columns = ((torch.arange(side) / self.cell).floor().long() for side in (h, w))
            across = int(columns[-1]) + 1
            parts.append((rows[:, None] * across + columns + count).flatten())
            count += (int(rows[-1]) + 1) * across
        return torch.cat(parts).to(evidence.features.device), count

    # Inside the language model --------------------------------------------------------------------------------------

    def at_layer(self, evidence: Evidence, keep: int, layer: int) -> Reduction:
        """Top-k by the map that the stage before carried here."""
        score = self.token_scores(evidence, layer)
        kept = Reduction.select(evidence.features, ranking(score)[:, :keep])
        return Reduction(kept.keep, kept.tokens, kept.source, take(score, kept.keep))

    def token_scores(self, evidence: Evidence, layer: int | None = None) -> Tensor:
        return self.importance(evidence) if evidence.carry is None else evidence.carry


def patch_entropy(pixels: Tensor) -> Tensor:
    """(B, N) bits: Shannon entropy of each patch's grey values (B, N, P), in 256 levels of the picture's range."""
    pixels = upcast(pixels)
    low, high = pixels.amin((1, 2), keepdim=True), pixels.amax((1, 2), keepdim=True)
    scale = torch.where(high > low, high - low, 1)
    level = ((pixels - low) / scale * 255).round().long()
    share = pixels.new_zeros(*pixels.shape[:2], 256).scatter_add(2, level, torch.ones_like(pixels)) / pixels.shape[2]
    return -torch.special.xlogy(share, share).sum(2) / math.log(2)


def claim(trial: Trial) -> Outcome:
    """The authors' summary: 90% of the tokens pruned, 90% of the performance kept (the strategy shipped for it)."""
    shipped = VFlowOpt(threshold=39.26, cell=17.39, ratio_1=1.0, ratio_2=0.6011)
    dense = trial.accuracy(None)
    pruned = trial.accuracy(shipped, keep=0.1)
    return Outcome("accuracy with 10% of the tokens", baseline=dense, value=pruned, holds=pruned >= 0.9 * dense)
