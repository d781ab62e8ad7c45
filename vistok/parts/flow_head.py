"""A head that draws each token by itself by a rectified flow; rows do not see one another (MAR, arXiv 2406.11838)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from vistok.core.flow import (
    MING,
    Velocity,
    logit_normal,
    renorm,
    shifted_schedule,
)
from vistok.parts.diffusion_transformer import sinusoids
from vistok.parts.flow_decoder import begin, flow_loss

FREQUENCIES = 256
"""Sines and cosines by which the head is told the time."""


class FlowHead(nn.Module):
    """Rows (R, channels) at times (R,), each with its condition (R, ``cond``), to velocities (R, channels).

    A residual MLP whose blocks are modulated by time and condition; rows do not see one another. ``gated``: SwiGLU of
    two thirds of the width, up to a multiple of 8 (Ming), in place of an MLP of one hidden layer (UniFlow).
    """

    def __init__(
        self, channels: int, cond: int, width: int, depth: int, gated: bool = False, zero_init: bool = True
    ) -> None:
        super().__init__()
        self.embed, self.cond = nn.Linear(channels, width), nn.Linear(cond, width)
        self.time = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(_HeadBlock(width, gated, zero_init) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = begin(nn.Linear(width, 2 * width), zero_init)
        self.out = begin(nn.Linear(width, channels), zero_init)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        dtype = self.embed.weight.dtype
        told = self.time(sinusoids(1e3 * t, FREQUENCIES).to(dtype)) + self.cond(cond.to(dtype))
        h = self.embed(x.to(dtype))
        for block in self.blocks:
            h = block(h, told)
        shift, scale = self.modulation(silu(told)).chunk(2, -1)
        return self.out(self.norm(h) * (1 + scale) + shift)


class _HeadBlock(nn.Module):
    def __init__(self, width: int, gated: bool, zero_init: bool) -> None:
        super().__init__()
        self.gated = gated
        hidden = -(-int(2 / 3 * width) // 8) * 8 if gated else width
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.up, self.down = nn.Linear(width, 2 * hidden if gated else hidden), nn.Linear(hidden, width)
        self.modulation = begin(nn.Linear(width, 3 * width), zero_init)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(silu(told)).chunk(3, -1)
        h = self.up(self.norm(x) * (1 + scale) + shift)
        if self.gated:
            one, two = h.chunk(2, -1)
            h = silu(one) * two
        else:
            h = silu(h)
        return x + gate * self.down(h)


class LatentHead(nn.Module):
    """The next latents (R, ``dim``) of a language model's hidden states (R, ``cond``), each by itself (Ming)."""

    def __init__(self, dim: int, cond: int, width: int, depth: int, zero_init: bool = True) -> None:
        super().__init__()
        self.dim = dim
        self.net = FlowHead(dim, cond, width, depth, gated=True, zero_init=zero_init)

    def velocity(self, x: Tensor, t: Tensor, cond: Tensor) -> Velocity:
        """Towards the data, at times (R,) from 1, noise, to 0."""
        return MING.velocity(self.net(x, t, cond))

    def loss(self, cond: Tensor, target: Tensor) -> Tensor:
        """Mean square error of the velocity at times drawn for each row; ``target`` (R, dim): the latents."""
        t = logit_normal(len(target)).to(target.device)
        return flow_loss(MING, lambda x, t: self.net(x, t, cond), target, t, torch.randn_like(target))

    def sample(
        self,
        cond: Tensor,
        uncond: Tensor | None = None,
        no_text: Tensor | None = None,
        *,
        scale: float = 1.0,
        image_scale: float = 1.0,
        steps: int = 20,
        shift: float = 1.0,
        renormed: bool = False,
        noise: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Latents (R, dim). All conditions are (R, cond) and are asked about the same noise.

        With ``uncond``: u + scale (c - u). With ``no_text`` too, the condition without the text but with the picture to
        be edited: u + image_scale (n - u) + scale (c - n). ``renormed``: no longer than the conditional velocity.
        ``noise`` (R, dim): None draws it; it is multiplied by ``temperature``. ``shift``: see ``shifted_schedule``.
        Raises ValueError for ``no_text`` without ``uncond``.
        """
        if no_text is not None and uncond is None:
            raise ValueError("uncond: got None, must be given with no_text")

        def ask(x: Tensor, t: Tensor) -> Velocity:
            c = self.net(x, t, cond)
            if uncond is None:
                return MING.velocity(c)
            u = self.net(x, t, uncond)
            n = u if no_text is None else self.net(x, t, no_text)
            v = u + image_scale * (n - u) + scale * (c - n)
            return MING.velocity(renorm(v, c) if renormed else v)

        drawn = torch.randn(len(cond), self.dim, device=cond.device) if noise is None else noise
        return MING.sample(ask, temperature * drawn, shifted_schedule(steps, shift))


def published_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of Ming-UniVision's flow head (SimpleMLPAdaLN with SwiGLU) under our names."""
    names = {
        "input_proj.": "embed.",
        "cond_embed.": "cond.",
        "time_embed.mlp.": "time.",
        "res_blocks.": "blocks.",
        "final_layer.linear.": "out.",
        "final_layer.adaLN_modulation.1.": "modulation.",
        ".adaLN_modulation.1.": ".modulation.",
        ".in_ln.": ".norm.",
        ".mlp.w12.": ".up.",
        ".mlp.w3.": ".down.",
    }
    found = {}
    for key, value in state.items():
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        # Theirs has the cosines in front.
        found[key] = value.roll(value.shape[1] // 2, 1) if key == "time.0.weight" else value
    return found
