"""The named steps of a recipe: what ``vistok.host.recipe.swap`` can put into each slot.

A step is a function with the signature of its slot (without ``self``) and states which evidence it reads. Any finite
scores will do, of either sign; a step that only *may* use them treats equal scores as none. What is compared (cosine,
length) are the projected tokens, ``Evidence.features``, so that a step means the same in every recipe. Encoder layers
are those that the recipe it is put into reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from vistok.core import score as scoring
from vistok.core import select as selecting
from vistok.core.allocate import even_sizes, split_budget
from vistok.core.cells import grid_cells
from vistok.core.merge import fold_contextual, knn_weighted, nearest_anchor
from vistok.core.tensors import length, take, unit, upcast
from vistok.host.reducer import Evidence

Slot = Literal["score", "allocate", "select", "merge", "order"]
SLOTS: tuple[Slot, ...] = ("score", "allocate", "select", "merge", "order")
"""In the order in which they run."""

LAYERED = ("cls_attention", "received_attention", "encoder_mean_keys")
"""The fields among those that steps read which belong to an encoder layer."""


class Shares(NamedTuple):
    """What each part of a picture gets of its budget."""

    sizes: list[int]
    """Tokens of each of P contiguous parts; they add up to N."""
    budgets: Tensor
    """(B, P) int64: how many of them stay, for each picture of the batch."""


@dataclass(frozen=True)
class Choice:
    """A named step and what it reads."""

    run: Callable[..., Any]
    needs: tuple[str, ...] = ()
    """Fields of Evidence besides ``features``."""
    reads_score: Literal["no", "may", "must"] = "no"
    seeded: bool = False
    """True if it takes a ``seed``."""


CHOICES: dict[Slot, dict[str, Choice]] = {slot: {} for slot in SLOTS}
"""By slot, then by name. The order slot has policies, no functions: see ``vistok.core.position.order``."""
CHOICES["order"] = {"raster": Choice(str), "author": Choice(str)}

Function = TypeVar("Function", bound=Callable[..., Any])


def step(
    slot: Slot, needs: tuple[str, ...] = (), reads_score: Literal["no", "may", "must"] = "no", seeded: bool = False
) -> Callable[[Function], Function]:
    """Enter a function under its name, without the slot's prefix."""

    def enter(run: Function) -> Function:
        CHOICES[slot][run.__name__.removeprefix(f"{slot}_")] = Choice(run, needs, reads_score, seeded)
        return run

    return enter


# score: (B, N), larger is better -----------------------------------------------------------------------------------


@step("score", needs=("cls_attention",))
def cls_attention(evidence: Evidence) -> Tensor:
    """Class-token attention, mean over heads."""
    return scoring.cls_mean(evidence.cls_attention)


@step("score", needs=("received_attention",))
def received_attention(evidence: Evidence) -> Tensor:
    """Attention that a token receives in the encoder, mean over heads and queries."""
    received: Tensor = evidence.received_attention
    return received


@step("score", needs=("text",))
def text_cosine(evidence: Evidence) -> Tensor:
    """Mean cosine to the question's tokens."""
    return scoring.text_similarity(evidence.features, evidence.text, evidence.text_mask)


@step("score")
def token_norm(evidence: Evidence) -> Tensor:
    """Length of the token."""
    return length(evidence.features)


@step("score")
def distinctness(evidence: Evidence) -> Tensor:
    """1 - the mean cosine to all tokens of the picture."""
    rows = unit(evidence.features)
    return 1 - torch.bmm(rows, rows.mean(1).unsqueeze(2)).squeeze(2)


