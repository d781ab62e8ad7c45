"""Rectified flow: straight paths between noise and data, in a type that carries its conventions.

Published systems write the same model in four ways: noise at time 1 or at time 0, and a velocity that points to the
noise or to the data. A network trained in one and sampled in another gives noise, without an error. So the convention
is a value: ``RectifiedFlow`` makes the path, the target and the sampling steps all from it, and ``Velocity`` is what a
network's output is wrapped in; a flow takes nothing else, and of its own convention only.

    flextok   noise at 1, velocity to noise      FLEXTOK
    ming      noise at 1, velocity to data       MING
    uniflow, comit   noise at 0, velocity to data     NOISE_FIRST
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor

End = Literal["noise", "data"]


@dataclass(frozen=True)
class Velocity:
    """A network's output together with the convention in which it is meant."""

    value: Tensor
    flow: RectifiedFlow


class Model(Protocol):
    """``x`` (B, ...) and times (B,) in the flow's own direction to a velocity of the shape of ``x``."""

    def __call__(self, x: Tensor, t: Tensor) -> Velocity: ...


@dataclass(frozen=True)
class RectifiedFlow:
    """The straight path between noise and data (Liu et al., arXiv 2209.03003) and how its time and velocity are told.

    Two flows are equal, and take each other's velocities, only if both fields are equal.
    """

    noise_at: Literal[0, 1]
    """The time at which a sample is pure noise; it is data at the other."""
    points_to: End
    """Where the velocity that the network gives points: to "noise" it is noise - data, to "data" data - noise."""

    def __post_init__(self) -> None:
        if self.noise_at not in (0, 1):
            raise ValueError(f"noise_at: got {self.noise_at!r}, must be 0 or 1")
        if self.points_to not in ("noise", "data"):
            raise ValueError(f"points_to: got {self.points_to!r}, must be 'noise' or 'data'")

    # The path -------------------------------------------------------------------------------------------------------

    def share(self, t: Tensor) -> Tensor:
        """The share of noise at times ``t`` in [0, 1]."""
        return t if self.noise_at == 1 else 1 - t

    def mix(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The point of the path at ``t`` (B,): share of noise times ``noise`` and the rest ``data``, (B, ...) both."""
        s = over(self.share(t), data)
        return s * noise + (1 - s) * data

    def target(self, data: Tensor, noise: Tensor) -> Velocity:
        """What the network is to give everywhere on the path."""
        return self.velocity(noise - data if self.points_to == "noise" else data - noise)

    def velocity(self, value: Tensor) -> Velocity:
        """What a network that was trained in this convention gives."""
        return Velocity(value, self)

    def loss(self, predicted: Velocity, target: Velocity) -> Tensor:
        """Mean square of the difference of two velocities of this convention; ValueError for another's."""
        return (self.value_of(predicted) - self.value_of(target)).square().mean()

    def data_of(self, x: Tensor, t: Tensor, velocity: Velocity) -> Tensor:
        """The data to which ``x`` at ``t`` goes if it follows ``velocity`` straight on."""
        return x - over(self.share(t), x) * self._to_noise(velocity)

    def noise_of(self, x: Tensor, t: Tensor, velocity: Velocity) -> Tensor:
        """The noise from which ``x`` at ``t`` comes if its path is straight."""
        return x + over(1 - self.share(t), x) * self._to_noise(velocity)

    # Sampling -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        model: Model,
        noise: Tensor,
        steps: int | Sequence[float] = 20,
        method: Literal["euler", "heun"] = "euler",
    ) -> Tensor:
        """From ``noise`` (B, ...) along the model's velocity to data of the same shape.

        ``steps``: a number of equal ones, or the shares of noise at which they begin and end, falling from 1 to 0
        (``power_schedule``, ``shifted_schedule``). "heun" asks the model twice a step (once in the last) and is of
        second order. ``model`` is given times (B,) in the flow's own direction.
        """
        shares = power_schedule(max(steps, 0)) if isinstance(steps, int) else list(steps)
        falls = all(a > b for a, b in pairwise(shares))
        if len(shares) < 2 or not falls or shares[0] != 1 or shares[-1] != 0:
            raise ValueError(f"steps: got {steps}, must be 1 or more, or shares of noise that fall from 1 to 0")
        if method not in ("euler", "heun"):
            raise ValueError(f"method: got {method!r}, must be 'euler' or 'heun'")

        def ask(x: Tensor, s: float) -> Tensor:
            t = x.new_full((len(x),), s if self.noise_at == 1 else 1 - s)
            return self._to_noise(model(x, t))

        x = noise
        for s, after in pairwise(shares):
            v = ask(x, s)
            step = after - s
            if method == "heun" and after > 0:
                v = (v + ask(x + step * v, after)) / 2
            x = x + step * v
        return x

    def value_of(self, velocity: Velocity) -> Tensor:
        """The numbers of a velocity of this convention. TypeError for bare numbers, ValueError for another's."""
        if not isinstance(velocity, Velocity):
            raise TypeError(
                f"velocity: got a {type(velocity).__name__}, must be a Velocity, which tells its convention: "
                "flow.velocity(...) with the flow that the network was trained in"
            )
        if velocity.flow != self:
            raise ValueError(f"velocity: got one of {velocity.flow}, must be of {self}; flow.of(...) converts it")
        return velocity.value

    def of(self, velocity: Velocity) -> Velocity:
        """The same velocity in this convention. Times differ too where ``noise_at`` does."""
        other = velocity.flow
        return Velocity(velocity.value if other.points_to == self.points_to else -velocity.value, self)

    def _to_noise(self, velocity: Velocity) -> Tensor:
        """d x / d (share of noise)."""
        value = self.value_of(velocity)
        return value if self.points_to == "noise" else -value


