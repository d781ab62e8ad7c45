"""Self-attention of a diffusion transformer whose mixing can be exchanged while it runs, and the loss to train one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vistok.catalogue.card import AttendTrial
from vistok.core.attention import Dense, attend
from vistok.core.flow import FLEXTOK, RectifiedFlow
from vistok.parts.diffusion_transformer import DiffusionTransformer, SelfAttention

Mix = Callable[[Tensor, Tensor, Tensor, tuple[int, int]], Tensor]
"""``q``, ``k``, ``v`` (B, heads, N, d) of a grid (h, w) to (B, heads, N, d)."""


def dense(q: Tensor, k: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
    """Attention to all tokens."""
    return attend(q, k, v, Dense(q.shape[2], k.shape[2]))


class MixedAttention(SelfAttention):
    """As ``plain_attention``, its parameters too, but what mixes is ``mix``, which may be set at any time."""

    def __init__(self, width: int, heads: int, mix: Mix = dense) -> None:
        super().__init__(width, heads, qkv_bias=True)
        self.mix = mix

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B, h * w, width) to the same; ``size`` (h, w), by default one row."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = self.mix(q, k, v, (1, x.shape[1]) if size is None else size)
        return self.proj(mixed.transpose(1, 2).flatten(2))


@contextmanager
def mixing(net: nn.Module, mixes: Sequence[Mix]) -> Iterator[None]:
    """Inside, the ``MixedAttention`` of ``net``, in order, mix by ``mixes``, one each; then as before."""
    found = [module for module in net.modules() if isinstance(module, MixedAttention)]
    if len(found) != len(mixes):
        raise ValueError(f"mixes: got {len(mixes)}, must be one for each of {len(found)} attentions")
    before = [module.mix for module in found]
    try:
        for module, mix in zip(found, mixes, strict=True):
            module.mix = mix
        yield
    finally:
        for module, mix in zip(found, before, strict=True):
            module.mix = mix


def projections(net: nn.Module, x: Tensor, t: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """``q``, ``k``, ``v`` (B, heads, N, d) of each attention of ``net`` on ``x`` at ``t``, in order; dense."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def record(q: Tensor, k: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
        found.append((q, k, v))
        return dense(q, k, v, size)

    count = sum(isinstance(module, MixedAttention) for module in net.modules())
    with torch.no_grad(), mixing(net, [record] * count):
        net(x, t)
    return found


def velocity_error(net: nn.Module, x: Tensor, t: Tensor, mixes: Sequence[Mix]) -> float:
    """Length of the change of ``net(x, t)`` that ``mixes`` make, relative to its length with dense attention."""
    outs = []
    for each in ([dense] * len(mixes), mixes):
        with torch.no_grad(), mixing(net, each):
            outs.append(net(x, t))
    return ((outs[1] - outs[0]).norm() / outs[0].norm()).item()


def velocity_loss(net: nn.Module, data: Tensor, rng: torch.Generator, flow: RectifiedFlow = FLEXTOK) -> Tensor:
    """Mean square of the velocity's error on ``data`` (B, C, H, W), at times and with noise that ``rng`` draws."""
    t, noise = torch.rand(len(data), generator=rng), torch.randn(data.shape, generator=rng)
    t, noise = t.to(data.device), noise.to(data)
    return flow.loss(flow.velocity(net(flow.mix(data, noise, t), t)), flow.target(data, noise))


def digit_pictures(trial: AttendTrial, rng: torch.Generator, count: int, side: int) -> Tensor:
    """(count, 1, side, side) in -1 .. 1: digits of 8 x 8, made larger."""
    pictures, _ = trial.draw(rng, count)
    return interpolate(pictures, (side, side), mode="bilinear", align_corners=False)


def learn_digits(trial: AttendTrial, steps: int, side: int, width: int, depth: int = 2) -> DiffusionTransformer:
    """A small network with dense attention, 4 heads and a token a pixel, that learns their velocities."""
    torch.manual_seed(trial.seed)
    net = DiffusionTransformer(1, 1, width, depth, 4, MixedAttention)
    trial.fit(net, steps, loss=lambda of, rng: velocity_loss(of, digit_pictures(trial, rng, 4, side), rng))
    return net
