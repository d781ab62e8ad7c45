"""ApET: keep the tokens that a handful of others cannot rebuild, and merge the rest into them.

What: attention is biased and hidden in fused kernels; rank tokens without it. A few *basis* tokens are sampled by
farthest points, every token is regressed on them (ridge), and its error says what only it knows. Of the ``keep`` slots
those of largest error stay; the last ones, as many as the basis has, are overwritten by the basis vectors; every token
without a slot joins the most similar error-picked one as a plain mean. Source: Ma et al., arXiv 2602.19870,
MaQianKun0/ApET. Where: encoder output before the projector, then again on the hidden states halfway through the
language model.

``keep`` is the mean over the decoder's layers: 64 is 96 tokens before the language model and 32 after half of its
layers, the authors' example; other depths and counts take the nearest to that 3 : 1 whose mean is exact. As released,
basis vectors are dealt to the overwritten slots by position at the encoder and by falling error inside the language
model, and what stood there vanishes; ``source`` still names such a slot for it.

Departures: the first basis token is the longest one (released: a random one, so that runs differ). Where ``keep`` is
not above the basis, which the released code cannot do, the basis is keep // 2. Keeping all tokens is the identity; the
released code still overwrites slots, unless there are 576: ``parity="authors"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core import select
from vistok.core.merge import nearest_anchor, size_weighted_mean
from vistok.core.score import reconstruction_error
from vistok.core.stages import geometric_stages, raster_slots
from vistok.core.tensors import take, upcast
from vistok.host.reducer import Evidence, LayerSpec, Reducer, Reduction, Schedule

CARD = Card(
    title="ApET: Approximation-Error Guided Token Compression for Efficient VLMs",
    kind="training-free",
    site="encoder output, before the projector; one decoder layer halfway",
    paper="Ma et al., 2026, arXiv 2602.19870",
    repository="MaQianKun0/ApET",
    mechanism=("similarity",),
    needs=("encoder features",),
    score="error of a ridge regression on a few basis tokens",
    allocate="3 : 1 before and after half of the decoder's layers",
    select="top-k errors, the last slots overwritten by the basis",
    merge="each other token joins the most similar error-picked one (mean)",
    claim="Keeps 95.2% of the dense accuracy with 88.9% of the visual tokens compressed away.",
    departures=(
        "farthest points start at the longest token, not at a random one",
        "keeping all tokens is the identity for any number of tokens",
    ),
)


@dataclass(frozen=True)
class ApET(Reducer):
    """Approximation error against a sampled basis, before the projector and once inside the language model."""

    basis: int = 10
    """Basis tokens; keep // 2 where ``keep`` is not above it."""
    sampler: Literal["fps", "dpc", "random"] = "fps"
    """Farthest points, means of density-peak clusters, or random tokens."""
    ridge: float = 1e-5
    """Ridge of the regression, in squared feature units."""
    fall: float = 1 / 3
    """Tokens after the stage inside the language model, as a share of those before."""
    depth: float = 0.5
    """Where in the decoder that stage acts, as a share of its layers."""
    seed: int = 0
    """For ``sampler="random"``."""
    parity: Literal["paper", "authors"] = "paper"
    """"authors": keeping all tokens overwrites slots as in the released code."""

    space: ClassVar[Literal["projected", "encoder"]] = "encoder"

    def __post_init__(self) -> None:
        if self.basis < 1:
            raise ValueError(f"basis: got {self.basis}, must be 1 or more")
        if self.sampler not in ("fps", "dpc", "random"):
            raise ValueError(f"sampler: got {self.sampler!r}, must be 'fps', 'dpc' or 'random'")
        if not 0 < self.fall <= 1:
            raise ValueError(f"fall: got {self.fall}, must be in (0, 1]")
        if not 0 < self.depth < 1:
            raise ValueError(f"depth: got {self.depth}, must be in (0, 1)")
        if self.ridge <= 0:
            raise ValueError(f"ridge: got {self.ridge}, must be greater than 0")
        if self.parity not in ("paper", "authors"):
            raise ValueError(f"parity: got {self.parity!r}, must be 'paper' or 'authors'")

    @property
    def needs(self) -> Mapping[str, LayerSpec]:
        return {"encoder_features": None}

    def schedule(self, num_tokens: int, keep: int, num_layers: int) -> Schedule:
        return Schedule(*geometric_stages((self.depth,), self.fall, keep, num_tokens, num_layers))

    def basis_of(self, x: Tensor, keep: int, start: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Basis vectors (B, k, D) of ``x`` (B, N, D), and which tokens they are (B, k), None for cluster means."""
        b, n, _ = x.shape
        k = self.basis if keep > self.basis else keep // 2
        if self.sampler == "dpc":
            centres = select.dpc_knn(x, k, neighbours=max(k, 1))
            source = torch.cdist(x, take(x, centres)).argmin(2) if k else torch.full((b, n), -1, device=x.device)
            return size_weighted_mean(x, source, k).tokens, None
        if self.sampler == "fps":
            index = select.farthest_points(x, k, start)
        else:
            index = select.random(1, n, k, self.seed, device=x.device).expand(b, k)
        return take(x, index), index

    def approximate(
        self, x: Tensor, keep: int, deal: Literal["position", "error"], start: Tensor | None = None
    ) -> Reduction:
        """``x`` (B, N, D) reduced to ``keep`` > 0 slots; ``start`` (B,) is the first farthest point."""
        wide = upcast(x)
        vectors, _ = self.basis_of(wide, keep, start)
        k = vectors.shape[1]
        order = select.topk(reconstruction_error(wide, vectors, self.ridge), keep)
        picked, last = order[:, : keep - k], order[:, keep - k :]
        if deal == "position":
            last = last.sort(1).values
        joins = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device).scatter(1, last, False)
        merged = nearest_anchor(wide, picked, mask=joins)
        # A slot counts as its own place's, also where its value is now that of a basis token.
        source = merged.source.scatter(1, last, torch.arange(keep - k, keep, device=x.device).expand_as(last))
        tokens = torch.cat([merged.tokens, vectors], 1).to(x.dtype)
        return Reduction(*raster_slots(torch.cat([picked, last], 1), tokens, source))

    def compress(self, evidence: Evidence, keep: int) -> Reduction:
        return self.approximate(evidence.encoder_features, keep, "position")

    def at_layer(self, evidence: Evidence, keep: int, layer: int) -> Reduction:
        n = evidence.num_tokens
        if keep in (0, n) and not (keep and self.parity == "authors"):
            x = evidence.features
            return Reduction.select(x, torch.arange(keep, device=x.device).expand(len(x), keep))
        return self.approximate(evidence.features, keep, "error")

    def reduce(self, evidence: Evidence, keep: int) -> Reduction:
        n = evidence.num_tokens
        if self.parity == "authors" and keep == n != 576 and not evidence.crops:
            return self.compress(evidence, keep)
        return super().reduce(evidence, keep)


def claim(trial: Trial) -> Outcome:
    """The abstract: 95.2% of the performance on images at 88.9% compression (64 of 576)."""
    dense = trial.accuracy(None)
    pruned = trial.accuracy(ApET(), keep=1 / 9)
    return Outcome("accuracy with 1/9 of the tokens", baseline=dense, value=pruned, holds=pruned >= 0.952 * dense)
