"""VTC-CLS: keep the visual tokens that the class token attends to over several encoder layers.

What: the class token already knows which patches matter, and an ensemble of layers is steadier than one. Each layer's
class-token row is averaged over heads and, without renormalising, added to those of the other layers. The last layer is
always left out. Source: Wang et al., arXiv 2412.05819, THU-MIG/VTC-CLS. Where: between the encoder and the language
model, once.

Departures: the rows are taken after the projector instead of before it, which gives the same tokens because the
projector works token by token. The released code needs ``start_layer`` from the command line and pins no value; here it
is by default the deeper half of the layers before the last (11..22 of CLIP-L's 0..23). With ``start_layer = depth - 2``
one layer is left, and this is FasterVLM. An encoder without a class token is ranked by received attention instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core.score import cls_mean, cls_sum
from vistok.host.recipe import Recipe, SlotNeeds
from vistok.host.reducer import Evidence
from vistok.reduce.fastervlm import FasterVLM

CARD = Card(
    title="[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs (VTC-CLS)",
    kind="training-free",
    site="projector output, before the language model",
    paper="Wang et al., 2024, arXiv 2412.05819",
    repository="THU-MIG/VTC-CLS",
    mechanism=("attention",),
    needs=("class-token attention of several encoder layers (received attention where there is no class token)",),
    score="class-token attention, mean over heads, sum over layers",
    select="top-k",
    claim="With 1/9 of the visual tokens an ensemble of layers is at least as accurate as one layer (FasterVLM).",
)


@dataclass(frozen=True)
class VTCCLS(Recipe):
    """Top-k by class-token attention gathered over the layers ``start_layer`` .. last but one."""

    start_layer: int | None = None
    """First encoder layer of the ensemble, 0 or more, or negative from the end; None: see the module's docstring."""
    ensemble: Literal["sum", "min", "max"] = "sum"
    """How the layers' rows become one score."""

    def __post_init__(self) -> None:
        if self.ensemble not in ("sum", "min", "max"):
            raise ValueError(f"ensemble: got {self.ensemble!r}, must be 'sum', 'min' or 'max'")

    @property
    def slot_needs(self) -> SlotNeeds:
        return {"score": {"cls_attention": slice(self.start_layer, -1)}}

    def scores(self, evidence: Evidence) -> Tensor:
        """(B, N) the ensemble of the layers' head means."""
        layers = evidence.cls_attention
        if self.start_layer is None:
            layers = layers[len(layers) // 2 :]
        if self.ensemble == "sum":
            return cls_sum(layers)
        rows = torch.stack([cls_mean(layer) for layer in layers])
        return rows.amin(0) if self.ensemble == "min" else rows.amax(0)


def claim(trial: Trial) -> Outcome:
    """The paper's step from its own single-layer form, which is FasterVLM, to the ensemble; 64 of 576 tokens."""
    one = trial.accuracy(FasterVLM(), keep=1 / 9)
    several = trial.accuracy(VTCCLS(), keep=1 / 9)
    return Outcome("accuracy with 1/9 of the tokens, several layers over one", one, several, holds=several >= one)
