"""Counts for reducers that work in stages, and the order of slots that a merge made in another order.

``geometric_stages`` and ``stage_counts`` turn a falling shape (authors give it as an example for one model, such as 96
tokens and 32 after layer 16 of 32) into whole numbers for any depth whose mean over the layers is exact, so that staged
methods can be compared with others at equal cost; ``stages_from_all`` does so for methods that let all tokens into the
decoder's first layers. ``raster_slots`` puts slots back where their anchors stand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from vistok.core.tensors import take


def stage_starts(shares: Sequence[float], num_layers: int) -> tuple[int, ...]:
    """The layer before which each stage begins: ``shares`` (rising, in [0, 1)) of ``num_layers``, rounded up.

    Stages that would begin at the same layer as the next one, or after the last layer, are left out.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers: got {num_layers}, must be 1 or more")
    if any(not 0 <= share < 1 for share in shares) or list(shares) != sorted(shares):
        raise ValueError(f"shares: got {tuple(shares)}, must rise within [0, 1)")
    starts = {math.ceil(share * num_layers - 1e-9) for share in shares}
    return tuple(sorted(start for start in starts if start < num_layers))


def geometric_stages(
    depths: Sequence[float], fall: float, mean: int, limit: int, num_layers: int
) -> tuple[int, dict[int, int]]:
    """Tokens before the first layer, and from which layer on how many, for stages that begin at ``depths``.

    ``depths`` rise within (0, 1), shares of ``num_layers``. The counts fall geometrically, the last to ``fall`` (in
    (0, 1]) times the first, and average to exactly ``mean``; none is above ``limit``. See ``stage_counts``.
    """
    starts = stage_starts((0, *depths), num_layers)
    lengths = tuple(end - start for start, end in zip(starts, (*starts[1:], num_layers), strict=True))
    last = max(len(starts) - 1, 1)
    counts = stage_counts(lengths, tuple(fall ** (i / last) for i in range(len(starts))), mean, limit)
    return counts[0], dict(zip(starts[1:], counts[1:], strict=True))


