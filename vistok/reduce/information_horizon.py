"""Information horizon: prune with care where visual tokens differ, at random where they no longer do, then drop all.

What: measured by what its absence does to the answer's probability, a visual token's information fades with depth. In
shallow layers tokens differ, and a method that chooses well pays; deeper all are alike, and a random choice is as good
as any; past the *information horizon* none matters. So a base method chooses before the language model, a uniform
random choice of its survivors follows deep in it, and past the horizon no visual token is left. ``vistok horizon``
measures the two layers for a model and a task. Source: Wang et al., arXiv 2512.07580,
YahongWang1/Information-Horizon. Where: where the base method acts, and before deep decoder layers.

``keep`` is the mean over the decoder's layers. The released runs on LLaVA-1.5-7B keep 284 tokens in 20 layers and 38 of
them in the other 12 for a mean of 192: a fall to 2/15 at 5/8 of the depth, which other counts and depths follow. More
tokens than can be spent that way stay in the random stages, and then past the horizon.

Departures: the released code drops nothing past the horizon (``horizon=1``), which the paper's finding asks for; 7/8 is
behind the horizons reported for LLaVA-1.5-7B (layers 16 to 24 of 32) and, but for reading (27 of 28), Qwen2.5-VL-7B. It
also closes the gaps in the positions at the random stage; the host's ``position="recompact"`` does so. All pictures of
one size keep the same survivors: average over seeds. The base acts before the language model; DART, which the paper
also starts from, does not.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from itertools import pairwise

from vistok import catalogue
from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core import select
from vistok.host.reducer import Evidence, Reducer, Reduction, Schedule
from vistok.host.wrapper import Wrapper

CARD = Card(
    title="All You Need Are Random Visual Tokens? Demystifying Token Pruning in VLLMs (+Random)",
    kind="training-free",
    site="projector output, before the language model; deep decoder layers",
    paper="Wang et al., 2025, arXiv 2512.07580",
    repository="YahongWang1/Information-Horizon",
    needs=("what its base method asks for",),
    mechanism=("similarity",),
    score="that of the base method (DivPrune); deep in the language model none",
    allocate="the base method's tokens for 5/8 of the layers, 2/15 of them after that, none in the last eighth",
    select="the base method's choice, then a seeded uniform random one",
    claim="Keeps 96.9% of the dense accuracy with 50% of the visual tokens pruned.",
    departures=("tokens keep their positions at the random stage", "none is left past the horizon"),
)


@dataclass(frozen=True)
class InformationHorizon(Wrapper):
    """A base method, then random survivors, then none."""

    method: str = "divprune"
    """The base: a system that reduces before the language model only."""
    stages: tuple[tuple[float, float], ...] = ((5 / 8, 2 / 15),)
    """Random stages: where in the decoder, as a share of its layers, and the share of the base's tokens left from there
    on."""
    horizon: float = 7 / 8
    """From which share of the layers on no visual token is left; 1: from none."""
    seed: int = 0
    """The same seed keeps the same places."""

    def __post_init__(self) -> None:
        depths, shares = [depth for depth, _ in self.stages], [share for _, share in self.stages]
        if not all(a < b for a, b in pairwise([0.0, *depths, 1.0])) or not all(0 < s <= 1 for s in shares):
            raise ValueError(f"stages: got {self.stages}, must be (depth, share) with depths that rise within (0, 1)")
        if shares != sorted(shares, reverse=True):
            raise ValueError(f"stages: got {self.stages}, their shares must not rise")
        if not 0 < self.horizon <= 1:
            raise ValueError(f"horizon: got {self.horizon}, must be in (0, 1]")
        if type(self.base).at_layer is not Reducer.at_layer:
            raise ValueError(f"method: got {self.method!r}, must be a reducer without stages in the language model")

    def schedule(self, num_tokens: int, keep: int, num_layers: int) -> Schedule:
        """The base's count, then the random stages' and none, with a mean of ``keep`` (less where it does not divide).

        Stages that would begin in the same layer as a later one, or not before the last, are left out.
        """
        end = _layer(self.horizon, num_layers)
        shares = {_layer(depth, num_layers): share for depth, share in self.stages}
        starts = [layer for layer in shares if layer < end]
        lengths = [b - a for a, b in pairwise([0, *starts, end])]

        def counts(first: int) -> list[int]:
            return [first, *(max(1, math.floor(shares[layer] * first + 0.5)) for layer in starts)]

        def spent(first: int) -> int:
            return sum(n * length for n, length in zip(counts(first), lengths, strict=True))

        first = max(1, bisect.bisect_right(range(1, num_tokens + 1), keep * num_layers, key=spent))
        left, spare = counts(first), keep * num_layers - spent(first)
        inside = len(left)
        if end < num_layers:
            starts, lengths, left = [*starts, end], [*lengths, num_layers - end], [*left, 0]
        for i in range(1, len(left) if first == num_tokens else inside):
            more = max(0, min(left[i - 1] - left[i], spare // lengths[i]))
            left[i], spare = left[i] + more, spare - more * lengths[i]
        return Schedule(left[0], dict(zip(starts, left[1:], strict=True)))

    def at_layer(self, evidence: Evidence, keep: int, layer: int) -> Reduction:
        x, n = evidence.features, evidence.num_tokens
        places = select.random(1, n, keep, self.seed + 7919 * layer, device=x.device)  # stages draw independently
        return Reduction.select(x, places.expand(len(x), keep))


def _layer(share: float, num_layers: int) -> int:
    return math.ceil(share * num_layers - 1e-9)


def claim(trial: Trial) -> Outcome:
    """The abstract: DivPrune with random pruning keeps 96.9% of Qwen2.5-VL-7B with half of the visual tokens pruned."""
    system = InformationHorizon()
    dense, pruned = trial.accuracy(None), trial.accuracy(system, keep=0.5)
    base = trial.accuracy(catalogue.create(system.method), keep=0.5)
    return Outcome(
        "accuracy with 50% of the tokens",
        baseline=dense,
        value=pruned,
        holds=pruned >= 0.969 * dense,
        note=f"{base:.1%} with {system.method} alone",
    )
