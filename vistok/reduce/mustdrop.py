"""MustDrop: judge a token at each moment of its life, and never drop the few that the vision encoder stands by.

What: filters in a row. *Encoding*: windows of 3 x 3 patches that are alike after the encoder's first layer become one
token each, their mean; of what is left, the 8% that the class token attends to most are the key set, which no later
filter touches. *Prefill*: a token goes if both its share of the text's attention and the largest attention that a
single text token pays to it are small. *Decoding*: once the prompt is read, the cache of the layers from the first
filter on is cut down to the tokens that passed the last. Source: Liu et al., arXiv 2411.10803, liuting20/MustDrop.
Where: encoder output, before the projector; then four decoder layers in the first half of the depth; the cache.

``keep`` is the mean over the decoder's layers, a geometric fall to an eighth over the five stages (the authors publish
thresholds, not counts; an eighth of the first stage has room for the key set). Windows merge, most alike first, until
the count is met, the last one as far as needed; where even all windows leave too many, the least attended go. Inside
the language model tokens are ranked by ``max(individual * share, largest)``, and the best ``keep`` of that are what the
published filter leaves at the thresholds that leave so many. With ``threshold`` both filters are the published ones and
the picture decides how many stay. Windows at a border that they do not divide are cut as evenly as possible; without a
class token the key set is the most attended.

Departures: windows are chosen after layer 0 but merged at the encoder's output, so that the encoder itself becomes no
faster and a merged token attends as its patches did (the host cannot run the later layers on fewer tokens). A decoder
stage acts before its layer, on that layer's attention (released: after it), and its queries are the question's tokens
(released: all that follow the picture). Merged tokens stand at the middles of their windows; the released code puts
them in front, most alike first: ``parity="authors"``, where the values stand in that order on ascending places.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core.merge import size_weighted_mean, window_mean
from vistok.core.position import rest
from vistok.core.ragged import positions
from vistok.core.score import cls_mean
from vistok.core.select import topk, topk_per_group
from vistok.core.stages import geometric_stages, stage_starts
from vistok.core.tensors import ranking, take, unit
from vistok.host.reducer import Evidence, LayerNeed, LayerSpec, Reducer, Reduction, Schedule

CARD = Card(
    title="Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model (MustDrop)",
    kind="training-free",
    site="encoder output, before the projector; decoder layers at 1/16, 3/16, 5/16 and 7/16 of the depth; cache",
    paper="Liu et al., 2024, arXiv 2411.10803",
    repository="liuting20/MustDrop",
    mechanism=("similarity", "attention", "query"),
    needs=(
        "hidden states after the first encoder layer",
        "class-token attention of the last encoder layer (received attention where there is no class token)",
        "attention of the question's tokens to the visual tokens at four decoder layers",
    ),
    score="mean cosine inside a window; class-token attention; share and maximum of the question's attention",
    allocate="a geometric fall over five stages",
    select="top-k beside a key set that is always kept",
    merge="windows of 3 x 3 that are alike become their mean",
    claim="Keeps 90% of the dense accuracy at a compression of 92.2%.",
    departures=(
        "windows are merged at the encoder's output, not after its first layer",
        "decoder stages act before their layers, and only the question's tokens are queries",
        "merged tokens stand at the middles of their windows, not in front",
    ),
)


@dataclass(frozen=True)
class MustDrop(Reducer):
    """Window merge and key set at the encoder, four dual attention filters inside the language model."""

    window: int = 3
    """Side of a window, in tokens."""
    key_share: float = 0.08
    """Share of the tokens after the merge that is never dropped, rounded up."""
    individual: float = 1.0
    """What a single text token must attend with, as a multiple of the share that all of them must (the released
    thresholds: 1 for 192 tokens, 0.83 for 128, 0.91 for 64)."""
    threshold: float | None = None
    """None: fixed counts. A number: the filters as published, with this least share (released: 0.001 for 192 tokens,
    0.0012 for 128, 0.011 for 64), whatever ``keep``, short of all tokens."""
    similarity: float = 0.8
    """With ``threshold``: windows of at least this mean cosine merge; above 1 none does."""
    fall: float = 1 / 8
    """With fixed counts: tokens of the last stage as a share of those of the first."""
    depths: tuple[float, ...] = (1 / 16, 3 / 16, 5 / 16, 7 / 16)
    """Where in the decoder the filters act, as shares of its layers."""
    merge_layer: int = 0
    """Encoder layer after which windows are compared."""
    layer: int = -1
    """Encoder layer whose class-token attention names the key set."""
    parity: Literal["paper", "authors"] = "paper"
    """"authors": merged tokens in front as in the released code."""

    space: ClassVar[Literal["projected", "encoder"]] = "encoder"
    whole_picture: ClassVar[bool] = True
    cache: ClassVar[Literal["seen", "survivors"]] = "survivors"

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window: got {self.window}, must be 1 or more")
        if not 0 <= self.key_share <= 1:
            raise ValueError(f"key_share: got {self.key_share}, must be in [0, 1]")
        if not 0 < self.fall <= 1:
            raise ValueError(f"fall: got {self.fall}, must be in (0, 1]")
        for name in ("individual", "threshold"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, must be 0 or more")
        if list(self.depths) != sorted(self.depths) or not all(0 < depth < 1 for depth in self.depths):
            raise ValueError(f"depths: got {self.depths}, must rise within (0, 1)")
        if self.parity not in ("paper", "authors"):
            raise ValueError(f"parity: got {self.parity!r}, must be 'paper' or 'authors'")

    @property
    def one_at_a_time(self) -> bool:  # type: ignore[override]
        """True if thresholds decide how many tokens stay."""
        return self.threshold is not None

    @property
    def needs(self) -> Mapping[str, LayerSpec]:
        return {"encoder_features": None, "encoder_states": self.merge_layer, "cls_attention": self.layer}

    @property
    def layer_needs(self) -> Mapping[str, LayerNeed]:
        return {"llm_attention": "text"}

    def schedule(self, num_tokens: int, keep: int, num_layers: int) -> Schedule:
        if self.threshold is None or keep == num_tokens:
            return Schedule(*geometric_stages(self.depths, self.fall, keep, num_tokens, num_layers))
        starts = stage_starts(self.depths, num_layers)
        return Schedule(keep, {start: 0 for start in starts if start})

    # Encoding -----------------------------------------------------------------------------------------------------

    def compress(self, evidence: Evidence, keep: int) -> Reduction:
        """Merge windows, name the key set; ``carry`` (B, K) is what the class token pays to it, -1 for other tokens."""
        x, n = evidence.encoder_features, evidence.num_tokens
        states = unit(evidence.encoder_states)
        window, middle, size, total, similarity = self._windows(evidence, states)
        by_similarity = ranking(torch.where(size > 1, similarity, -torch.inf))
        room = (size - 1).gather(1, by_similarity)
        if self.threshold is None:
            want = min(n - keep, int(room[0].sum()))
            loss = (want - room.cumsum(1) + room).clamp_min(0).minimum(room)
        else:  # the batch merges as many windows as its least uniform picture (released)
            alike = int((similarity >= self.similarity).sum(1).min())
            loss = torch.where(torch.arange(room.shape[1], device=x.device) < alike, room, 0)
        loss = torch.zeros_like(loss).scatter(1, by_similarity, loss)

        # What is left of a window that merges in part should be unlike it: the most typical tokens go first.
        typical = (states * take(total, window)).sum(2).scatter(1, middle, -torch.inf)
        gone = topk_per_group(typical, window, loss)
        stay = rest(gone, n)
        slot = torch.zeros_like(window).scatter(1, stay, torch.arange(stay.shape[1], device=x.device).expand_as(stay))
        source = slot.scatter(1, gone, slot.gather(1, middle).gather(1, window.gather(1, gone)))
        merged = size_weighted_mean(x, source, stay.shape[1], anchor=stay)

        attention = cls_mean(evidence.cls_attention).unsqueeze(2)
        attention = size_weighted_mean(attention, source, stay.shape[1]).tokens[..., 0]
        if self.parity == "authors":
            order = self._merged_first(merged.size, similarity, take(window, stay))
        else:
            order = torch.arange(stay.shape[1], device=x.device).expand_as(stay)
        if self.threshold is None and stay.shape[1] > keep:
            order = order.gather(1, topk(attention.gather(1, order), keep).sort(1).values)
        slots = torch.arange(order.shape[1], device=x.device).expand_as(order)
        to = torch.full_like(stay, -1).scatter(1, order, slots)
        carry = self.key_set(attention.gather(1, order))
        places = stay.gather(1, order).sort(1).values
        return Reduction(places, take(merged.tokens, order), to.gather(1, source), carry)

    def key_set(self, attention: Tensor) -> Tensor:
        """``attention`` (B, N) where it is one of the ``key_share`` largest, -1 elsewhere."""
        count = math.ceil(self.key_share * attention.shape[1] - 1e-9)
        key = topk(attention, count)
        return torch.full_like(attention, -1).scatter(1, key, attention.gather(1, key))

    def _windows(self, evidence: Evidence, states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Each token's window (B, N); each window's middle token, size (B, W), sum of its ``states`` (B, N, D), which
        have length 1 or 0, (B, W, D), and mean cosine of its ordered pairs (B, W)."""
        states = torch.cat([states, states.square().sum(2, keepdim=True)], 2)
        grids = evidence.crops or (evidence.grid or (1, evidence.num_tokens),)
        parts = zip(states.split([h * w for h, w in grids], 1), grids, strict=True)
        found = [window_mean(x, (h, w), (-(-h // self.window), -(-w // self.window))) for x, (h, w) in parts]
        first_window = [sum(f.size.shape[1] for f in found[:i]) for i in range(len(found))]
        first_token = [sum(f.source.shape[1] for f in found[:i]) for i in range(len(found))]
        window = torch.cat([f.source + first for f, first in zip(found, first_window, strict=True)], 1)
        middle = torch.cat([f.anchor + first for f, first in zip(found, first_token, strict=True)], 1)
        size = torch.cat([f.size for f in found], 1)
        total = torch.cat([f.tokens for f in found], 1) * size.unsqueeze(2)
        pairs = total[..., :-1].square().sum(2) - total[..., -1]  # the square of the sum, less each token with itself
        return window, middle, size.long(), total[..., :-1], pairs / (size * (size - 1)).clamp_min(1)

    def _merged_first(self, size: Tensor, similarity: Tensor, window: Tensor) -> Tensor:
        """(B, K) released order of slots of ``size`` (B, K) that stand in ``window`` (B, K)."""
        return ranking(torch.where(size > 1, similarity.gather(1, window), -torch.inf), size > 1)

    # Prefill ------------------------------------------------------------------------------------------------------

    def at_layer(self, evidence: Evidence, keep: int, layer: int) -> Reduction:
        """The ``keep`` best beside the key set, or all that pass the thresholds; the key set goes on as ``carry``."""
        key = self.key_set(cls_mean(evidence.cls_attention)) if evidence.carry is None else evidence.carry
        score = self.relevance(evidence.llm_attention, evidence.text_mask)
        if self.threshold is None:
            places = ranking(torch.where(key >= 0, key.to(score.dtype), score), key >= 0)[:, :keep]
        else:
            places, real = positions((score >= self.individual * self.threshold) | (key >= 0))
            if not bool(real.all()):
                raise ValueError(f"threshold: leaves {real.sum(1).tolist()} tokens; give one picture at a time")
        reduction = Reduction.select(evidence.features, places)
        return Reduction(reduction.keep, reduction.tokens, reduction.source, key.gather(1, reduction.keep))

    def relevance(self, attention: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """(B, N) ``max(individual * share, largest)``: at least ``individual * g`` iff the published filter keeps it.

        ``attention`` (B, H, Q, N): rows of the whole causal softmax restricted to visual keys; ``text_mask`` (B, Q) is
        False at padding. ``share`` of all attention to visual tokens, 1 where there is none; ``largest`` by one query.
        """
        rows = attention.mean(1)
        if text_mask is not None:
            rows = rows * text_mask.unsqueeze(2)
        paid = rows.sum(1)
        total = paid.sum(1, keepdim=True)
        share = torch.where(total > 0, paid / total, 1)
        return torch.maximum(self.individual * share, rows.amax(1) if rows.shape[1] else paid)


def claim(trial: Trial) -> Outcome:
    """The abstract: comparable accuracy of LLaVA at a compression of 92.2% (which is 88.5% fewer FLOPs there).

    "Comparable" is taken as 90% of the dense accuracy.
    """
    dense = trial.accuracy(None)
    pruned = trial.accuracy(MustDrop(), keep=0.078)
    return Outcome("accuracy with 7.8% of the tokens", baseline=dense, value=pruned, holds=pruned >= 0.9 * dense)
