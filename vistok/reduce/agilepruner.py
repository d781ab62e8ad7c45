"""AgilePruner: the richer the picture, the more the attended tokens must differ.

What: attention prunes simple pictures best, diversity complex ones, and the diversity it buys brings hallucination.
How complex a picture is shows in the effective rank of its tokens. Walk down the ranking by class-token attention; the
i-th accepted token removes every candidate whose cosine distance to it is below
``min(tau_max, coefficient * i * erank / erank_average)``: the most attended ones suppress little, later ones more, and
complex pictures suppress more. If candidates run out, the best-scored of the removed ones follow. Source: Baek et al.,
arXiv 2603.01236; cvsp-lab/AgilePruner holds a project page and no code. Where: encoder output, before the language
model; a picture that was cut is reduced part by part. Without a class token: received attention.

Ours to decide, as the page does not say: i counts acceptances, not places in the ranking; the effective rank is that of
the tokens as they are (``center=True`` takes their mean off first); rank and distances are those of the encoder's
features; ``tau_max``. ``erank_average`` is a mean over pictures of one encoder: the default is that of vistok-tiny on
the world's pictures, measure your own with ``erank``. The coefficient is for some hundreds of tokens: where K is small,
thresholds stay low and the choice stays near plain attention.

``erank`` and ``attention_entropy`` are the paper's two diagnostics, low for simple pictures; ``hybrid_ratio`` is its
rule for other methods that mix attended and diverse tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core.score import cls_mean, entropy
from vistok.core.select import nms
from vistok.core.tensors import gram, upcast
from vistok.host.recipe import Recipe, SlotNeeds
from vistok.host.reducer import Evidence
from vistok.reduce.divprune import DivPrune
from vistok.reduce.fastervlm import FasterVLM

CARD = Card(
    title="AgilePruner: An Empirical Study of Attention and Diversity for Adaptive Visual Token Pruning in LVLMs",
    kind="calibrated",
    site="encoder output, before the language model",
    paper="Baek et al., 2026, arXiv 2603.01236",
    repository="cvsp-lab/AgilePruner",
    needs=(
        "class-token attention of one encoder layer (received attention where there is no class token)",
        "encoder features",
    ),
    mechanism=("attention", "similarity"),
    score="class-token attention, mean over heads",
    select="suppression of similar tokens, by a threshold that grows with the order and the picture's effective rank",
    claim="The simple adaptive rule is as accurate as the better of attention alone and diversity alone.",
)


@dataclass(frozen=True)
class AgilePruner(Recipe):
    """Attention with suppression that adapts to the picture."""

    erank_average: float = 53.0
    """Mean effective rank of the encoder's features over pictures (53, deviation 11: vistok-tiny, 64 pictures)."""
    tau_max: float = 0.2
    """Largest threshold, a cosine distance in [0, 2]; 0: attention alone."""
    coefficient: float = 0.01
    """Growth of the threshold with each accepted token in a picture of average rank; 0: attention alone."""
    center: bool = False
    """Effective rank around the mean token."""
    layer: int = -2
    """Encoder layer whose class-token attention ranks the tokens."""

    def __post_init__(self) -> None:
        if self.erank_average <= 0:
            raise ValueError(f"erank_average: got {self.erank_average}, must be greater than 0")
        if not 0 <= self.tau_max <= 2:
            raise ValueError(f"tau_max: got {self.tau_max}, must be in [0, 2]")
        if self.coefficient < 0:
            raise ValueError(f"coefficient: got {self.coefficient}, must be 0 or more")

    @property
    def slot_needs(self) -> SlotNeeds:
        return {"score": {"cls_attention": self.layer}, "select": {"encoder_features": None}}

    def thresholds(self, rank: Tensor, keep: int) -> Tensor:
        """(B, keep) cosine distances for pictures of effective rank ``rank`` (B,), one for each accepted token."""
        order = torch.arange(1, keep + 1, device=rank.device, dtype=torch.float64)
        tau = self.coefficient * order * (rank.double() / self.erank_average)[:, None]
        return tau.clamp_max(self.tau_max)

    def scores(self, evidence: Evidence) -> Tensor:
        return cls_mean(evidence.cls_attention)

    def pick(self, evidence: Evidence, scores: Tensor, keep: int) -> Tensor:
        features = evidence.encoder_features
        return nms(scores, features, keep, self.thresholds(erank(features, self.center), keep))


def erank(x: Tensor, center: bool = False) -> Tensor:
    """(B,): effective rank of the tokens ``x`` (B, N, D), the exponential of the entropy of the singular values.

    Between 1 (all tokens on one line, or all zero) and min(N, D); k orthonormal rows have k. From the eigenvalues of
    the smaller Gram matrix in float64; those below the rounding of ``x`` (at least float32) are left out.
    """
    x = upcast(x.detach())
    if center:
        x = x - x.mean(1, keepdim=True)
    precision = max(torch.finfo(x.dtype).eps, 1e-12)
    x = x if x.shape[1] <= x.shape[2] else x.transpose(1, 2)
    values = torch.linalg.eigvalsh(gram(x).double())
    values = torch.where(values > precision * values.amax(1, keepdim=True), values, 0)
    return entropy(values.clamp_min(0).sqrt()).exp()


def attention_entropy(cls_attention: Tensor) -> Tensor:
    """(B,) in nats: how spread the class token's attention (B, H, N) is, mean over heads, scaled to sum 1."""
    return entropy(cls_mean(cls_attention))


def hybrid_ratio(rank: Tensor, low: float, high: float, share_low: float, share_high: float) -> Tensor:
    """(B,): the share of tokens that a hybrid should pick by attention in pictures of effective rank ``rank`` (B,).

    ``share_low`` up to rank ``low``, ``share_high`` from ``high`` on, linear between; the paper's rule has more
    attention for simple pictures, ``share_low > share_high``.
    """
    if not low < high:
        raise ValueError(f"low: got {low}, must be less than high, {high}")
    for name, share in (("share_low", share_low), ("share_high", share_high)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}: got {share}, must be in [0, 1]")
    return share_low + (share_high - share_low) * ((rank - low) / (high - low)).clamp(0, 1)


def claim(trial: Trial) -> Outcome:
    """The abstract: a simple adaptive rule is strong and reliable, where attention and diversity each have their turf.

    Against both alone (FasterVLM, DivPrune), at 1/9 of the tokens.
    """
    attention = trial.accuracy(FasterVLM(), keep=1 / 9)
    diversity = trial.accuracy(DivPrune(), keep=1 / 9)
    adaptive = trial.accuracy(AgilePruner(), keep=1 / 9)
    best = max(attention, diversity)
    return Outcome(
        "accuracy with 1/9 of the tokens, adaptive over the better of attention and diversity",
        baseline=best,
        value=adaptive,
        holds=adaptive >= best,
        note=f"attention {attention:.1%}, diversity {diversity:.1%}",
    )
