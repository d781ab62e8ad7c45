"""When a masked-diffusion model may lose visual tokens: a study of pruning by denoising step, and by layer.

What: a masked-diffusion language model reads its whole prompt anew in every denoising step, so that visual tokens can
go *when* they are no longer needed: from a share of the steps on (0, 25, 50, 75%), *how many* (to 50, 25 or 10%) and
*which* (any reducer of the catalogue; ``VTW`` removes all of them behind a layer). The paper finds redundancy only in
middle and late steps of long answers for a model trained from scratch (LLaDA-V), and none for one made of a causal
model (LaViDa), where single layers can be bypassed instead. Source: A Comprehensive Study on Visual Token Redundancy
for Discrete Diffusion-based Multimodal Large Language Models,
Yrdal3910/dMLLM-Visual-Token-Redundancy-Analysis. Where: denoising steps and layers.

``StepPrune`` and ``LayerSkip`` are what ``vistok.host.diffusion.DiffusionDecoder`` takes, which also measures where the
answer's attention goes and how sure of it the model is; ``vistok diffusion`` prints the study.

Where the paper's text leaves it open: methods with stages inside the language model see the prompt's part of its
attention there, so that FastV's last token is the prompt's, as in a causal model; and in a layer that they bypass,
visual tokens are not seen either. The prompt is run again in every step, as the paper counts; a model whose prompt does
not see its answer need not (``DiffusionDecoder(cache=True)``), and then saves less by pruning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from vistok import catalogue
from vistok.catalogue.card import Card, Outcome, Trial
from vistok.host.keep import Keep, check_keep
from vistok.host.reducer import Evidence, Reducer, Reduction, Schedule

CARD = Card(
    title="A Comprehensive Study on Visual Token Redundancy for Discrete Diffusion-based Multimodal LLMs",
    kind="measurement",
    site="denoising steps and layers of masked-diffusion language models",
    paper="A Comprehensive Study on Visual Token Redundancy for Discrete Diffusion-based MLLMs",
    repository="Yrdal3910/dMLLM-Visual-Token-Redundancy-Analysis",
    needs=("a masked-diffusion language model", "what its base method asks for"),
    mechanism=("similarity",),
    score="that of the base method (DivPrune)",
    allocate="all tokens up to a share of the denoising steps, a quarter of them after it",
    select="the base method's choice",
    claim="DivPrune at 25% from the middle step on is faster and keeps 98% of the accuracy.",
)


@dataclass(frozen=True)
class VTW(Reducer):
    """Visual tokens withdrawal: none of them is left from a share of the layers on."""

    depth: float = 0.5

    whole_picture: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.depth <= 1:
            raise ValueError(f"depth: got {self.depth}, must be in [0, 1]")

    def schedule(self, num_tokens: int, keep: int, num_layers: int) -> Schedule:
        layer = math.ceil(self.depth * num_layers - 1e-9)
        return Schedule(num_tokens, {layer: 0} if layer < num_layers else {})

    def at_layer(self, evidence: Evidence, keep: int, layer: int) -> Reduction:
        x = evidence.features
        return Reduction.select(x, torch.arange(keep, device=x.device).expand(len(x), keep))


@dataclass(frozen=True)
class StepPrune:
    """A reducer from a share of the denoising steps on."""

    method: str | Reducer = "divprune"
    """Which tokens: a reducer of the catalogue, or one of one's own."""
    keep: Keep = 0.25
    """How many are left of each picture, a count or a share."""
    start_frac: float = 0.5
    """When: from which share of the steps on, in [0, 1]; 1 is never."""

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if not 0 <= self.start_frac <= 1:
            raise ValueError(f"start_frac: got {self.start_frac}, must be in [0, 1]")
        if not isinstance(self.reducer, Reducer):
            raise ValueError(f"method: got {self.method!r}, must be the name of a reducer or a Reducer")

    @property
    def reducer(self) -> Reducer:
        return catalogue.create(self.method) if isinstance(self.method, str) else self.method


def claim(trial: Trial) -> Outcome:
    """The paper on LLaDA-V: 1.44 times faster, 65.0 for 66.2 (InfoVQA) and 83.1 for 83.9 (DocVQA)."""
    study = StepPrune()
    dense, pruned = trial.diffusion_accuracy(None), trial.diffusion_accuracy(study)
    speedup = trial.diffusion_ms(None) / trial.diffusion_ms(study)
    return Outcome(
        "accuracy with 25% of the tokens from the middle step on",
        baseline=dense,
        value=pruned,
        holds=pruned >= 0.98 * dense and speedup > 1,
        note=f"{speedup:.2f} times faster",
    )
