"""VisionDrop: only the picture says which of its tokens matter, in the encoder and again inside the language model.

What: attention of text to visual tokens is misaligned (causal, semantic, spatial). Every stage keeps *dominant* tokens,
those that visual tokens attend to most, and folds the rest into a few *contextual* ones: anchors at a uniform stride,
each plus the mean of the tokens whose keys are most similar to its own. Source: Xu et al., arXiv 2506.22283,
Ruixxxx/VisionDrop. Where: encoder output before the projector (score: class-token attention), then before the decoder
layers at 1/4, 1/2 and 3/4 of the depth (score: attention received from the visual tokens; metric: rotated keys).

``keep`` is the mean over the decoder's layers. The authors' example for 32 of 576 is 42 + 6, 30 + 5, 22 + 4, 16 + 3
tokens in the quarters of 32 layers: a geometric fall to 19/48 with an eighth of each stage contextual, rounded up.
Other counts and depths follow that, with an exact mean; a stage of one token keeps a dominant one. The authors' first
dominant token is the class token; hosts place patch tokens only, so a patch takes its place. Encoders without a class
token are scored by received attention. Where a token of the language model is made of several patches, the keys' mean
over heads is one over as many equal parts of its patches' keys together.

Departures: contextual tokens stand where their anchors stand. The released code puts them behind the dominant ones:
``parity="authors"``, where the values stand in that order on ascending places (closest to the released runs with the
host's ``position="recompact"``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core.merge import dominant_contextual
from vistok.core.score import cls_mean
from vistok.core.stages import geometric_stages, raster_slots
from vistok.host.reducer import Evidence, LayerNeed, LayerSpec, Reducer, Reduction, Schedule

CARD = Card(
    title="Rethinking Visual Token Reduction in LVLMs under Cross-modal Misalignment (VisionDrop)",
    kind="training-free",
    site="encoder output, before the projector; decoder layers at 1/4, 1/2 and 3/4 of the depth",
    paper="Xu et al., 2025, arXiv 2506.22283",
    repository="Ruixxxx/VisionDrop",
    mechanism=("attention", "similarity"),
    needs=(
        "class-token attention and keys of one encoder layer (received attention where there is no class token)",
        "attention that visual tokens receive from visual tokens, and their keys, at three decoder layers",
    ),
    score="class-token attention; inside the language model visual self-attention",
    allocate="a geometric fall over four stages, an eighth of each contextual",
    select="top-k dominant tokens",
    merge="the rest by key similarity into anchors at a uniform stride: anchor + mean of its group",
    claim="Keeps 95.71% of the dense accuracy with 2.7 times lower latency, here at 1/9 of the visual tokens.",
    departures=("contextual tokens stand at their anchors' places, not behind the dominant ones",),
)


@dataclass(frozen=True)
class VisionDrop(Reducer):
    """Dominant and contextual tokens in four stages."""

    contextual: float = 1 / 8
    """Share of a stage's tokens that is contextual, rounded up."""
    fall: float = 19 / 48
    """Tokens of the last stage as a share of those of the first; between them a geometric fall."""
    depths: tuple[float, ...] = (1 / 4, 1 / 2, 3 / 4)
    """Where in the decoder the later stages act, as shares of its layers."""
    layer: int = -2
    """Encoder layer whose class-token attention and keys are used."""
    average: bool = False
    """True: a contextual token is the mean of its group, not anchor + mean of the others (which doubles its size)."""
    unbiased: bool = False
    """True: received attention in the language model is averaged over the visual queries that can see the token (the
    causal mask lets later tokens be seen by fewer, which the published mean over all queries counts against them)."""
    parity: Literal["paper", "authors"] = "paper"
    """"authors": contextual tokens behind the dominant ones as in the released code."""

    space: ClassVar[Literal["projected", "encoder"]] = "encoder"

    def __post_init__(self) -> None:
        for name in ("contextual", "fall"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, must be in (0, 1]")
        if list(self.depths) != sorted(self.depths) or not all(0 < depth < 1 for depth in self.depths):
            raise ValueError(f"depths: got {self.depths}, must rise within (0, 1)")
        if self.parity not in ("paper", "authors"):
            raise ValueError(f"parity: got {self.parity!r}, must be 'paper' or 'authors'")

    @property
    def needs(self) -> Mapping[str, LayerSpec]:
        return {"encoder_features": None, "cls_attention": self.layer, "encoder_keys": self.layer}

    @property
    def layer_needs(self) -> Mapping[str, LayerNeed]:
        return {"llm_received": None, "llm_keys": None}

    def schedule(self, num_tokens: int, keep: int, num_layers: int) -> Schedule:
        return Schedule(*geometric_stages(self.depths, self.fall, keep, num_tokens, num_layers))

    def compress(self, evidence: Evidence, keep: int) -> Reduction:
        heads = evidence.cls_attention.shape[1]
        metric = evidence.encoder_keys.unflatten(2, (heads, -1)).mean(2)
        return self._stage(evidence.encoder_features, self.token_scores(evidence), metric, keep)

    def at_layer(self, evidence: Evidence, keep: int, layer: int) -> Reduction:
        if keep in (0, evidence.num_tokens):
            x = evidence.features
            return Reduction.select(x, torch.arange(keep, device=x.device).expand(len(x), keep))
        return self._stage(evidence.features, self.token_scores(evidence, layer), evidence.llm_keys, keep)

    def token_scores(self, evidence: Evidence, layer: int | None = None) -> Tensor:
        if layer is None:
            return cls_mean(evidence.cls_attention)
        score, n = evidence.llm_received, evidence.num_tokens
        return score * n / torch.arange(n, 0, -1, device=score.device) if self.unbiased else score

    def _stage(self, x: Tensor, score: Tensor, metric: Tensor, keep: int) -> Reduction:
        contextual = min(math.ceil(self.contextual * keep - 1e-9), keep - 1)
        slots = dominant_contextual(x, score, metric, keep - contextual, contextual, self.average)
        if self.parity == "authors":
            return Reduction(slots[0].sort(1).values, *slots[1:])
        return Reduction(*raster_slots(*slots))


def claim(trial: Trial) -> Outcome:
    """The abstract: 2.7 times lower latency and 95.71% of the performance on LLaVA-NeXT-7B.

    It does not say at how many tokens; 1/9 is the count at which the methods of its time are compared (320 of 2880).
    """
    dense, pruned = trial.accuracy(None), trial.accuracy(VisionDrop(), keep=1 / 9)
    speedup = trial.ttft_ms(None) / trial.ttft_ms(VisionDrop(), keep=1 / 9)
    return Outcome(
        "accuracy with 1/9 of the tokens",
        baseline=dense,
        value=pruned,
        holds=pruned >= 0.9571 * dense and speedup >= 2.7,
        note=f"first token {speedup:.2f} times sooner (paper: 2.7)",
    )