def stages_from_all(
    depths: Sequence[float], shape: Sequence[float], mean: int, limit: int, num_layers: int
) -> dict[int, int]:
    """From which layer on how many tokens are left, where all ``limit`` tokens enter the decoder's first layers.

    ``depths`` rise within [0, 1], shares of ``num_layers``; ``shape``, one for each, positive and not rising: what the
    stages' counts are proportional to. Counts are whole, in 1..``limit`` and do not rise. Their mean over all layers,
    with ``limit`` before the first stage, is as near to ``mean`` as whole counts come: less than half a token off.

    Layers of all tokens may spend 3/4 of the budget, so that something is left to choose with. A smaller ``mean`` moves
    the stages towards layer 0, which every ``mean`` can be met from; the layers after the first stage are divided among
    the stages in the same proportions. Stages that fall on one layer are one, with the last one's shape. No stages for
    ``mean == limit``.
    """
    if len(depths) != len(shape) or not depths:
        raise ValueError(f"depths: got {len(depths)}, must be as many as the {len(shape)} entries of shape, at least 1")
    if any(not 0 <= depth <= 1 for depth in depths) or list(depths) != sorted(depths):
        raise ValueError(f"depths: got {tuple(depths)}, must rise within [0, 1]")
    if min(shape) <= 0 or list(shape) != sorted(shape, reverse=True):
        raise ValueError(f"shape: got {tuple(shape)}, must be positive and not rising")
    if num_layers < 1:
        raise ValueError(f"num_layers: got {num_layers}, must be 1 or more")
    if not 1 <= mean <= limit:
        raise ValueError(f"mean: got {mean}, must be between 1 and the limit of {limit} tokens")
    if mean == limit:
        return {}
    planned = [min(math.ceil(depth * num_layers - 1e-9), num_layers - 1) for depth in depths]
    affordable = min(3 * mean * num_layers // (4 * limit), num_layers * (mean - 1) // (limit - 1))
    first = min(planned[0], affordable)
    stretch = (num_layers - first) / (num_layers - planned[0])
    where = {
        first + math.floor((start - planned[0]) * stretch + 0.5): s for start, s in zip(planned, shape, strict=True)
    }
    starts = list(where)
    lengths = [end - start for start, end in zip(starts, [*starts[1:], num_layers], strict=True)]
    total = mean * num_layers - first * limit
    quotas = _quotas(lengths, list(where.values()), total, limit)
    windows = [range(max(1, math.ceil(q - 1)), min(limit, math.floor(q + 1)) + 1) for q in quotas]

    def error(counts: tuple[int, ...]) -> tuple[int, float]:
        spent = sum(n * c for n, c in zip(lengths, counts, strict=True))
        return abs(spent - total), sum(n * (c - q) ** 2 for n, c, q in zip(lengths, counts, quotas, strict=True))

    falling = (counts for counts in product(*windows) if list(counts) == sorted(counts, reverse=True))
    best = min(falling, key=error)
    return dict(zip(starts, best, strict=True))


@lru_cache(maxsize=256)
def stage_counts(lengths: tuple[int, ...], shape: tuple[float, ...], mean: int, limit: int) -> tuple[int, ...]:
    """Tokens in each stage: whole, not rising, in 1..``limit``, with ``sum(lengths * counts) == mean * sum(lengths)``.

    ``lengths``: layers of each stage; ``shape``: what the counts should be proportional to (positive, not rising);
    ``mean``: tokens averaged over the layers, in 1..``limit``. A stage that would exceed ``limit`` gets it, and the
    others take the rest in proportion. Of all exact answers the one is taken whose largest distance to the real
    quotas, rounded up to whole tokens, is least, and of those the one of least squared distance, weighted by layers.
    (``mean`` everywhere is always exact, so there is an answer.)
    """
    if len(lengths) != len(shape) or not lengths or min(lengths) < 1:
        raise ValueError(f"lengths: got {lengths}, must be {len(shape)} positive counts, one for each entry of shape")
    if min(shape) <= 0 or list(shape) != sorted(shape, reverse=True):
        raise ValueError(f"shape: got {shape}, must be positive and not rising")
    if not 1 <= mean <= limit:
        raise ValueError(f"mean: got {mean}, must be between 1 and the limit of {limit} tokens")
    total = mean * sum(lengths)
    quotas = _quotas(lengths, shape, total, limit)
    for radius in range(1, limit + 1):
        windows = [range(max(1, math.ceil(q - radius)), min(limit, math.floor(q + radius)) + 1) for q in quotas[1:]]
        best: tuple[float, tuple[int, ...]] | None = None
        for later in product(*windows):
            first, remainder = divmod(total - sum(l * c for l, c in zip(lengths[1:], later, strict=True)), lengths[0])
            counts = (first, *later)
            if remainder or not 1 <= first <= limit or abs(first - quotas[0]) > radius:
                continue
            if any(a < b for a, b in zip(counts, later, strict=False)):
                continue
            distance = sum(l * (c - q) ** 2 for l, c, q in zip(lengths, counts, quotas, strict=True))
            if best is None or distance < best[0]:
                best = distance, counts
        if best is not None:
            return best[1]
    return (mean,) * len(lengths)


def _quotas(lengths: Sequence[int], shape: Sequence[float], total: int, limit: int) -> list[float]:
    """Real counts ``min(limit, level * shape)`` with the level at which they add up to ``total`` over the layers."""
    for full in range(len(shape)):  # the shape does not rise: the first stages are the ones that are full
        left = total - limit * sum(lengths[:full])
        level = left / sum(l * s for l, s in zip(lengths[full:], shape[full:], strict=True))
        if level * shape[full] <= limit:
            return [float(limit)] * full + [level * s for s in shape[full:]]
    return [float(limit)] * len(shape)


def raster_slots(anchor: Tensor, tokens: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slots sorted by the position at which they stand, the three fields of a reduction.

    ``anchor`` (B, K) int64 distinct positions; ``tokens`` (B, K, D); ``source`` (B, N) int64 slot of each input token,
    -1 where it was dropped. All three are given back for the new order of the slots.
    """
    anchor, order = anchor.sort(dim=1)
    slots = torch.arange(order.shape[1], device=order.device).expand_as(order)
    new = torch.empty_like(order).scatter_(1, order, slots)
    if order.shape[1]:
        source = torch.where(source < 0, -1, new.gather(1, source.clamp_min(0)))
    return anchor, take(tokens, order), source
