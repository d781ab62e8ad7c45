"""Generalised neighbourhood attention: queries side by side share a window, so that tiles fit and nothing is wasted.

What: as neighbourhood attention, but ``stride`` queries along an axis share the window of the one in their middle. At 1
it is neighbourhood attention, at ``stride`` = ``kernel`` attention in blocks, between them HaloNet's geometry with
windows that shift at borders. A tile of queries then needs the keys of few windows, in the best case of one, and all of
them: the gain is as large as the FLOPs promise. Which strides reach that on which tiles is counted, not tried:
``vistok gna-sim``. Source: Hassani et al., arXiv 2504.16922, SHI-Labs/NATTEN (whose simulator is not released). Where:
in place of a layer's attention, on 1-D, 2-D and 3-D grids; a stride changes the model, so quality must be measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vistok.catalogue.card import AttendTrial, Card, Outcome
from vistok.core.attention import GridWindow, best_stride
from vistok.parts.grid_attention import GridAttention

CARD = Card(
    title="Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light",
    kind="training-free",
    site="in place of a layer's attention, on grids of one to three axes",
    paper="Hassani et al., 2025, arXiv 2504.16922",
    repository="SHI-Labs/NATTEN",
    mechanism=("transformation",),
    score="distance along each axis, from the middle of a group of queries",
    select="the nearest keys of each group, windows shifted at borders",
    claim="At equal density a stride that fits the tiles is faster than a window for each query.",
    departures=("a kernel of 1 is allowed", "tiles of queries and of keys may differ in size"),
)


@dataclass(frozen=True)
class GeneralizedNeighborhoodAttention(GridAttention):
    """The operator. All values: one for all axes, or one for each."""

    kernel: int | tuple[int, ...] = 16
    """Keys that a query sees along an axis."""
    stride: int | tuple[int, ...] = 8
    """Queries along an axis that share a window, at most the kernel."""
    dilation: int | tuple[int, ...] = 1
    """Distance of the keys."""
    causal: bool | tuple[bool, ...] = False
    """Whether a query sees only keys up to its own along an axis."""

    def pattern(self, shape: tuple[int, ...]) -> GridWindow:
        """Which keys each query of a grid of ``shape`` sees. Raises ValueError if the kernel or stride does not fit."""
        return GridWindow(shape, self.kernel, self.stride, self.dilation, self.causal)


def claim(trial: AttendTrial) -> Outcome:
    """The abstract: the FLOP bound is reached where windows fit the tiles. 64 x 64 tokens, windows of 16 x 16, 4 heads;
    the stride is the simulator's for tiles of 8 x 8."""
    q, k, v = torch.randn(3, 1, 64, 64, 4, 64, generator=torch.Generator().manual_seed(trial.seed)).unbind()
    stride = best_stride((64, 64), 16, 8, 8)
    sliding, strided = GeneralizedNeighborhoodAttention(16, 1), GeneralizedNeighborhoodAttention(16, stride)
    taken = trial.milliseconds(
        {
            "sliding": lambda: sliding(q, k, v, executor="tiles"),
            "strided": lambda: strided(q, k, v, executor="tiles"),
        }
    )
    note = f"stride {stride}, density {strided.pattern((64, 64)).density:.2%} both"
    faster = taken["strided"] < taken["sliding"]
    return Outcome("milliseconds, against stride 1", taken["sliding"], taken["strided"], faster, note)