FLEXTOK = RectifiedFlow(noise_at=1, points_to="noise")
MING = RectifiedFlow(noise_at=1, points_to="data")
NOISE_FIRST = RectifiedFlow(noise_at=0, points_to="data")
"""UniFlow's and COMiT's."""


def over(t: Tensor, x: Tensor) -> Tensor:
    """``t`` (B,) in a shape that goes with ``x`` (B, ...)."""
    return t.view(-1, *(1,) * (x.dim() - 1))


# Times -----------------------------------------------------------------------------------------------------------


def logit_normal(n: int, generator: torch.Generator | None = None, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """(n,) times in (0, 1): the sigmoid of a normal variable (SD3, FlexTok)."""
    return (mean + std * torch.randn(n, generator=generator)).sigmoid()


def power_schedule(steps: int, power: float = 1.0) -> list[float]:
    """Shares of noise (i / steps)^(1 / power) for i = steps .. 0 (UniFlow's pow_p)."""
    return [(i / max(steps, 1)) ** (1 / power) for i in range(steps, -1, -1)]


def shifted_schedule(steps: int, shift: float = 1.0) -> list[float]:
    """Shares of noise 1 - u / (u + f - f u) for u from 0 to 1: with a shift f above 1 more steps near noise (Ming)."""
    return [1 - u / (u + shift - shift * u) for u in (i / steps for i in range(steps + 1))]


# Guidance --------------------------------------------------------------------------------------------------------


def cfg(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: uncond + scale (cond - uncond); 1 is no guidance."""
    return uncond + scale * (cond - uncond)


def renorm(v: Tensor, cond: Tensor, dim: int = -1) -> Tensor:
    """``v`` no longer than ``cond`` along ``dim`` (Ming's cfg_renorm); 0 stays 0."""
    size, most = v.norm(dim=dim, keepdim=True), cond.norm(dim=dim, keepdim=True)
    kept: Tensor = v * (most / size.clamp_min(torch.finfo(v.dtype).tiny)).clamp_max(1)
    return kept


def apg(
    cond: Tensor, uncond: Tensor, scale: float, average: Tensor | None, momentum: float, eta: float, clip: float
) -> tuple[Tensor, Tensor]:
    """Adaptive projected guidance (Sadat et al., arXiv 2410.02416): the guided prediction, and the ``average`` to give
    to the next step (None to the first). ``vistok.parts.guidance.APG`` keeps it over a run.

    The difference of the predictions (B, ...) gathers ``momentum``, is clipped to length ``clip`` (0: not), and its
    part along the conditional prediction counts ``eta`` times only. Lengths are over all axes but the first. With
    ``eta`` 1 and neither momentum nor clip it is ``cfg``.
    """
    difference = cond - uncond if average is None else cond - uncond + momentum * average
    average = difference
    axes = tuple(range(1, cond.dim()))
    if clip > 0:
        size = difference.norm(p=2, dim=axes, keepdim=True)
        difference = difference * (clip / size.clamp_min(torch.finfo(size.dtype).tiny)).clamp_max(1)
    along = cond.double()
    along = along / along.norm(p=2, dim=axes, keepdim=True).clamp_min(1e-12)
    parallel = ((difference.double() * along).sum(axes, keepdim=True) * along).to(cond.dtype)
    return cond + (scale - 1) * (difference - parallel + eta * parallel), average


Guidance = Callable[[Tensor, Tensor], Tensor]
"""(conditional, unconditional) to guided: ``cfg`` with its scale, or ``vistok.parts.guidance.APG``."""


def guided(model: Callable[[Tensor, Tensor, bool], Velocity], guidance: Guidance, flow: RectifiedFlow) -> Model:
    """A model for ``flow.sample`` out of one that is asked with (x, t, conditional: bool).

    Both answers are on the same ``x`` and of ``flow``. Guidance gives the same picture in every convention: it turns
    round with the velocity.
    """

    def ask(x: Tensor, t: Tensor) -> Velocity:
        cond, uncond = flow.value_of(model(x, t, True)), flow.value_of(model(x, t, False))
        return flow.velocity(guidance(cond, uncond))

    return ask
