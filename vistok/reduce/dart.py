"""DART: keep a few pivot tokens and, for each, the tokens that duplicate it least.

What: importance is a poor guide, duplication a good one, and it needs no attention map. Pivots are the visual tokens
with the longest keys and a few tokens of the question. One pivot after the other takes, of the tokens that are left,
its share of those least similar to it (cosine of the hidden states). Source: Wen et al., arXiv 2502.11494,
ZichenWen1/DART. Where: before decoder layer 2, once; visual pivots stay, and a picture that was cut is one set.

``keep`` is the mean over the decoder's layers, the full ones in front included. Where two layers of all tokens would
spend more than 3/4 of the budget, the stage is one or two layers earlier: ``vistok.core.stages.stages_from_all``.

Departures: keys are those of the layer that is about to run, mean over heads (released: of the layer before it, heads
side by side). The question is as embedded at the language model's input, its pivots the longest embeddings; the
released code takes its keys and its hidden states at that layer, and applies the final norm to all states. Pivots take
their shares in order of length, visual ones first, and the pivots are part of ``keep``; released: in the order of a
Python set, and the visual pivots are added to the count. Without a question, all shares go to the visual pivots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core.ragged import top_mask
from vistok.core.select import topk
from vistok.core.stages import stages_from_all
from vistok.core.tensors import take, unit, upcast
from vistok.host.reducer import Evidence, LayerNeed, LayerSpec, Reducer, Reduction, Schedule

CARD = Card(
    title="Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More (DART)",
    kind="training-free",
    site="before decoder layer 2, or an earlier one where the budget does not allow for full layers",
    paper="Wen et al., 2025, arXiv 2502.11494",
    repository="ZichenWen1/DART",
    needs=("question embeddings", "keys of the visual tokens at one decoder layer"),
    mechanism=("similarity", "query"),
    score="cosine to pivots: the tokens with the longest keys and the longest embeddings of the question",
    allocate="equal shares for all pivots",
    select="each pivot's least similar tokens",
    claim="Prunes 88.9% of the visual tokens while maintaining comparable performance (here: 90% of it or more).",
    departures=(
        "question pivots from the language model's input embeddings",
        "keys of the layer about to run, mean over heads; states without the final norm",
        "pivots in order of length, and within the count",
    ),
)


@dataclass(frozen=True)
class DART(Reducer):
    """Least duplication with a few pivots."""

    visual_pivots: int = 4
    """Visual tokens with the longest keys; they stay."""
    text_pivots: int = 4
    """Question tokens with the longest embeddings, at most as many as there are; 0: the question does not matter."""
    layer: int = 2
    """Decoder layer before which tokens are dropped, or an earlier one where the budget asks for it."""

    whole_picture: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, least in (("visual_pivots", 1), ("text_pivots", 0), ("layer", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, must be {least} or more")

    @property
    def needs(self) -> Mapping[str, LayerSpec]:
        return {"text": None} if self.text_pivots else {}

    @property
    def layer_needs(self) -> Mapping[str, LayerNeed]:
        return {"llm_keys": None}

    def schedule(self, num_tokens: int, keep: int, num_layers: int) -> Schedule:
        depth = min(self.layer / num_layers, 1)
        return Schedule(num_tokens, stages_from_all((depth,), (1,), keep, num_tokens, num_layers))

    def select(self, evidence: Evidence, keep: int) -> Tensor:
        x = unit(evidence.features)
        first = topk(taxicab(evidence.llm_keys), min(self.visual_pivots, keep))
        pivots, real = take(x, first), torch.ones_like(first, dtype=torch.bool)
        if self.text_pivots:
            text, mask = text_pivots(evidence.text, evidence.text_mask, self.text_pivots)
            pivots, real = torch.cat([pivots, text.to(x.dtype)], 1), torch.cat([real, mask], 1)
        chosen = torch.zeros_like(x[..., 0], dtype=torch.bool).scatter(1, first, True)
        return least_similar(x, pivots, real, chosen, keep)

    def at_layer(self, evidence: Evidence, keep: int, layer: int) -> Reduction:
        return Reduction.select(evidence.features, self.select(evidence, keep))


def taxicab(x: Tensor) -> Tensor:
    """(B, N): sum of the absolute entries of each row, the length that the authors rank keys by."""
    return upcast(x).abs().sum(2)


def text_pivots(text: Tensor, mask: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` longest rows of ``text`` (B, T, D), all of them if there are fewer, and which of them are real.

    Unit rows (B, P, D), at least in float32, longest first, and (B, P) bool. ``mask`` (B, T) is False at padding.
    """
    if mask is None:
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    best = topk(taxicab(text).masked_fill(~mask, -1), min(count, text.shape[1]))
    return unit(take(text, best)), mask.gather(1, best)


def least_similar(x: Tensor, pivots: Tensor, real: Tensor, chosen: Tensor, keep: int) -> Tensor:
    """(B, keep) ascending: ``chosen`` (B, N) bool tokens, and those that the ``pivots`` (B, P, D) take one by one.

    Each of the ``real`` (B, P) pivots takes an equal share, the first ones one more if it does not divide, of the
    tokens of ``x`` (B, N, D) that nobody took and that have the least dot product with it, ties to the lower index.
    """
    left = keep - chosen.sum(1, keepdim=True)
    parts = real.sum(1, keepdim=True).clamp_min(1)
    place = real.cumsum(1) - 1
    shares = (left // parts + (place < left % parts)) * real
    similarity = torch.bmm(pivots, x.transpose(1, 2))
    for pivot in range(pivots.shape[1]):
        chosen = chosen | top_mask(-similarity[:, pivot], shares[:, pivot], ~chosen)
    return chosen.int().sort(dim=1, descending=True, stable=True).indices[:, :keep]


def claim(trial: Trial) -> Outcome:
    """The abstract: 88.9% of the vision tokens pruned at comparable performance; the paper counts behind layer 2.

    Here 1/9 is the mean over all layers, which leaves DART fewer. The abstract's speed is measured, and not part of
    the verdict: it was taken on another model, with decoding.
    """
    dense, pruned = trial.accuracy(None), trial.accuracy(DART(), keep=1 / 9)
    speedup = trial.ttft_ms(None) / trial.ttft_ms(DART(), keep=1 / 9)
    return Outcome(
        "accuracy with 1/9 of the tokens",
        baseline=dense,
        value=pruned,
        holds=pruned >= 0.9 * dense,
        note=f"first token {speedup:.2f} times sooner (paper: prefill 2.99)",
    )
