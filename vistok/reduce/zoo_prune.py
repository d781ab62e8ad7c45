"""ZOO-Prune: keep tokens to which the projector reacts strongly and that differ from one another.

What: attention is not influence. How strongly the projector's output moves when a token is nudged is measured by
central differences along random unit directions, the same ones for all tokens: S = mean over u of
``|M(x + h u) - M(x - h u)| / 2h``, which estimates E|J(x) u| without a gradient. S is scaled to [0, 1] over the
picture; from the most sensitive token on, always the one of largest ``S (1 - cosine to the nearest chosen token)``,
of projected tokens. Source: Kim et al., arXiv 2509.24837; AIM-SKKU/ZOO-Prune holds no code. Where: at the projector,
before the language model; a picture that was cut is one set. Cost: 2 * ``directions`` runs of the projector.

Departures: none known. That directions are shared is ours to decide (with a linear projector all tokens are then
equally sensitive); where sensitivities differ by no more than rounding, diversity alone decides. Half precision would
round the nudge away, so that the projector is given float32. The paper's low-rank projector for 2880 tokens is not
here. ``score="norm"`` ranks by the length of the projected tokens instead, at no cost; an independent check found the
estimate to be nearly a function of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core.select import farthest_points
from vistok.core.tensors import length, unit, upcast
from vistok.host.recipe import Recipe, SlotNeeds
from vistok.host.reducer import Evidence

CARD = Card(
    title="Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language Models (ZOO-Prune)",
    kind="training-free",
    site="projector, before the language model",
    paper="Kim et al., 2025, arXiv 2509.24837",
    repository="AIM-SKKU/ZOO-Prune",
    needs=("encoder features", "the projector as a function"),
    mechanism=("similarity",),
    score="sensitivity of the projector to each token, by central differences",
    select="greedy max-min diversity weighted by sensitivity, from the most sensitive token",
    claim="Keeps 95.4% of the dense accuracy with 94.4% of the visual tokens pruned.",
)


@dataclass(frozen=True)
class ZOOPrune(Recipe):
    """Sensitivity times diversity."""

    directions: int = 64
    """Random directions, each of which costs two runs of the projector."""
    step: float = 0.01
    """Length of the nudge."""
    seed: int = 0
    """Of the directions."""
    score: Literal["sensitivity", "norm"] = "sensitivity"
    """"norm": the length of the projected token in place of its sensitivity; needs no projector."""

    whole_picture: ClassVar[bool] = True
    greedy: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.directions < 1:
            raise ValueError(f"directions: got {self.directions}, must be 1 or more")
        if self.step <= 0:
            raise ValueError(f"step: got {self.step}, must be greater than 0")
        if self.score not in ("sensitivity", "norm"):
            raise ValueError(f"score: got {self.score!r}, must be 'sensitivity' or 'norm'")

    @property
    def slot_needs(self) -> SlotNeeds:
        return {"score": {"encoder_features": None, "project": None}} if self.score == "sensitivity" else {}

    def weights(self, evidence: Evidence) -> Tensor:
        """(B, N) in [0, 1]: what a token's distance counts for, 1 for the most sensitive one."""
        size = length(evidence.features)
        noise = torch.finfo(size.dtype).eps * size.amax(1, keepdim=True)  # what rounding does to a projected token
        if self.score == "norm":
            return scaled(size, 16 * noise)
        assert evidence.project is not None  # in ``needs``
        seen = zo_sensitivity(evidence.project, evidence.encoder_features, self.directions, self.step, self.seed)
        return scaled(seen, noise / self.step)

    def scores(self, evidence: Evidence) -> Tensor:
        return self.weights(evidence)

    def pick(self, evidence: Evidence, scores: Tensor, keep: int) -> Tensor:
        return farthest_points(evidence.features, keep, scores.argmax(1), "cosine", weight=scores)


@torch.no_grad()
def zo_sensitivity(
    project: Callable[[Tensor], Tensor],
    x: Tensor,
    directions: int = 64,
    step: float = 0.01,
    seed: int = 0,
    chunk: int = 2048,
) -> Tensor:
    """(B, N), at least in float32: mean over random unit directions u of ``|M(x + h u) - M(x - h u)| / 2h``, h = step.

    ``project`` maps (B, n, Dv) to (B, n, D) token by token; ``x`` (B, N, Dv). It is given about ``chunk`` rows of each
    picture at a time. The directions are drawn on the CPU, so that devices agree.
    """
    x = upcast(x)
    b, n, d = x.shape
    u = unit(torch.randn(directions, d, generator=torch.Generator().manual_seed(seed))).to(x)
    total = x.new_zeros(b, n)
    for part in u.split(max(1, chunk // (2 * max(n, 1)))):
        nudge = step * torch.cat([part, -part])
        moved = project((x[:, None] + nudge[:, None]).flatten(1, 2)).unflatten(1, (2, len(part), n))
        total += length(moved[:, 0] - moved[:, 1]).sum(1) / (2 * step)
    return total / directions


def scaled(score: Tensor, noise: Tensor) -> Tensor:
    """``score`` (B, N) mapped to [0, 1] over each picture; all 1 where it spreads by no more than ``noise`` (B, 1)."""
    low, high = score.amin(1, keepdim=True), score.amax(1, keepdim=True)
    flat = high - low <= noise
    return torch.where(flat, 1, (score - low) / torch.where(flat, 1, high - low))


def claim(trial: Trial) -> Outcome:
    """The abstract: up to 94.4% of the tokens pruned without sacrificing accuracy; 95.4% of it in the paper's table."""
    dense, pruned = trial.accuracy(None), trial.accuracy(ZOOPrune(), keep=1 / 18)
    norm = trial.accuracy(ZOOPrune(score="norm"), keep=1 / 18)
    return Outcome(
        "accuracy with 1/18 of the tokens",
        baseline=dense,
        value=pruned,
        holds=pruned >= 0.954 * dense,
        note=f"by the length of the token instead of its sensitivity: {norm:.1%}",
    )
