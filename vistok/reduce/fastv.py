"""FastV: after two layers of the language model, keep the visual tokens that the prompt's last token attends to most.

What: past the first layers a language model hardly looks at most visual tokens. The attention of layer K - 1, from the
last token of the prompt, mean over heads, ranks them; only the best go on. Source: Chen et al., arXiv 2403.06764,
pkunlp-icler/FastV. Where: before one decoder layer, once; the tokens of a picture that was cut are ranked together.

``keep`` is the mean over the decoder's layers: those before the stage run on all tokens, and the count after it is what
brings the mean nearest to ``keep`` (less than half a token off). The paper fixes that count instead (half of the
tokens, which in 32 layers is a mean of 17/32). Where K - 1 layers of all tokens would spend more than 3/4 of the
budget, in a small model or for a small ``keep``, the stage moves to an earlier layer, if need be to layer 0, which any
``keep`` can be met from: ``vistok.core.stages.stages_from_all``.

Departures: the stage is before layer K - 1, whose attention is worked out from its own norm and projections before it
runs, and not after it. So the choice is the released one, but what is dropped is spared one layer more.
"""

from __future__ import annotations

from dataclasses import dataclass

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core.stages import stages_from_all
from vistok.host.reducer import Schedule
from vistok.reduce._last_token import LastTokenRanking

CARD = Card(
    title="An Image is Worth 1/2 Tokens After Layer 2 (FastV)",
    kind="training-free",
    site="one early decoder layer",
    paper="Chen et al., 2024, arXiv 2403.06764",
    repository="pkunlp-icler/FastV",
    needs=("attention of the prompt's last token to the visual tokens at one decoder layer",),
    mechanism=("attention", "query"),
    score="attention of the prompt's last token, mean over heads",
    select="top-k",
    claim="Without half of the visual tokens after layer 2 no accuracy is lost (more than a point).",
    departures=("tokens are gone from the layer on that ranks them, one layer sooner",),
)


@dataclass(frozen=True)
class FastV(LastTokenRanking):
    """Top-k by the last token's attention, early in the language model."""

    layer: int = 2
    """K of the paper: tokens are ranked by decoder layer K - 1, counted from 0."""

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise ValueError(f"layer: got {self.layer}, must be 1 or more (layer K - 1 ranks the tokens)")

    def schedule(self, num_tokens: int, keep: int, num_layers: int) -> Schedule:
        depth = min((self.layer - 1) / num_layers, 1)
        return Schedule(num_tokens, stages_from_all((depth,), (1,), keep, num_tokens, num_layers))


def claim(trial: Trial) -> Outcome:
    """The title and the abstract: half of the tokens dropped after layer 2 of 32, "without sacrificing performance"."""
    dense = trial.accuracy(None)
    pruned = trial.accuracy(FastV(), keep=17 / 32)
    return Outcome(
        "accuracy with half of the tokens after layer 2", baseline=dense, value=pruned, holds=pruned >= dense - 0.01
    )
