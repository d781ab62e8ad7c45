"""LVLM_CSP: reason coarsely on a few tokens, then finely on all of them, then cheaply on those that matter.

What: a token that has to say exactly where something is suffers when visual tokens are dropped early for good. So they
are not: *clustering*, in the first layers only representatives take part; *scattering*, in the next few all tokens do,
those that were left out as they were when they were left out; *pruning*, before the last layers only those stay that
the last token of the prompt attends to most. Source: Chen et al., arXiv 2504.10854; no code was released. Where: before
three decoder layers. Positions are those of the picture throughout; layers of the first range hold no keys of tokens
that were left out.

``keep`` is the mean over the decoder's layers. The paper's layers and counts are not known: here all tokens take part
in layers 12 to 14 of 32, or the same share of other depths, at least one layer; the ranges before and after have equal
counts; and scattering is cut short, at last to nothing, where it alone would cost more than ``keep``.

Departures: in the paper the query of the pruning is the [SEG] token of a segmentation model; in generation it is not
there yet, so the last token of the prompt stands for it. The choice by an instance segmenter is left out: the host has
none. ``restore="add-delta"`` is ours: who was left out moves as its most similar representative did.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core import select
from vistok.core.merge import nearest_slot
from vistok.core.score import cls_mean
from vistok.core.tensors import take
from vistok.host.reducer import Evidence, LayerNeed, LayerSpec, Reducer, Reduction, Schedule

CARD = Card(
    title="LVLM_CSP: Accelerating Large Vision Language Models via Clustering, Scattering, and Pruning for Reasoning "
    "Segmentation",
    kind="training-free",
    site="before three decoder layers: some tokens, all tokens, some tokens",
    paper="Chen et al., 2025, arXiv 2504.10854",
    needs=("attention of the prompt's last token at one decoder layer", "hidden states of tokens that were left out"),
    mechanism=("attention", "query"),
    score="attention of the prompt's last token",
    allocate="few, all, few: three ranges of layers",
    select="representatives at a uniform stride; then top-k",
    claim="Keeps the dense accuracy with 65% fewer visual tokens, averaged over the layers.",
)


@dataclass(frozen=True)
class LVLMCSP(Reducer):
    """Few tokens, all tokens, few tokens."""

    choice: Literal["uniform", "cls", "random"] = "uniform"
    """Representatives: at a uniform stride, those with most class-token attention, or random."""
    restore: Literal["identity", "add-delta"] = "identity"
    """How the others come back: as they were, or moved as their nearest representative (by cosine) has."""
    scatter: tuple[float, float] = (3 / 8, 15 / 32)
    """The range of layers in which all tokens take part, as shares of the decoder's layers."""
    fall: float = 1
    """Tokens after that range as a share of those before it, at most 1."""
    layer: int = -2
    """Encoder layer of the class-token attention."""
    seed: int = 0
    """Of the random representatives."""

    whole_picture: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.choice not in ("uniform", "cls", "random"):
            raise ValueError(f"choice: got {self.choice!r}, must be 'uniform', 'cls' or 'random'")
        if self.restore not in ("identity", "add-delta"):
            raise ValueError(f"restore: got {self.restore!r}, must be 'identity' or 'add-delta'")
        if not 0 < self.scatter[0] < self.scatter[1] <= 1:
            raise ValueError(f"scatter: got {self.scatter}, must be two depths that rise within (0, 1]")
        if not 0 < self.fall <= 1:
            raise ValueError(f"fall: got {self.fall}, must be in (0, 1]")

    @property
    def needs(self) -> Mapping[str, LayerSpec]:
        return {"cls_attention": self.layer} if self.choice == "cls" else {}

    @property
    def layer_needs(self) -> Mapping[str, LayerNeed]:
        return {"llm_attention": "last"}

    def schedule(self, num_tokens: int, keep: int, num_layers: int) -> Schedule:
        """All tokens in the middle range, equal counts (or ``fall``) around it, a mean of ``keep`` or a bit less."""
        if keep == num_tokens:
            return Schedule(num_tokens)
        start, end = (math.ceil(share * num_layers - 1e-9) for share in self.scatter)
        end = min(max(end, start + 1), num_layers)
        budget = keep * num_layers
        while end > start and num_tokens * (end - start) + num_layers - (end - start) > budget:
            end -= 1
        budget -= num_tokens * (end - start)

        def after(count: int) -> int:
            return max(1, math.floor(self.fall * count + 0.5)) if end < num_layers else 0

        few = next(n for n in range(num_tokens, 0, -1) if start * n + (num_layers - end) * after(n) <= budget)
        spare = budget - start * few - (num_layers - end) * after(few)
        more = min(num_tokens - few, spare // start)
        last = after(few)
        if end < num_layers:
            last += min(few + more - last, (spare - more * start) // (num_layers - end))
        layers = {0: few + more} | ({start: num_tokens} if end > start else {})
        return Schedule(num_tokens, layers | ({end: last} if end < num_layers else {}))

    def select(self, evidence: Evidence, keep: int) -> Tensor:
        """The representatives (B, keep)."""
        x, n = evidence.features, evidence.num_tokens
        if self.choice == "cls":
            return select.topk(cls_mean(evidence.cls_attention), keep)
        if self.choice == "random":
            return select.random(1, n, keep, self.seed, device=x.device).expand(len(x), keep)
        return (torch.arange(keep, device=x.device) * (n // max(keep, 1))).expand(len(x), keep)

    def at_layer(self, evidence: Evidence, keep: int, layer: int) -> Reduction:
        if layer == 0:
            return Reduction.select(evidence.features, self.select(evidence, keep))
        return Reduction.select(evidence.features, select.topk(evidence.llm_attention.mean(1)[:, 0], keep))

    def come_back(self, aside: Tensor, keep: Tensor, states: Tensor) -> Tensor:
        if self.restore == "identity":
            return super().come_back(aside, keep, states)
        moved = states - take(aside, keep)
        return super().come_back(aside + take(moved, nearest_slot(aside, keep)), keep, states)


def claim(trial: Trial) -> Outcome:
    """The abstract: 65% fewer visual-token FLOPs without loss of accuracy, in reasoning segmentation on a 7B model."""
    dense, pruned = trial.accuracy(None), trial.accuracy(LVLMCSP(), keep=0.35)
    return Outcome(
        "accuracy with 35% of the tokens",
        baseline=dense,
        value=pruned,
        holds=pruned >= dense,
        note="questions, no masks",
    )
