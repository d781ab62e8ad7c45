"""Small reducers for the tests of the host; the catalogue's own are tested elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vistok.host import Evidence, Reducer, Reduction, Schedule


def spread(n: int, keep: int) -> list[int]:
    """keep positions of 0..n-1, neither a prefix nor evenly spaced."""
    order = sorted(range(n), key=lambda i: (i * 7919 + 13) % (4 * n + 1))
    return sorted(order[:keep])


@dataclass(frozen=True)
class Spread(Reducer):
    """Keeps fixed positions of every picture."""

    whole_picture = True

    def select(self, evidence: Evidence, keep: int) -> Tensor:
        b, n = evidence.features.shape[:2]
        return torch.tensor(spread(n, keep), device=evidence.features.device).expand(b, -1)


@dataclass(frozen=True)
class EncoderSpread(Spread):
    """The same, in encoder space: the host projects."""

    space = "encoder"


@dataclass(frozen=True)
class Staged(Spread):
    """Fixed positions before the language model and before some of its layers: stages are {layer: share of N}."""

    first: float = 0.5
    stages: Mapping[int, float] = field(default_factory=lambda: {1: 0.25})
    layer_wants: Mapping[str, str | None] = field(default_factory=dict)
    seen: list = field(default_factory=list, compare=False)

    @property
    def layer_needs(self):
        return self.layer_wants

    def schedule(self, num_tokens: int, keep: int, num_layers: int) -> Schedule:
        share = lambda part: round(part * num_tokens)  # noqa: E731
        return Schedule(max(1, share(self.first)), {layer: share(part) for layer, part in self.stages.items()})

    def at_layer(self, evidence: Evidence, keep: int, layer: int) -> Reduction:
        self.seen.append((layer, evidence))
        return Reduction.select(evidence.features, self.select(evidence, keep))


@dataclass(frozen=True)
class Asks(Spread):
    """Fixed positions, and keeps the evidence it was shown."""

    wants: Mapping[str, object] = field(default_factory=dict)
    seen: list = field(default_factory=list, compare=False)

    @property
    def needs(self):
        return self.wants

    def select(self, evidence: Evidence, keep: int) -> Tensor:
        self.seen.append(evidence)
        return super().select(evidence, keep)


@dataclass(frozen=True)
class Mean(Reducer):
    """Merges runs of neighbours into their means (anchor: the first of a run)."""

    whole_picture = True

    def compress(self, evidence: Evidence, keep: int) -> Reduction:
        b, n, _ = evidence.features.shape
        source = (torch.arange(n, device=evidence.features.device) * keep // n).expand(b, -1)
        anchors = torch.searchsorted(source[0].contiguous(), torch.arange(keep, device=source.device)).expand(b, -1)
        sums = torch.zeros(b, keep, evidence.features.shape[2], device=source.device, dtype=evidence.features.dtype)
        sums.scatter_add_(1, source[..., None].expand_as(evidence.features), evidence.features)
        counts = torch.bincount(source[0], minlength=keep)
        return Reduction(anchors, sums / counts[:, None], source)
