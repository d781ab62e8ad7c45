"""Layton: a large picture as 256 discrete tokens, drawn from noise in one or two steps of a consistency decoder.

What: a transformer makes tokens of a downscaled view; codes on the sphere (VQ), through a few blocks, tell a diffusion
decoder of the whole picture what to draw. First stage: the decoder learns velocities. Second stage: it becomes a
consistency decoder, x_0 = c_skip(t) x_t + c_out(t) F(x_t, t), so that losses of pixels reach the tokens through its
steps. Source: Latent Consistency Tokenizer, OPPO-Mente-Lab/Layton (no code); abstract and memory, numbers unverified.

Departures: the published decoder is a pretrained latent diffusion model with cross-attention; here it is a transformer
over [noisy patches | tokens] that is trained from scratch, on pixels or on the grid of a frozen tokenizer
(``build(vae)``). Its path is a straight one between data and pure noise, on which c_skip = 1 and c_out = -t of the
velocity are the consistency function, exact at t = 0, and whose end has no signal (so that no brightness leaks). The
adversary of the second stage is the trainer's (``vistok.parts.adversary``, on ``forward``); the text-to-image generator
is any causal model over the ids.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Literal

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.core.flow import FLEXTOK
from vistok.core.losses import Features, perceptual, pixel
from vistok.parts.diffusion_transformer import grid_sinusoids
from vistok.parts.flow_decoder import FlowDecoder, FlowTokenizer, flow_loss
from vistok.parts.quantize import VectorQuantizer
from vistok.parts.tokenizer import Tokenizer

CARD = Card(
    title="Layton: Latent Consistency Tokenizer for 1024-pixel Image Reconstruction and Generation by 256 Tokens",
    kind="trained",
    site="a downscaled view to a grid of discrete tokens, and to the whole picture by a consistency decoder",
    paper="Layton: Latent Consistency Tokenizer",
    repository="OPPO-Mente-Lab/Layton",
    mechanism=("transformation",),
    claim="The second stage, with losses of pixels, lessens the errors of colour that diffusion decoding makes.",
)

SIZES = {"T": (96, 3, 1, 4, 3), "B": (768, 12, 2, 12, 12)}
"""Width, blocks of encoder, condition and decoder, and heads; T is this project's."""


