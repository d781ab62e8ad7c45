"""PyramidDrop: half of the visual tokens go at every quarter of the language model.

What: visual tokens are all needed in shallow layers and ever fewer in deeper ones. At each stage's end the tokens are
ranked by the attention of the prompt's last token, computed from the next layer's own norm and projections, mean over
heads, and the share ``ratio`` of them goes on. Source: Xing et al., arXiv 2410.17247, Cooperx521/PyramidDrop. Where:
before the decoder layers at 1/4, 1/2 and 3/4 of the depth; the tokens of a picture that was cut are ranked together.

``keep`` is the mean over the decoder's layers. The published counts (all, 1/2, 1/4, 1/8 of the tokens) have a mean of
15/32; other means scale the stages and leave the first quarter whole, where its tokens do not spend more than 3/4 of
the budget. Below that (a mean of a third of the tokens) the stages move towards layer 0, which any ``keep`` can be met
from: ``vistok.core.stages.stages_from_all``.

Departures: none in the choice. Positions stay those of the picture (the released code closes the gaps; the host's
``position="recompact"`` does so), and counts are rounded so that the mean is met, not down.
"""

from __future__ import annotations

from dataclasses import dataclass

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core.stages import stages_from_all
from vistok.host.reducer import Schedule
from vistok.reduce._last_token import LastTokenRanking

CARD = Card(
    title="PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction",
    kind="training-free",
    site="decoder layers at 1/4, 1/2 and 3/4 of the depth",
    paper="Xing et al., 2024, arXiv 2410.17247",
    repository="Cooperx521/PyramidDrop",
    needs=("attention of the prompt's last token to the visual tokens at three decoder layers",),
    mechanism=("attention", "query"),
    score="attention of the prompt's last token, mean over heads",
    allocate="each stage half of the one before it",
    select="top-k",
    claim="With half of the visual tokens dropped at each quarter of the layers no accuracy is lost (above a point).",
    departures=("tokens keep their positions",),
)


@dataclass(frozen=True)
class PyramidDrop(LastTokenRanking):
    """Top-k by the last token's attention, in stages that each keep the same share."""

    ratio: float = 0.5
    """Share of its tokens that a stage hands on to the next."""
    depths: tuple[float, ...] = (1 / 4, 1 / 2, 3 / 4)
    """Where in the decoder the stages begin, as shares of its layers."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio: got {self.ratio}, must be in (0, 1]")
        if not self.depths or list(self.depths) != sorted(self.depths) or not all(0 < d < 1 for d in self.depths):
            raise ValueError(f"depths: got {self.depths}, must rise within (0, 1)")

    def schedule(self, num_tokens: int, keep: int, num_layers: int) -> Schedule:
        shape = [self.ratio**stage for stage in range(len(self.depths))]
        return Schedule(num_tokens, stages_from_all(self.depths, shape, keep, num_tokens, num_layers))


def claim(trial: Trial) -> Outcome:
    """The abstract: 55% less inference FLOPs with comparable performance, with the published stages."""
    dense = trial.accuracy(None)
    pruned = trial.accuracy(PyramidDrop(), keep=15 / 32)
    return Outcome("accuracy with 15/32 of the tokens", baseline=dense, value=pruned, holds=pruned >= dense - 0.01)
