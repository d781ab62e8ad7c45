"""ToDRE: keep a few diverse tokens, and drop even those late in the language model if the question does without them.

What: diversity and relevance to the task are two kinds of redundancy. Stage 1, before the language model: from the
token that the class token attends to most, add one after the other the token least similar to all chosen ones. Stage 2,
before decoder layer 7L/8: by then the picture's information has moved to the text; if the question's attention to the
visual tokens is below tau, all of them are dropped, in this and all later layers and in decoding. Source: Li, Yang, Lu,
arXiv 2505.18757; no code was released. Where: projector output, and one decoder layer. A picture that was cut is
reduced as a whole, its pivot taken from the thumbnail; without a class token the pivot is the most attended token.

``keep`` is what stage 1 leaves. What stage 2 leaves, all or nothing, depends on picture and question, so that the mean
over the layers is between 7/8 of ``keep`` and ``keep``. With all tokens kept nothing is dropped in either stage.

Departures: none known. The paper also asks that the attention of visual to text tokens be below tau, which a causal
mask makes 0 where the text follows the picture; where it comes before the picture, no question token can see it, and
the tokens stay. Attention is that of layer 7L/8 itself, measured before it runs. The first version of the paper takes
the token farthest from its nearest chosen one: ``criterion="k-center"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core.score import cls_mean
from vistok.core.select import farthest_points, max_sum
from vistok.host.recipe import Recipe, SlotNeeds
from vistok.host.reducer import Evidence, LayerNeed, Reduction, Schedule

CARD = Card(
    title="ToDRE: Visual Token Pruning via Diversity and Task Awareness for Efficient Large Vision-Language Models",
    kind="training-free",
    site="projector output, before the language model; one decoder layer at 7/8 of the depth",
    paper="Li, Yang, Lu, 2025, arXiv 2505.18757",
    mechanism=("attention", "similarity", "query"),
    needs=(
        "class-token attention of the last encoder layer (received attention where there is no class token)",
        "attention of the question's tokens to the visual tokens at one decoder layer",
    ),
    score="cosine to the tokens chosen so far",
    select="greedy max-sum diversity from the most attended token; late in the language model all or nothing",
    claim="Keeps 95.1% of the dense accuracy with 90% of the visual tokens pruned.",
)


@dataclass(frozen=True)
class ToDRE(Recipe):
    """Greedy diversity before the language model, all-or-nothing relevance inside."""

    criterion: Literal["max-sum", "k-center"] = "max-sum"
    """Least summed cosine to the chosen tokens, or least largest cosine (first version of the paper)."""
    tau: float = 0.1
    """Share of the question's attention below which all visual tokens go; 0 never, above 1 always."""
    depth: float = 7 / 8
    """Where in the decoder stage 2 acts, as a share of its layers."""
    layer: int = -1
    """Encoder layer whose class-token attention names the pivot."""

    whole_picture: ClassVar[bool] = True
    greedy: ClassVar[bool] = True
    one_at_a_time: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.criterion not in ("max-sum", "k-center"):
            raise ValueError(f"criterion: got {self.criterion!r}, must be 'max-sum' or 'k-center'")
        if self.tau < 0:
            raise ValueError(f"tau: got {self.tau}, must be 0 or more")
        if not 0 < self.depth < 1:
            raise ValueError(f"depth: got {self.depth}, must be in (0, 1)")

    @property
    def slot_needs(self) -> SlotNeeds:
        return {"score": {"cls_attention": self.layer}}

    @property
    def layer_needs(self) -> Mapping[str, LayerNeed]:
        return {"llm_attention": "text"}

    def scores(self, evidence: Evidence) -> Tensor:
        return cls_mean(evidence.cls_attention)

    def pick(self, evidence: Evidence, scores: Tensor, keep: int) -> Tensor:
        height, width = evidence.crops[0] if evidence.crops else (1, evidence.num_tokens)
        pivot = scores[:, : height * width].argmax(1)
        if self.criterion == "max-sum":
            return max_sum(evidence.features, keep, pivot)
        return farthest_points(evidence.features, keep, pivot, metric="cosine")

    def schedule(self, num_tokens: int, keep: int, num_layers: int) -> Schedule:
        """``keep`` tokens, then possibly none. No second stage at ``keep == num_tokens`` or in a one-layer model."""
        layer = int(self.depth * num_layers)
        return Schedule(keep, {layer: 0} if layer and keep < num_tokens else {})

    def at_layer(self, evidence: Evidence, keep: int, layer: int) -> Reduction:
        """All tokens, or none where the question's attention to them is below ``tau``, whatever ``keep``."""
        mass = text_mass(evidence.llm_attention, evidence.text_mask)
        drop = (mass < self.tau) & ((mass > 0) | (self.tau > 1))  # exactly 0: no question token follows the picture
        if drop.any() and not drop.all():
            raise ValueError("evidence: only some pictures of the batch lose their tokens; give one picture at a time")
        left = 0 if drop.all() else evidence.num_tokens
        places = torch.arange(left, device=drop.device).expand(len(drop), left)
        return Reduction.select(evidence.features, places)


def text_mass(attention: Tensor, text_mask: Tensor | None = None) -> Tensor:
    """(B,) in [0, 1]: the share of the question's attention that goes to the visual tokens.

    ``attention`` (B, H, Q, N): rows of the whole causal softmax restricted to visual keys; ``text_mask`` (B, Q) is
    False at padding. 0 where there is no question, or none that follows the picture.
    """
    rows = attention.mean(1).sum(2)
    if text_mask is None:
        return rows.mean(1)
    return (rows * text_mask).sum(1) / text_mask.sum(1).clamp_min(1)


def claim(trial: Trial) -> Outcome:
    """The abstract: 90% pruned after the encoder and the rest where it is idle, 95.1% of the performance kept."""
    dense = trial.accuracy(None)
    pruned = trial.accuracy(ToDRE(), keep=0.1)
    return Outcome("accuracy with 10% of the tokens", baseline=dense, value=pruned, holds=pruned >= 0.951 * dense)