class LaytonNetwork(FlowTokenizer):
    """The tokenizer; ``recipe`` has its hyper-parameters, the ``stage`` among them."""

    flow = FLEXTOK

    def __init__(self, recipe: Layton, vae: Tokenizer | None = None, network: Features | None = None) -> None:
        super().__init__(recipe.image, recipe.patch, recipe.seed, vae)
        self.recipe: Layton = recipe
        side = recipe.view // recipe.view_patch
        self.grid = (side, side)
        width, depth, before, deep, heads = SIZES[recipe.size]
        self.embed = nn.Conv2d(3, width, recipe.view_patch, recipe.view_patch)
        self.blocks = nn.ModuleList(Block(width, heads, 4.0, qkv_bias=True) for _ in range(depth))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, recipe.dim)
        self.bottleneck: VectorQuantizer = VectorQuantizer(
            recipe.codes, recipe.dim, norm="both", restart_after=recipe.restart_after
        )
        self.back = nn.Linear(recipe.dim, width)
        self.tellers = nn.ModuleList(Block(width, heads, 4.0, qkv_bias=True) for _ in range(before))
        self.decoder = FlowDecoder(self.channels, self.patch, width, deep, heads, recipe.zero_init)
        self._network: tuple[Features, ...] = () if network is None else (network,)

    @property
    def tokens(self) -> int:
        assert self.grid is not None
        return self.grid[0] * self.grid[1]

    def begin_second_stage(self) -> None:
        """From velocities to a consistency decoder; the recipe says so from now on."""
        self.recipe = replace(self.recipe, stage=2)

    def latents(self, images: Tensor) -> Tensor:
        view = images
        if self.recipe.view != self.recipe.image:
            view = interpolate(images.float(), (self.recipe.view,) * 2, mode="bicubic", antialias=True).to(images.dtype)
        return self.out(self.norm(self._placed(self.embed(2 * view - 1).flatten(2).transpose(1, 2), self.blocks)))

    def condition(self, z: Tensor) -> Tensor:
        """(B, N, width): what the decoder is told of codes ``z`` (B, N, dim)."""
        return self._placed(self.back(z.to(self.dtype)), self.tellers)

    def consistency_step(self, x: Tensor, t: Tensor, told: Tensor) -> Tensor:
        """The data to which ``x`` (B, C, h, w) at times (B,) goes by its velocity: ``x`` itself at 0."""
        return self.flow.data_of(x, t, self.flow.velocity(self.decoder(x, t, told)))

    def consistent(self, told: Tensor, noise: Tensor, steps: int) -> Tensor:
        """Data in ``steps`` steps from ``noise`` (steps, B, C, h, w), with a gradient: after each, noise anew."""
        x = noise[0]
        for step in range(steps):
            share = 1 - step / steps
            t = x.new_full((len(x),), share)
            x = self.consistency_step(x if step == 0 else self.flow.mix(x, noise[step], t), t, told)
        return x

    def render(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        told, b, steps = self.condition(z), len(z), self.recipe.steps
        if self.recipe.stage == 1:
            return self.draw(lambda x, t, _: self.decoder(x, t, told), b, self.recipe.diffusion_steps)
        noise = torch.stack([self.noise(b, turn) for turn in range(steps)])
        return self.pixels(self.consistent(told, noise, steps))

    def objective(self, images: Tensor) -> Tensor:
        """The velocity's error, and in the second stage that of pixels drawn in 1 or 2 steps; the codebook's losses."""
        codes, data, b = self.encode(images), self.data(images), len(images)
        assert codes.z is not None
        told = self.condition(codes.z)
        t = torch.rand(b).to(data.device)
        loss = flow_loss(self.flow, lambda x, t: self.decoder(x, t, told), data, t, torch.randn_like(data))
        if self.recipe.stage == 2:
            steps = int(torch.randint(1, 3, ()))
            noise = torch.randn(steps, *data.shape, device=data.device, dtype=data.dtype)
            made = self.pixels(self.consistent(told, noise, steps))
            loss = loss + self.recipe.pixel_weight * pixel(made, images)
            for network in self._network:
                loss = loss + self.recipe.perceptual_weight * perceptual(made, images, network)
        return loss + codes.loss

    def _placed(self, x: Tensor, blocks: nn.ModuleList) -> Tensor:
        assert self.grid is not None
        x = x + grid_sinusoids(self.grid, x.shape[2], x.device).to(x.dtype)
        for block in blocks:
            x = block(x)
        return x


@dataclass(frozen=True)
class Layton:
    """A tokenizer by its size."""

    size: Literal["T", "B"] = "B"
    """Width, blocks and heads: see ``SIZES``."""
    image: int = 1024
    """Side of a picture in pixels."""
    view: int = 256
    """Side in pixels of the view that the encoder sees."""
    view_patch: int = 16
    """Side of a token's patch of the view in pixels."""
    patch: int = 32
    """Side of a patch of the decoder in pixels of the picture; with a VAE, a multiple of its cells'."""
    codes: int = 16384
    """Codes of the codebook."""
    dim: int = 16
    """Channels of a code."""
    restart_after: int | None = 100
    """Training steps after which an unused code is put back into use; None: never."""
    stage: Literal[1, 2] = 2
    """1: the decoder learns velocities and decodes by diffusion; 2: it is a consistency decoder."""
    steps: Literal[1, 2] = 1
    """Steps of decoding in the second stage."""
    diffusion_steps: int = 25
    """Euler's steps of decoding in the first stage."""
    pixel_weight: float = 1.0
    """Weight of the squared error of pixels in the second stage."""
    perceptual_weight: float = 1.0
    """Weight of the perceptual loss in the second stage, where ``build`` was given a network for it."""
    zero_init: bool = True
    """Whether the decoder begins with a velocity of zero (adaLN-zero)."""
    seed: int = 0
    """Of the noise that decoding begins with."""

    def build(self, vae: Tokenizer | None = None, network: Features | None = None) -> LaytonNetwork:
        """An untrained tokenizer of pixels, or of the grid of ``vae``; ``network``: that of a perceptual loss, frozen.

        Raises ValueError for hyper-parameters and parts that do not fit.
        """
        if self.size not in SIZES:
            raise ValueError(f"size: got {self.size!r}, must be one of {', '.join(SIZES)}")
        if self.view % self.view_patch:
            raise ValueError(f"view_patch: got {self.view_patch}, must divide view, {self.view}")
        for name, value in (("stage", self.stage), ("steps", self.steps)):
            if value not in (1, 2):
                raise ValueError(f"{name}: got {value}, must be 1 or 2")
        return LaytonNetwork(self, vae, network)


def colour_error(model: Tokenizer, seed: int, count: int = 64, seeds: int = 2) -> float:
    """Mean absolute error of the mean colour, in 0 .. 1, of ``count`` pictures of one colour each, over noises."""
    assert isinstance(model, LaytonNetwork)
    side, rng = model.recipe.image, torch.Generator().manual_seed(seed)
    flat = torch.rand(count, 3, 1, 1, generator=rng).expand(-1, -1, side, side)
    found = []
    with torch.no_grad():
        for model.seed in range(seeds):
            found.append((model.decode(model.encode(flat)) - flat).mean((2, 3)).abs().mean())
    return float(torch.stack(found).mean())


def claim(trial: TokenizeTrial, steps: int = 100) -> Outcome:
    """Mean colour's error on pictures of one colour, after the first stage alone and with the second.

    ``steps`` steps of the first stage, then as many of the first again, or of the second. The first decodes in 10
    steps, the second in 1. Holds if the error is 5% lower after the second stage.
    """
    side = trial.size
    torch.manual_seed(trial.seed)
    recipe = Layton("T", side, side, side // 4, side // 8, 512, 8, 20, 1, 1, 10)
    first = recipe.build()
    trial.fit(first, steps, batch_size=16)
    second = copy.deepcopy(first)
    second.begin_second_stage()
    found, quality = [], []
    for model in (first, second):
        torch.manual_seed(trial.seed)
        trial.fit(model, steps, batch_size=16)
        found.append(colour_error(model, trial.seed))
        quality.append(trial.psnr(model))
    told = f"PSNR {quality[0]:.2f} and {quality[1]:.2f} dB"
    return Outcome("error of the mean colour", found[0], found[1], found[1] <= 0.95 * found[0], told)
