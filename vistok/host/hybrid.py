"""Decoders some of whose layers attend and the others run a recurrence over the sequence (linear attention).

A recurrence knows no columns: it reads what it is given. So only the layers that attend hold keys whose columns are
kept count of; a recurrent layer keeps its own kind of cache, and its state has read no dropped token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vistok.host.stream import Stream


class HybridStream(Stream):
    """A Stream whose ``layers`` are those of the cache that attend."""

    def __init__(self, *args: Any, full: Sequence[int]) -> None:
        """``full``: the numbers of the decoder layers that attend, ascending."""
        super().__init__(*args)
        self.full = full

    def _slot(self, layer: int) -> int:
        """Which of ``full`` is the first at or after ``layer``."""
        return bisect_left(self.full, layer)

    def past_keys(self, layer: int) -> tuple[Tensor, Tensor] | None:
        return super().past_keys(self._slot(layer)) if layer in self.full else None

    def narrow(self, index: Tensor, layer: int = 0) -> None:
        super().narrow(index, self._slot(layer))
        real = self.real
        if self.seen and real is not None and not bool(real.all()):
            raise ValueError(
                "pixel_values: the rows of a later turn are left with different numbers of tokens, and the "
                "linear-attention layers of this model would read the padding between two turns; give each row its own "
                "cache"
            )

    def widen(self, index: Tensor, layer: int) -> None:
        super().widen(index, self._slot(layer))

    def cut(self, first: int) -> None:
        super().cut(self._slot(first))

    def feed(self, layer: int, hidden: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        if layer in self.full:
            return super().feed(self._slot(layer), hidden, given)
        if self._given is not None and self._given[0] == self.narrowings:
            return given if not self.narrowings else given | {"position_ids": None}
        real = self.real
        if real is not None and (hidden.shape[1] == 1 or bool(real.all())):
            real = None
        return given | {"attention_mask": real, "position_ids": None}

    def number(self, layer: int) -> int:
        return self.full[layer]
