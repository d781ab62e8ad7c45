"""Two versions of a module, each for its own tokens (Bridge)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class Route:
    """Which tokens of the forward that is under way are drawn: (B, T) bool, or None where none is."""

    drawn: Tensor | None = None


class Routed(nn.Module):
    """A module of one input (B, T, ...) in two versions, each of which gets its own tokens only."""

    def __init__(self, understanding: nn.Module, route: Route) -> None:
        super().__init__()
        self.drawing = copy.deepcopy(understanding).requires_grad_(True)
        self.understanding = understanding.requires_grad_(False)
        self.route = route

    def forward(self, x: Tensor) -> Tensor:
        drawn = self.route.drawn
        if drawn is None:
            return self.understanding(x)
        seen, made = self.understanding(x[~drawn]), self.drawing(x[drawn])
        out = made.new_empty(*x.shape[:2], *made.shape[1:])
        out[~drawn], out[drawn] = seen.to(made.dtype), made
        return out