@step("score", seeded=True)
def score_random(evidence: Evidence, seed: int = 0) -> Tensor:
    """Uniform random numbers, the same for all pictures of one size, drawn on the CPU so that devices agree."""
    x, n = evidence.features, evidence.num_tokens
    generator = torch.Generator().manual_seed(seed)
    if evidence.index is None:
        return torch.rand(1, n, generator=generator, dtype=torch.float64).to(x.device).expand(len(x), n)
    last = int(evidence.index.max()) + 1  # a part of a picture draws its own stretch of the numbers
    return torch.rand(last, generator=generator, dtype=torch.float64).to(x.device)[evidence.index]


@step("score")
def constant(evidence: Evidence) -> Tensor:
    """All tokens alike."""
    return evidence.features.new_ones(evidence.features.shape[:2], dtype=torch.float32)


# allocate: Shares, or None for one group of all tokens ---------------------------------------------------------------


@step("allocate")
def allocate_none(evidence: Evidence, scores: Tensor, keep: int) -> None:
    """One group of all tokens."""


@step("allocate", reads_score="may")
def chunks(evidence: Evidence, scores: Tensor, keep: int) -> Shares:
    """Chunks of the raster sequence in proportion to their mean score: HoloV's, without its variance (beta = 0)."""
    sizes = chunk_sizes(evidence.num_tokens, keep)
    scores = upcast(scores) - scores.amin(1, keepdim=True).clamp_max(0)
    means = torch.stack([part.mean(1) for part in scores.split(sizes, 1)], 1)
    return Shares(sizes, split_budget(means, keep, capacity=torch.tensor([sizes]), leftover="weight"))


@step("allocate")
def equal(evidence: Evidence, scores: Tensor, keep: int) -> Shares:
    """The same chunks, in proportion to their length."""
    return by_size(evidence, chunk_sizes(evidence.num_tokens, keep), keep)


@step("allocate")
def crops(evidence: Evidence, scores: Tensor, keep: int) -> Shares | None:
    """The parts of a cut picture (or the frames of a video) by their size; one group where it is in one piece."""
    return by_size(evidence, [h * w for h, w in evidence.crops], keep) if evidence.crops else None


def chunk_sizes(num_tokens: int, keep: int) -> list[int]:
    """Even chunks by HoloV's released rule, 1024 / 576 * N / keep of them: 16 for 64 of 576 tokens."""
    return even_sizes(num_tokens, int(1024 / 576 * num_tokens / keep))


def by_size(evidence: Evidence, sizes: list[int], keep: int) -> Shares:
    """Parts of ``sizes`` share ``keep`` in proportion to them."""
    room = torch.tensor([sizes], device=evidence.features.device)
    return Shares(sizes, split_budget(room.double(), keep, capacity=room).expand(len(evidence.features), -1))


# select: (B, keep) positions, best first -----------------------------------------------------------------------------


@step("select", reads_score="must")
def topk(evidence: Evidence, scores: Tensor, keep: int) -> Tensor:
    """The best by score."""
    return selecting.topk(scores, keep)


@step("select", reads_score="may")
def max_min(evidence: Evidence, scores: Tensor, keep: int) -> Tensor:
    """Farthest points by cosine (DivPrune), from the best token; from the most isolated one where all are alike."""
    x, flat = evidence.features, _flat(scores)
    if bool(flat.all()):
        return selecting.farthest_points(x, keep, "isolated", "cosine")
    start = scores.argmax(1)
    if bool(flat.any()):
        start = torch.where(flat, selecting.farthest_points(x, 1, "isolated", "cosine")[:, 0], start)
    return selecting.farthest_points(x, keep, start, "cosine")


@step("select", reads_score="may")
def max_sum(evidence: Evidence, scores: Tensor, keep: int) -> Tensor:
    """Least summed cosine to those chosen (ToDRE), from the best token; from the longest one where all are alike."""
    start = torch.where(_flat(scores), length(evidence.features).argmax(1), scores.argmax(1))
    return selecting.max_sum(evidence.features, keep, start)


@step("select", reads_score="may")
def dpp(evidence: Evidence, scores: Tensor, keep: int) -> Tensor:
    """Determinantal point process (CDPruner): cosine kernel times the scores scaled to [0, 1] over the picture."""
    return selecting.greedy_dpp_features(evidence.features, keep, quality(scores))


