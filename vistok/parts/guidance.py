"""Guidance that remembers."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from vistok.core.flow import apg


@dataclass
class APG:
    """Adaptive projected guidance over one sampling run (``vistok.core.flow.apg``): make a new one for each.

    A solver that asks the model several times a step advances the momentum each time; Euler asks once.
    """

    scale: float
    momentum: float = -0.5
    eta: float = 0.0
    clip: float = 2.5
    _average: Tensor | None = field(default=None, init=False, repr=False)

    def __call__(self, cond: Tensor, uncond: Tensor) -> Tensor:
        """The guided prediction, of the shape of both (B, ...)."""
        guide, self._average = apg(cond, uncond, self.scale, self._average, self.momentum, self.eta, self.clip)
        return guide
