"""Masked token models (MaskGIT, Chang et al., arXiv 2202.04200; TiTok's generator): masks to train on, and sampling.

Tokens are drawn for all masked places at once; the surest stay, and the rest are masked again, fewer at each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

Logits = Callable[[Tensor, bool], Tensor]
"""Ids (B, N), masked ones too, and whether with the condition, to logits (B, N, K)."""
Uniform = Callable[[tuple[int, ...]], Tensor]
"""A shape to draws in (0, 1)."""


def training_mask(ratio: Tensor, order: Tensor) -> Tensor:
    """(B, N) bool, True at masked places: round(N arccos(u) 2 / pi) of them, at least one, of ``ratio`` u (B,).

    ``order`` (B, N): draws whose ranking is where the mask falls.
    """
    n = order.shape[1]
    count = (n * ratio.arccos() / (math.pi / 2)).round().clamp_min(1)
    return order.argsort(dim=1) < count[:, None]


def masked_left(step: int, steps: int, n: int) -> int:
    """How many of ``n`` tokens the schedule leaves masked after step 0 .. steps - 1: floor(n arccos(r) 2 / pi)."""
    return math.floor(n * math.acos((step + 1) / steps) / (math.pi / 2))


def guidance_at(
    step: int, steps: int, scale: float, decay: Literal["constant", "linear", "power-cosine"], power: float = 3.0
) -> float:
    """s of cond + s (cond - uncond) at a step.

    "linear" has none in the first step, then the share of steps that are done; "power-cosine" goes up to scale - 1 from
    0 (its s of uncond + s (cond - uncond), less one).
    """
    if decay == "constant":
        return scale
    if decay == "linear":
        return scale * step / steps
    if decay == "power-cosine":
        return (scale - 1) * (1 - math.cos((step / steps) ** power * math.pi)) / 2
    raise ValueError(f"decay: got {decay!r}, must be 'constant', 'linear' or 'power-cosine'")


@torch.no_grad()
def sampling_steps(
    model: Logits,
    ids: Tensor,
    mask_id: int,
    steps: int = 8,
    *,
    temperature: float = 9.5,
    scale: float = 4.5,
    decay: Literal["constant", "linear", "power-cosine"] = "linear",
    power: float = 3.0,
    anneal_softmax: bool = False,
    uniform: Uniform | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """The ids (B, N) after each step; the last are the sample. ``ids``: all ``mask_id``, or some known, which stay.

    A token is drawn by its logit plus Gumbel noise, and is as sure as its logit plus fresh noise; both noises fade as
    ``temperature`` (1 - share of steps done). ``anneal_softmax`` divides logits by 0.5 + 0.8 (1 - share). Defaults are
    TiTok-L-32's. After a step as many stay masked as ``masked_left`` says, of each picture at least one before the last
    step and fewer than before; the authors count in the first picture for all. A place that was kept is never masked
    again. The noise is drawn by ``uniform``, or by ``generator`` on the device of ``ids``.
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}, must be 1 or more")
    draw: Uniform = uniform or (lambda shape: torch.rand(shape, generator=generator, device=ids.device))
    n = ids.shape[1]
    for step in range(steps):
        share = (step + 1) / steps
        hidden = ids == mask_id
        logits = model(ids, True)
        if strength := guidance_at(step, steps, scale, decay, power):
            logits = logits + strength * (logits - model(ids, False))
        if anneal_softmax:
            logits = logits / (0.5 + 0.8 * (1 - share))
        noise = temperature * (1 - share)
        drawn = (logits + noise * gumbel(draw(tuple(logits.shape)))).argmax(-1)
        sure = logits.gather(-1, drawn[..., None])[..., 0].masked_fill(~hidden, torch.inf)
        ids = torch.where(hidden, drawn, ids)
        if step < steps - 1:
            sure = sure + noise * gumbel(draw(tuple(ids.shape)))
            count = torch.minimum(hidden.sum(1) - 1, torch.full_like(ids[:, 0], masked_left(step, steps, n)))
            # At least one, unless all was known: what was kept is sure beyond all and must not be masked.
            count = torch.minimum(count.clamp_min(1), hidden.sum(1))
            rank = sure.argsort(dim=1, stable=True).argsort(dim=1)
            ids = torch.where(rank < count[:, None], mask_id, ids)
        yield ids


def gumbel(u: Tensor) -> Tensor:
    """Gumbel noise of draws in (0, 1): -log(-log u), both logarithms of 1e-20 at least."""
    return -(-u.clamp_min(1e-20).log()).clamp_min(1e-20).log()
