"""Faster neighbourhood attention: each query of a grid attends to its nearest keys, computed tile by tile.

What: along each axis a query sees the ``kernel`` keys nearest to it, every ``dilation``-th of them, at a border the
window that still fits; on a causal axis only keys up to its own. The paper's gain is in how: a tile of queries is one
dense product with the box of keys that any of them sees, masked where it sees less, without the map of all tokens.
Here that is the executor ``tiles`` of ``vistok.core.attention``, which trains on a CPU; ``gather`` goes key by key, as
the kernels before did, and ``flex`` hands blocks to FlexAttention. Additional keys (a prompt, registers) are attended
to by every query, merged by log-sum-exp. Source: Hassani et al., arXiv 2403.04690, SHI-Labs/NATTEN. Where: in place of
a layer's attention, on 1-D, 2-D and 3-D grids.

A kernel of 1, which the released code refuses, gives the value itself. Its mask for FlexAttention is wrong where tiles
of queries and of keys differ in size (latent: its own are alike); here any sizes give the same result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vistok.catalogue.card import AttendTrial, Card, Outcome
from vistok.core.attention import Dense, GridWindow, attend_grid
from vistok.parts.grid_attention import GridAttention

CARD = Card(
    title="Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level",
    kind="trained",
    site="in place of a layer's attention, on grids of one to three axes",
    paper="Hassani et al., 2024, arXiv 2403.04690",
    repository="SHI-Labs/NATTEN",
    mechanism=("transformation",),
    score="distance along each axis",
    select="the nearest keys of each query, windows shifted at borders",
    claim="Tiles make neighbourhood attention faster than element by element, and than dense attention.",
    departures=("a kernel of 1 is allowed", "tiles of queries and of keys may differ in size"),
)


@dataclass(frozen=True)
class NeighborhoodAttention(GridAttention):
    """The operator. ``kernel``, ``dilation`` and ``causal``: one for all axes, or one for each."""

    kernel: int | tuple[int, ...] = 7
    """Keys that a query sees along an axis."""
    dilation: int | tuple[int, ...] = 1
    """Distance of those keys."""
    causal: bool | tuple[bool, ...] = False
    """Whether a query sees only keys up to its own along an axis."""

    def pattern(self, shape: tuple[int, ...]) -> GridWindow:
        """Which keys each query of a grid of ``shape`` sees. Raises ValueError if kernel * dilation does not fit."""
        return GridWindow(shape, self.kernel, 1, self.dilation, self.causal)


def claim(trial: AttendTrial) -> Outcome:
    """The abstract: against element-wise kernels, and dense attention. 64 x 64 tokens, windows of 13 x 13, 2 heads."""
    operator = NeighborhoodAttention(13)
    q, k, v = torch.randn(3, 1, 64, 64, 2, 64, generator=torch.Generator().manual_seed(trial.seed)).unbind()
    taken = trial.milliseconds(
        {
            "dense": lambda: attend_grid(q, k, v, Dense(4096, 4096)),
            "gather": lambda: operator(q, k, v, executor="gather"),
            "tiles": lambda: operator(q, k, v, executor="tiles"),
        }
    )
    note = f"key by key: {taken['gather']:.0f} ms; density {operator.pattern((64, 64)).density:.1%}"
    holds = taken["tiles"] < min(taken["dense"], taken["gather"])
    return Outcome("milliseconds, against dense", taken["dense"], taken["tiles"], holds, note)
