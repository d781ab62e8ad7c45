"""FlashVLM: half of the tokens for the question and the eye together, half for a background without duplicates.

What: attention inside the language model is a noisy guide. Relevance to the question is measured outside of it, as the
cosine of projected tokens to the question's embeddings, sharpened, and fused in the log domain with the class token's
attention: score = attention^(1 - eta) * relevance^eta. The best half of the budget stays; of the others near-duplicates
are dropped, a few a round, until the other half is left. Source: Cai et al., arXiv 2512.20561, CaiKaitong/FlashVLM
(made from VisPruner). Where: between the projector and the language model, once; part by part of a cut picture.

Relevance: tokens of the question are weighted by their embeddings' length (the longest is 1), and for each picture
token by a softmax of the cosines over ``token_temperature``; then softmax over the picture's tokens at
``temperature``, power ``gamma``, rescaled to 0..1, all but the top ``top_p`` multiplied by ``damp``, rescaled again.
All of it in float32: half precision underflows. Without a question the ranking is that of attention.

Departures: the released LLaVA code measures the embeddings' length after it has normalised them, so that all weigh the
same (``parity="authors"``; its Qwen code does as the paper says). The question is the text behind the picture; the
released code takes all text around it, system prompt included. Encoders without a class token: received attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core.score import cls_mean
from vistok.core.select import drop_duplicates_even_odd
from vistok.core.tensors import length, ranking, take, unit, upcast
from vistok.host.recipe import Recipe, SlotNeeds
from vistok.host.reducer import Evidence

CARD = Card(
    title="FlashVLM: Text-Guided Visual Token Selection for Large Multimodal Models",
    kind="training-free",
    site="projector output, before the language model",
    paper="Cai et al., 2025, arXiv 2512.20561",
    repository="CaiKaitong/FlashVLM",
    mechanism=("query", "attention", "similarity"),
    needs=(
        "class-token attention of one encoder layer (received attention where there is no class token)",
        "question embeddings",
        "encoder features",
    ),
    score="class-token attention times sharpened cosine to the question, geometric mean",
    allocate="half to the best scores, half to the background",
    select="top-k; of the others even against odd places, the most alike dropped first",
    claim="Keeps 92.8% of the dense accuracy with 5.6% of the visual tokens.",
    departures=("question tokens are weighted by the length of their embeddings before these are normalised",),
)

FLOOR = 1e-6
"""Scores below it count as it, so that their logarithms are finite; added to divisors too. As released."""


@dataclass(frozen=True)
class FlashVLM(Recipe):
    """Attention and relevance to the question for one half of the tokens, few duplicates in the other."""

    eta: float = 0.5
    """Weight of the question: 0 ranks by attention alone (VisPruner), 1 by relevance alone."""
    important: float = 0.5
    """Share of the tokens that is taken by score, rounded down."""
    step: int = 8
    """Duplicates that are dropped at once."""
    token_temperature: float = 0.05
    """Of the softmax over the question's tokens."""
    temperature: float = 0.01
    """Of the softmax over the picture's tokens."""
    gamma: float = 2.5
    """Power that sharpens the relevance."""
    top_p: float = 0.005
    """Share of the tokens whose relevance is not damped."""
    damp: float = 0.1
    """What the relevance of the others is multiplied by."""
    layer: int = -2
    """Encoder layer whose class-token attention is used."""
    parity: Literal["paper", "authors"] = "paper"
    """"authors": all tokens of the question weigh the same."""

    def __post_init__(self) -> None:
        for name in ("eta", "important", "top_p", "damp"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, must be in [0, 1]")
        for name in ("token_temperature", "temperature", "gamma", "step"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, must be greater than 0")
        if self.parity not in ("paper", "authors"):
            raise ValueError(f"parity: got {self.parity!r}, must be 'paper' or 'authors'")

    @property
    def slot_needs(self) -> SlotNeeds:
        return {"score": {"cls_attention": self.layer, "text": None}, "select": {"encoder_features": None}}

    def relevance(self, evidence: Evidence) -> Tensor:
        """(B, N) in [0, 1]: what the question asks for; 0 for a picture without a question."""
        text, mask = evidence.text, evidence.text_mask
        if mask is None:
            mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        rows = unit(text)
        if self.parity == "paper":
            norm = length(text) * mask
            longest = norm.amax(1, keepdim=True) if norm.shape[1] else norm
            rows = rows * (norm / (longest + FLOOR))[..., None]
        cosine = torch.bmm(unit(evidence.features), rows.transpose(1, 2))
        weights = (cosine / self.token_temperature).masked_fill(~mask[:, None], -torch.inf).softmax(2)
        x = (cosine * weights).masked_fill(~mask[:, None], 0).sum(2)
        x = rescaled((x / self.temperature).softmax(1) ** self.gamma)
        bright = x >= x.quantile(1 - self.top_p, dim=1, keepdim=True)
        return rescaled(torch.where(bright, x, self.damp * x))

    def scores(self, evidence: Evidence) -> Tensor:
        """(B, N) what the important half is chosen by."""
        return log_fuse(rescaled(upcast(cls_mean(evidence.cls_attention))), self.relevance(evidence), self.eta)

    def pick(self, evidence: Evidence, scores: Tensor, keep: int) -> Tensor:
        order, important = ranking(scores), int(self.important * keep)
        others = order[:, important:]
        background = take(evidence.encoder_features, others)
        places = drop_duplicates_even_odd(background, keep - important, self.step, order="author")
        return torch.cat([order[:, :important], others.gather(1, places)], 1)


def rescaled(x: Tensor) -> Tensor:
    """``x`` (B, N) mapped to 0..1 in each row, to 0 where all are equal."""
    low, high = x.aminmax(dim=1, keepdim=True)
    return (x - low) / (high - low + FLOOR)


def log_fuse(attention: Tensor, relevance: Tensor, eta: float) -> Tensor:
    """Geometric mean of two scores in [0, 1], of weight 1 - ``eta`` and ``eta``; neither below 1e-6."""
    logs = (1 - eta) * attention.clamp_min(FLOOR).log() + eta * relevance.clamp_min(FLOOR).log()
    return logs.exp()


def claim(trial: Trial) -> Outcome:
    """The abstract: 92.8% of the accuracy of LLaVA-1.5 under 94.4% compression (32 of 576)."""
    dense = trial.accuracy(None)
    pruned = trial.accuracy(FlashVLM(), keep=0.056)
    return Outcome("accuracy with 5.6% of the tokens", baseline=dense, value=pruned, holds=pruned >= 0.928 * dense)
