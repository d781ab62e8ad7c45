"""AdaToken-3D: how much of the prediction spatial tokens carry, layer by layer, says how many of them each layer keeps.

What: 3-D models feed thousands of position-augmented patch tokens of many views, most of which contribute little.
*Mining*, offline: the attention of the prompt's last token says what share of its mass the spatial tokens get in each
layer (``contribution_profile``), and how few of them get nearly all (``idle_share``); the profile becomes a schedule of
retention (``schedule_from_profile``). *Gating*: before the layers of the schedule, spatial tokens are ranked by the
last token's attention there, from the layer's own norm and projections, mean over heads; the best go on. Source: Zhang,
Chen, Zhang, arXiv 2505.12782, junkerman2004/Adatoken-3D. Where: before decoder layers at 1/4, 1/2 and 3/4 of the depth.
The defaults are the release's for ScanQA and SQA3D; its other schedules are ``ratios=(0.8, 0.5, 0.25)`` (run script)
and, at ``depths=(1/8, 1/4, 3/8, 1/2, 9/16, 5/8)``, ``ratios=(0.75, 0.5, 0.4, 0.3, 0.25, 0.15)`` (demo).

``keep`` is the mean over the decoder's layers: 7/10 of the tokens gives the default ratios, other means scale them. For
a mean that the layers before the first stage alone would nearly spend, the stages move towards layer 0
(``vistok.core.stages.stages_from_all``).

Departures: the release is PyramidDrop with these schedules; how it came from profile to schedule is not in it, so the
map here is ours: a stage keeps in proportion to the largest share that spatial tokens get from its layers on. Tokens
keep their positions: the release renumbers them, though a spatial token's place is part of its value already
(``position="recompact"`` of the host does so).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core.stages import stages_from_all
from vistok.core.tensors import upcast
from vistok.host.reducer import Schedule
from vistok.reduce._last_token import LastTokenRanking

CARD = Card(
    title="AdaToken-3D: Dynamic Spatial Gating for Efficient 3D Large Multimodal-Models Reasoning",
    kind="calibrated",
    site="decoder layers at 1/4, 1/2 and 3/4 of the depth",
    paper="Zhang, Chen, Zhang, 2025, arXiv 2505.12782",
    repository="junkerman2004/Adatoken-3D",
    needs=("attention of the prompt's last token to the visual tokens at the layers of the schedule",),
    mechanism=("attention", "query"),
    modality="3d",
    score="attention of the prompt's last token, mean over heads",
    allocate="a schedule made of the layers' attention to spatial tokens, measured once for a model",
    select="top-k",
    claim="63% fewer FLOPs at the dense accuracy (within a point) and 21% faster, here at 3/8 of the visual tokens.",
    departures=("tokens keep their positions",),
)

DEPTHS = (1 / 4, 1 / 2, 3 / 4)


def contribution_profile(attentions: Sequence[Tensor], spans: Mapping[str, slice]) -> dict[str, Tensor]:
    """For each of ``spans`` (columns of the prompt, such as "system", "spatial", "text") the share of attention that it
    gets from the prompt's last token, (L,) by layer, mean over prompts and heads.

    ``attentions``: (B, H, T, T) of each of L layers, as a model gives them with ``output_attentions=True``. Shares of
    spans that cover the prompt sum to 1 in each layer.
    """
    rows = [upcast(layer[:, :, -1]).mean((0, 1)) for layer in attentions]
    return {name: torch.stack([row[span].sum() for row in rows]) for name, span in spans.items()}


def idle_share(attention: Tensor, mass: float = 0.05) -> Tensor:
    """(B,): the largest share of the tokens that together get less than ``mass`` of the ``attention`` (B, N) >= 0."""
    if not 0 < mass <= 1:
        raise ValueError(f"mass: got {mass}, must be in (0, 1]")
    rising = upcast(attention).sort(1).values.cumsum(1)
    return (rising < mass * rising[:, -1:]).double().mean(1)


def schedule_from_profile(
    profile: Tensor, target: float, depths: tuple[float, ...] = DEPTHS, least: float = 0.05
) -> tuple[float, ...]:
    """The share of all tokens that is left from each of ``depths`` on: ``ratios`` of the system. They do not rise.

    ``profile`` (L,): the share of attention that spatial tokens get in each layer. A stage keeps in proportion to the
    largest share from its first layer on (a token that is dropped cannot come back), but no stage less than ``least``
    times the first. ``target``: their mean over the layers, 1 before the first stage included. ValueError if the layers
    before the first stage reach it alone, or if it is above 1.
    """
    num_layers = len(profile)
    starts = [math.ceil(depth * num_layers - 1e-9) for depth in depths]
    if not starts or starts != sorted(set(starts)) or starts[-1] >= num_layers:
        raise ValueError(f"depths: got {depths}, must rise within [0, 1), each to another of the {num_layers} layers")
    ahead = [float(profile[start:].max()) for start in starts]
    weights = [max(share, least * ahead[0]) if ahead[0] > 0 else 1.0 for share in ahead]
    lengths = [end - start for start, end in zip(starts, [*starts[1:], num_layers], strict=True)]
    left = target * num_layers - starts[0]
    if not 0 < left <= sum(lengths) + 1e-9:
        raise ValueError(f"target: got {target}, must be above {starts[0] / num_layers:.3f} and at most 1")
    ratios: list[float] = []
    for stage, weight in enumerate(weights):  # weights do not rise: the first stages are the ones that reach 1
        level = left / sum(n * w for n, w in zip(lengths[stage:], weights[stage:], strict=True))
        ratios.append(min(ratios[-1] if ratios else 1.0, level * weight))
        left -= lengths[stage] * ratios[-1]
    return tuple(ratios)


@dataclass(frozen=True)
class AdaToken3D(LastTokenRanking):
    """Top-k by the last token's attention, in stages whose ratios a profile of the model gives."""

    ratios: tuple[float, ...] = (0.8, 0.6, 0.4)
    """Share of all tokens that is left in each stage."""
    depths: tuple[float, ...] = (1 / 4, 1 / 2, 3 / 4)
    """Where in the decoder the stages begin, as shares of its layers."""

    def __post_init__(self) -> None:
        if not self.depths or list(self.depths) != sorted(self.depths) or not all(0 <= d < 1 for d in self.depths):
            raise ValueError(f"depths: got {self.depths}, must rise within [0, 1)")
        if len(self.ratios) != len(self.depths):
            raise ValueError(f"ratios: got {len(self.ratios)}, must be one for each of the {len(self.depths)} depths")
        if list(self.ratios) != sorted(self.ratios, reverse=True) or not all(0 < r <= 1 for r in self.ratios):
            raise ValueError(f"ratios: got {self.ratios}, must be shares in (0, 1] of all tokens that do not rise")

    def schedule(self, num_tokens: int, keep: int, num_layers: int) -> Schedule:
        return Schedule(num_tokens, stages_from_all(self.depths, self.ratios, keep, num_tokens, num_layers))


def claim(trial: Trial) -> Outcome:
    """The abstract: LLaVA-3D 21% faster with 63% fewer FLOPs at the original accuracy."""
    dense, pruned = trial.accuracy(None), trial.accuracy(AdaToken3D(), keep=3 / 8)
    speedup = trial.ttft_ms(None) / trial.ttft_ms(AdaToken3D(), keep=3 / 8)
    return Outcome(
        "accuracy with 3/8 of the tokens",
        baseline=dense,
        value=pruned,
        holds=pruned >= dense - 0.01 and speedup >= 1.21,
        note=f"first token {speedup:.2f} times sooner (paper: 1.21)",
    )