@step("select", reads_score="may")
def facility(evidence: Evidence, scores: Tensor, keep: int) -> Tensor:
    """Facility location: each token is covered by its most similar pick, and weighs its score scaled to [0, 1]."""
    rows = scoring.cosine(evidence.features)
    return selecting.facility_location(rows * quality(scores).to(rows.dtype).unsqueeze(2), keep)


NEAR = 0.2
"""Cosine distance below which ``nms`` suppresses a token: the largest that AgilePruner's threshold grows to."""


@step("select", reads_score="must")
def nms(evidence: Evidence, scores: Tensor, keep: int) -> Tensor:
    """Down the ranking; a pick removes tokens within a cosine distance of 0.2, which come back when none is left."""
    return selecting.nms(scores, evidence.features, keep, NEAR)


@step("select")
def uniform(evidence: Evidence, scores: Tensor, keep: int) -> Tensor:
    """The middle token of each of ``keep`` nearly square cells; of a row where the tokens form no grid."""
    _, anchor = grid_cells(evidence.grid or (1, evidence.num_tokens), keep)
    return anchor.to(scores.device).expand(len(scores), keep)


@step("select", seeded=True)
def select_random(evidence: Evidence, scores: Tensor, keep: int, seed: int = 0) -> Tensor:
    """Without replacement."""
    return selecting.topk(score_random(evidence, seed), keep)


def quality(scores: Tensor) -> Tensor:
    """(B, N) greater than 0: ``scores`` scaled to [0, 1] over each picture (CDPruner), 1 where all are alike."""
    scores = upcast(scores)
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    # Cosines that differ by no more than rounding are equal.
    spread = torch.where(high - low > 16 * torch.finfo(scores.dtype).eps, high - low, torch.inf)
    return torch.where(spread.isinf(), 1, (scores - low + 1e-6) / spread)


def _flat(scores: Tensor) -> Tensor:
    """(B,) whether all tokens of a picture score alike."""
    return scores.amax(1) == scores.amin(1)


# merge: values (B, K, D) of the slots, row for row with the picks, and the slot (B, N) of each token ------------------


@step("merge")
def merge_none(x: Tensor, evidence: Evidence, picks: Tensor) -> tuple[Tensor, Tensor]:
    """The others are dropped."""
    source = torch.full(x.shape[:2], -1, dtype=torch.int64, device=x.device)
    slots = torch.arange(picks.shape[1], device=x.device).expand_as(picks)
    return take(x, picks), source.scatter(1, picks, slots)


@step("merge")
def nearest(x: Tensor, evidence: Evidence, picks: Tensor) -> tuple[Tensor, Tensor]:
    """Each other token joins the pick most similar to it; a slot is their mean."""
    merged = nearest_anchor(x, picks, metric=evidence.features)
    return merged.tokens, merged.source


@step("merge", needs=("encoder_mean_keys",))
def contextual(x: Tensor, evidence: Evidence, picks: Tensor) -> tuple[Tensor, Tensor]:
    """The last 10 of 64 picks each take in the mean of the tokens with the most similar keys (VisionZip)."""
    last = min(int(10 / 64 * picks.shape[1] + 0.5), picks.shape[1] - 1)
    return fold_contextual(x, evidence.encoder_mean_keys, picks, last)


@step("merge")
def knn(x: Tensor, evidence: Evidence, picks: Tensor) -> tuple[Tensor, Tensor]:
    """Each pick becomes its mean with the N / K others most similar to it, a token in several slots if need be."""
    rows = unit(evidence.features)
    affinity = torch.bmm(take(rows, picks), rows.transpose(1, 2))
    merged = knn_weighted(x, picks, affinity, x.shape[1] // picks.shape[1])
    return merged.tokens, merged.source
