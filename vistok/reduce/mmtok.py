"""MMTok: keep the tokens that together cover the question and the whole picture.

What: one criterion for both. P says how well each visual token stands for each question token (softmax of cosines over
the visual tokens), Q how well it stands for each other visual token, by encoder features. A set covers a row of the
stack [P; alpha Q] by its best member; the greedy choice is within 1 - 1/e of the best coverage. Source: Dong et al.,
arXiv 2508.18264, Ironieser/MMTok. Where: between the encoder and the language model, once; a picture that was cut is
reduced part by part. The question is the one the picture came with: in a later turn on the same cache its tokens stay.

Departures: none in the choice. Stop words are token ids (``ignore_ids``), as a reducer has no tokenizer; the released
code drops the words of a short English list. Once everything is covered, the tokens that stand for most of the picture
follow (the released code takes the first ones), and without a question vision coverage alone decides. The paper's
optional helper model, which drafts an answer, is not in the released path and not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core.score import cosine
from vistok.core.select import facility_location, topk
from vistok.host.recipe import Recipe, SlotNeeds
from vistok.host.reducer import Evidence, LayerSpec

CARD = Card(
    title="MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs",
    kind="training-free",
    site="projector output, before the language model",
    paper="Dong et al., 2025, arXiv 2508.18264",
    repository="Ironieser/MMTok",
    mechanism=("similarity", "query"),
    needs=("question embeddings", "encoder features"),
    score="softmax of cosines: question to picture, picture to picture",
    select="greedy coverage (facility location) of question and picture",
    claim="4 visual tokens keep 87.7% of the dense accuracy on existence questions (POPE).",
)


@dataclass(frozen=True)
class MMTok(Recipe):
    """Greedy maximisation of multimodal coverage."""

    tau_text: float = 0.02
    """Temperature of question-to-picture cosines."""
    tau_vision: float = 0.2
    """Temperature of picture-to-picture cosines."""
    alpha: float = 0.5
    """Weight of covering the picture; 0 covers the question only."""
    ignore_ids: tuple[int, ...] = ()
    """Token ids of the question that need no cover (articles, wh-words); if nothing else is left, all count."""

    def __post_init__(self) -> None:
        for name in ("tau_text", "tau_vision"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, must be greater than 0")
        if self.alpha < 0:
            raise ValueError(f"alpha: got {self.alpha}, must be 0 or more")

    @property
    def slot_needs(self) -> SlotNeeds:
        ids: Mapping[str, LayerSpec] = {"text_ids": None} if self.ignore_ids else {}
        return {"select": {"encoder_features": None, "text": None, **ids}}

    def question(self, evidence: Evidence) -> Tensor:
        """(B, T) bool: the question tokens to cover."""
        mask = evidence.text_mask
        if mask is None:
            mask = torch.ones(evidence.text.shape[:2], dtype=torch.bool, device=evidence.text.device)
        if not self.ignore_ids:
            return mask
        told = mask & ~torch.isin(evidence.text_ids, torch.tensor(self.ignore_ids, device=mask.device))
        return torch.where(told.any(1, keepdim=True), told, mask)

    def coverage(self, evidence: Evidence) -> tuple[Tensor, Tensor]:
        """P (B, T, N) and Q (B, N, N): how well each token (column) stands for each row; each matrix sums to 1."""
        asked = self.question(evidence)
        text = (cosine(evidence.text, evidence.features) / self.tau_text).softmax(2)
        text = text * asked.unsqueeze(2) / asked.sum(1).clamp_min(1)[:, None, None]
        vision = (cosine(evidence.encoder_features) / self.tau_vision).softmax(2)
        return text, vision / vision.shape[1]

    def pick(self, evidence: Evidence, scores: Tensor, keep: int) -> Tensor:
        return cover(*self.coverage(evidence), self.alpha, keep)


def cover(text: Tensor, vision: Tensor, alpha: float, keep: int, exclude: Tensor | None = None) -> Tensor:
    """(B, keep) tokens that cover ``text`` (B, T, N) and ``alpha * vision`` (B, N, N), greedily; no particular order.

    Picks that add nothing give way to the tokens of largest ``vision`` column sum. ``exclude`` (B, N) bool: never pick.
    """
    rows = torch.cat([text, alpha * vision], 1)
    picks = facility_location(rows, keep, exclude)
    covered = rows.gather(2, picks[:, None].expand(-1, rows.shape[1], -1)).cummax(2).values
    adds = (covered > pad(covered, (1, 0))[..., :-1]).any(1)
    mass = vision.sum(1) if exclude is None else vision.sum(1).masked_fill(exclude, -torch.inf)
    return topk(mass.scatter(1, picks, torch.where(adds, torch.inf, mass.gather(1, picks))), keep)


def claim(trial: Trial) -> Outcome:
    """The abstract: on POPE, LLaVA-1.5-7B keeps 87.7% of its performance with 4 of 576 tokens."""
    dense = trial.accuracy(None, tasks=("existence",))
    pruned = trial.accuracy(MMTok(), keep=4, tasks=("existence",))
    return Outcome("existence accuracy with 4 tokens", baseline=dense, value=pruned, holds=pruned >= 0.877 * dense)
