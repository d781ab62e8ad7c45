"""Average pooling: the control that loses no token and no choice, only detail.

What: the grid is cut into ``keep`` nearly square cells of nearly equal size, and each becomes the mean of its tokens,
at the place of its middle one. Where ``keep`` is the grid's size over a square, this is ordinary 2 x 2, 3 x 3, ...
pooling. Where: between the projector and the language model, once; a picture that was cut is reduced part by part.
"""

from __future__ import annotations

from dataclasses import dataclass

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core.cells import grid_cells
from vistok.core.merge import size_weighted_mean
from vistok.host.reducer import Evidence, Reducer, Reduction
from vistok.reduce.uniform import Uniform

CARD = Card(
    title="Average pooling (control)",
    kind="control",
    site="projector output, before the language model",
    paper="",
    mechanism=("transformation",),
    merge="mean over each of K cells of the grid",
    claim="With 25% of the tokens it answers better than a uniform choice of as many: what it merges is not lost.",
)


@dataclass(frozen=True)
class Pool(Reducer):
    """The mean of each cell."""

    def compress(self, evidence: Evidence, keep: int) -> Reduction:
        x, grid = evidence.features, evidence.grid or (1, evidence.num_tokens)
        source, anchor = (places.to(x.device).expand(len(x), -1) for places in grid_cells(grid, keep))
        return Reduction(anchor, size_weighted_mean(x, source, keep, anchor=anchor).tokens, source)


def claim(trial: Trial) -> Outcome:
    """Accuracy against ``uniform``, which keeps one token of each of the same cells and drops the others."""
    chosen = trial.accuracy(Uniform(), keep=0.25)
    pooled = trial.accuracy(Pool(), keep=0.25)
    return Outcome("accuracy with 25% of the tokens, pooled over chosen", chosen, pooled, holds=pooled >= chosen)
