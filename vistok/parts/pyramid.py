"""Backbones whose maps grow smaller from stage to stage: what every one of them gives, by timm's conventions."""

from __future__ import annotations

from collections.abc import Sequence

from timm.models import FeatureInfo
from torch import Tensor, nn


class Pyramid(nn.Module):
    """Pictures (B, 3, H, W) to logits (B, num_classes); with ``features_only`` to a list of maps (B, C, h, w).

    ``stages``: each makes the map of the one before smaller, then works on it; ``dims`` their channels, ``reductions``
    how much smaller than the picture their maps are. ``norm``: of the last map, before it is averaged. As in timm,
    ``feature_info`` has the channels and reduction of each map, and ``num_classes`` 0 gives the averaged map itself.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        dims: Sequence[int],
        reductions: Sequence[int],
        norm: nn.Module,
        num_classes: int = 1000,
        features_only: bool = False,
    ) -> None:
        super().__init__()
        if not len(stages) == len(dims) == len(reductions):
            raise ValueError(f"dims: got {len(dims)} and {len(reductions)} reductions, must be one a stage each")
        self.features_only = features_only
        self.num_classes, self.num_features = num_classes, dims[-1]
        places = tuple(range(len(stages)))
        told = [
            dict(num_chs=c, reduction=r, module=f"stages.{i}")
            for i, (c, r) in enumerate(zip(dims, reductions, strict=True))
        ]
        self.feature_info = FeatureInfo(told, places)
        self.stages = nn.ModuleList(stages)
        if not features_only:
            self.norm = norm
            self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()

    def forward_maps(self, x: Tensor) -> list[Tensor]:
        """The map of each stage."""
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        maps = self.forward_maps(x)
        return maps if self.features_only else self.head(self.norm(maps[-1]).mean((2, 3)))


class MapNorm(nn.LayerNorm):
    """Layer norm over the channels of a map (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def drop_rates(most: float, depths: Sequence[int]) -> list[list[float]]:
    """Rates of stochastic depth for the blocks of each stage, rising evenly from 0 to ``most``."""
    rates = [most * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
    starts = [sum(depths[:i]) for i in range(len(depths))]
    return [rates[start : start + depth] for start, depth in zip(starts, depths, strict=True)]
