"""VisionZip: the tokens that the class token attends to most, and a few that hold what is left.

What: attention of the vision encoder gathers on few tokens. Those *dominant* tokens stay as they are; the others are
folded into *contextual* tokens, anchors at a uniform stride among them, each plus the mean of the tokens whose keys are
most similar to its own. Source: Yang et al., arXiv 2412.04467, dvlab-research/VisionZip. Where: encoder output, before
the projector; part by part of a cut picture.

Of 64 tokens the authors spend 10 on context (20 of 128, 30 of 192); other counts follow that, rounded to the nearest,
and a single token is a dominant one. The authors' first dominant token is the class token; hosts place patch tokens
only, so a patch takes its place. Encoders without a class token are scored by received attention, as in the paper.
Where a token of the language model is made of several patches, the keys' mean over heads is one over as many equal
parts of its patches' keys together. VisionDrop begins with the same step.

Departures: contextual tokens stand where their anchors stand. The released code puts them behind the dominant ones:
``parity="authors"``, where the values stand in that order on ascending places (closest to the released runs with the
host's ``position="recompact"``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core.merge import dominant_and_spread, fold_contextual
from vistok.core.score import cls_mean
from vistok.host.recipe import Recipe, SlotNeeds
from vistok.host.reducer import Evidence

CARD = Card(
    title="VisionZip: Longer is Better but Not Necessary in Vision Language Models",
    kind="training-free",
    site="encoder output, before the projector",
    paper="Yang et al., 2024, arXiv 2412.04467",
    repository="dvlab-research/VisionZip",
    mechanism=("attention", "similarity"),
    needs=("class-token attention and keys of one encoder layer (received attention where there is no class token)",),
    score="class-token attention, mean over heads",
    select="top-k dominant tokens",
    merge="the rest by key similarity into anchors at a uniform stride: anchor + mean of its group",
    claim="Keeps 95% of the dense accuracy with 10% of the visual tokens.",
    departures=("contextual tokens stand at their anchors' places, not behind the dominant ones",),
)


@dataclass(frozen=True)
class VisionZip(Recipe):
    """Dominant and contextual tokens."""

    contextual: float = 10 / 64
    """Share of the tokens that is contextual, rounded to the nearest count."""
    layer: int = -2
    """Encoder layer whose class-token attention and keys are used."""
    parity: Literal["paper", "authors"] = "paper"
    """"authors": contextual tokens behind the dominant ones as in the released code."""

    space: ClassVar[Literal["projected", "encoder"]] = "encoder"

    def __post_init__(self) -> None:
        if not 0 <= self.contextual <= 1:
            raise ValueError(f"contextual: got {self.contextual}, must be in [0, 1]")
        if self.parity not in ("paper", "authors"):
            raise ValueError(f"parity: got {self.parity!r}, must be 'paper' or 'authors'")

    @property
    def slot_needs(self) -> SlotNeeds:
        row = {"cls_attention": self.layer}
        return {"score": row, "merge": {**row, "encoder_keys": self.layer}}

    @property
    def order(self) -> Literal["raster", "author"]:
        return "author" if self.parity == "authors" else "raster"

    def anchors(self, keep: int) -> int:
        """How many of ``keep`` tokens are contextual."""
        return min(math.floor(self.contextual * keep + 0.5), keep - 1)

    def scores(self, evidence: Evidence) -> Tensor:
        return cls_mean(evidence.cls_attention)

    def pick(self, evidence: Evidence, scores: Tensor, keep: int) -> Tensor:
        return dominant_and_spread(scores, keep - self.anchors(keep), self.anchors(keep))

    def merge(self, x: Tensor, evidence: Evidence, picks: Tensor) -> tuple[Tensor, Tensor]:
        heads = evidence.cls_attention.shape[1]
        keys = evidence.encoder_keys.unflatten(2, (heads, -1)).mean(2)
        return fold_contextual(x, keys, picks, self.anchors(picks.shape[1]))


def claim(trial: Trial) -> Outcome:
    """The authors' summary: nearly 95% of the performance with 10% of the tokens, without training."""
    dense = trial.accuracy(None)
    pruned = trial.accuracy(VisionZip(), keep=0.1)
    return Outcome("accuracy with 10% of the tokens", baseline=dense, value=pruned, holds=pruned >= 0.95 * dense)
