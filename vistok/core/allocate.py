"""How many tokens each region, crop, frame or layer gets.

``split_budget`` is the largest-remainder (Hamilton) apportionment with capacities: what a full group cannot take goes
to the others in proportion to their weights. ``softmax_shares`` turns scores into weights, ``even_sizes`` cuts a
sequence into parts to be given a budget. ``layer_schedule`` gives the share of the tokens that each layer of a model
sees (PyramidDrop, arXiv 2410.17247, falls in geometric stages).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

ROUNDING = 2.0**30
"""Fractional parts are compared in units of 1 / ROUNDING, so that equal ones tie although they were rounded."""


def split_budget(
    weights: Tensor,
    total: int | Tensor,
    capacity: Tensor | None = None,
    leftover: Literal["remainder", "weight"] = "remainder",
) -> Tensor:
    """Split ``total`` tokens over groups in proportion to ``weights``: (B, G) int64.

    ``weights`` (B, G) finite and non-negative; a row of zeros counts as equal weights. ``total``: one count, or (B,)
    int. ``capacity`` (B, G) or (1, G) int: at most so many a group; what is over is shared again among the groups that
    have room, in proportion to their weights, and equally among those of weight 0 once all others are full. Each row
    sums to min(total, its capacity). What rounding down leaves goes one each to the groups with the largest
    fractional part ("remainder") or the largest weight ("weight"), ties to the lower index.
    """
    if weights.dim() != 2 or not weights.shape[1]:
        raise ValueError(f"weights: got shape {tuple(weights.shape)}, must be (B, G) with at least one group")
    weights = weights.double()
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        raise ValueError("weights: must be finite and not negative")
    if leftover not in ("remainder", "weight"):
        raise ValueError(f"leftover: got {leftover!r}, must be 'remainder' or 'weight'")
    want = torch.as_tensor(total, dtype=torch.int64, device=weights.device).expand(len(weights))
    if bool((want < 0).any()):
        raise ValueError(f"total: got {int(want.min())}, must be 0 or more")
    if capacity is None:
        room = want[:, None].expand_as(weights)
    else:
        room = capacity.to(weights.device, torch.int64).expand_as(weights)
        if bool((room < 0).any()):
            raise ValueError(f"capacity: got {int(room.min())}, must be 0 or more")
    want = torch.minimum(want, room.sum(1))

    largest = weights.amax(1, keepdim=True)
    # Only what could overflow is scaled: quotas of whole-numbered weights stay exact, and with them their ties.
    weights = weights / torch.where((largest > 1e100) | ((largest < 1e-100) & (largest > 0)), largest, 1)
    first = _apportion(weights, torch.minimum(want, (room * (weights > 0)).sum(1)), room, leftover)
    # Reached only where every group of positive weight is full (or all weights are zero): equal shares of what is left.
    rest = (weights == 0).double()
    return first + _apportion(rest, want - first.sum(1), torch.where(weights == 0, room, 0), leftover)


def _apportion(weights: Tensor, want: Tensor, room: Tensor, leftover: str) -> Tensor:
    """The split where ``want`` (B,) fits into the groups of positive weight."""
    room = torch.where(weights > 0, room, 0)
    quota = level_quotas(weights, want, room)
    given = torch.minimum(quota.floor().long(), room)
    short = want - given.sum(1)
    while bool((short > 0).any()):
        open_ = given < room
        key = ((quota - given) * ROUNDING).round() if leftover == "remainder" else weights
        order = torch.where(open_, key, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
        )
        extra = open_ & (rank < short[:, None])
        given = given + extra
        short = want - given.sum(1)
    return given


def level_quotas(weights: Tensor, want: Tensor, room: Tensor) -> Tensor:
    """(B, G) float64: ``min(room, level * weights)``, with the level at which a row adds up to ``want``, unrounded.

    ``weights`` (B, G) float64 >= 0, ``want`` (B,) and ``room`` (B, G) int64 >= 0. A group of weight 0 gets nothing, so
    that a row adds up to less where the room of the others is too small.
    """
    full_at = torch.where(weights > 0, room / weights, torch.inf)
    order = full_at.sort(dim=1, stable=True).indices
    w, r = weights.gather(1, order), room.gather(1, order).double()
    taken = r.cumsum(1) - r  # by the groups that are full before this one
    left_weight = w.flip(1).cumsum(1).flip(1)
    left = want[:, None] - taken
    # The first group, in the order in which they fill up, that is not full at the level of those after it.
    open_ = (left * w <= r * left_weight) | (w == 0)
    open_[:, -1] = True
    at = open_.int().argmax(1, keepdim=True)
    left, left_weight = left.gather(1, at).clamp_min(0), left_weight.gather(1, at)
    quota = torch.where(left_weight > 0, left * weights / left_weight, 0)
    return torch.minimum(room.double(), quota)


def softmax_shares(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """(B, G) shares that sum to 1: softmax of ``scores`` (B, G) / ``temperature`` (> 0; large means equal shares)."""
    if temperature <= 0:
        raise ValueError(f"temperature: got {temperature}, must be greater than 0")
    return torch.softmax(scores.double() / temperature, dim=-1)


def even_sizes(n: int, parts: int) -> list[int]:
    """Sizes of ``parts`` contiguous parts of ``n`` tokens, as even as possible, the larger ones first.

    At least one part and at most ``n`` (each then has a token).
    """
    parts = min(max(parts, 1), n)
    return [n // parts + (i < n % parts) for i in range(parts)]


def layer_schedule(
    kind: Literal["constant", "cosine", "pyramid"], num_layers: int, mean: float, fall: float = 0.125, stages: int = 4
) -> tuple[float, ...]:
    """The share of the tokens, in (0, 1], that each of ``num_layers`` layers sees; the shares average to ``mean``.

    "constant"; "cosine": half a cosine from the first layer's share down to ``fall`` times it at the last; "pyramid":
    ``stages`` stretches of (nearly) equal length, each with the same fraction of the one before, the last with ``fall``
    times the first (4 stages and 1/8: each keeps half, as PyramidDrop). Whole counts with an exact sum:
    ``split_budget(torch.tensor([shares]), num_layers * keep, capacity)``.
    """
    if num_layers < 1 or stages < 1:
        raise ValueError(f"num_layers and stages: got {num_layers} and {stages}, must be 1 or more")
    if not 0 < mean <= 1 or not 0 < fall <= 1:
        raise ValueError(f"mean and fall: got {mean} and {fall}, must be in (0, 1]")
    last = max(num_layers - 1, 1)
    if kind == "constant":
        shape = [1.0] * num_layers
    elif kind == "cosine":
        shape = [fall + (1 - fall) * (1 + math.cos(math.pi * i / last)) / 2 for i in range(num_layers)]
    elif kind == "pyramid":
        shape = [fall ** (i * stages // num_layers / max(stages - 1, 1)) for i in range(num_layers)]
    else:
        raise ValueError(f"kind: got {kind!r}, must be 'constant', 'cosine' or 'pyramid'")
    scale = mean * num_layers / sum(shape)
    if scale * shape[0] > 1 + 1e-9:
        raise ValueError(
            f"mean: got {mean}, a {kind} schedule falling to {fall} of its start reaches at most "
            f"{mean / (scale * shape[0]):.4f} when its first layer sees all tokens"
        )
    return tuple(min(scale * s, 1.0) for s in shape)
