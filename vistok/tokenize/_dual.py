"""What tokenizers with a semantic and a pixel side share: layers of a vision transformer, heads, and their claim."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from vistok.catalogue.card import Outcome, TokenizeTrial
from vistok.core.losses import distillation, pixel
from vistok.parts.conv import ConvEncoder
from vistok.parts.flow_decoder import resized
from vistok.parts.quantize import Bottleneck
from vistok.parts.tokenizer import Tokenizer
from vistok.parts.vision import FrozenVision


def hidden(vision: FrozenVision, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """Patch features (B, N, D) behind each of ``layers`` (1, 2, ... from the first), without the last norm.

    Layers behind the last that is asked for are not run. ``images`` (B, 3, H, W) in [0, 1].
    """
    depth = len(vision.model.blocks)
    if not layers or min(layers) < 1 or max(layers) > depth:
        raise ValueError(f"layers: got {tuple(layers)}, must be between 1 and the {depth} blocks of the vision model")
    x = images.float()
    if x.shape[2:] != vision.size:
        x = interpolate(x, vision.size, mode="bicubic", antialias=True)
    x = ((x - vision.mean) / vision.std).to(next(vision.model.parameters()).dtype)
    found = vision.model.forward_intermediates(
        x, [n - 1 for n in layers], stop_early=True, output_fmt="NLC", intermediates_only=True
    )
    by_layer = dict(zip(sorted(set(layers)), found, strict=True))
    return [by_layer[n] for n in layers]


def tuned(vision: FrozenVision, layers: int | None = None) -> FrozenVision:
    """A copy of ``vision`` of which the first ``layers`` blocks and what is before them learn; None: all of it."""
    made = copy.deepcopy(vision)
    if layers is None:
        made.model.requires_grad_(True)
        return made
    for name, p in made.model.named_parameters():
        place = name.split(".")
        last = place[0] in ("norm", "fc_norm", "attn_pool", "head")
        behind = int(place[1]) >= layers if place[0] == "blocks" else last
        p.requires_grad_(not behind)
    return made


class Transformer(nn.Module):
    """Tokens (B, N, ``dim``) to (B, N, ``out``): ``depth`` plain blocks of ``width``, with learned places."""

    def __init__(self, dim: int, width: int, out: int, tokens: int, depth: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads: got {heads}, must divide width, {width}")
        norm = partial(nn.LayerNorm, eps=1e-5)
        self.embed = nn.Linear(dim, width)
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.blocks = nn.Sequential(*(Block(width, heads, 4.0, qkv_bias=True, norm_layer=norm) for _ in range(depth)))
        self.norm, self.out = norm(width), nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.blocks(self.embed(x) + self.positions)))


def bent(dim: int, out: int) -> nn.Sequential:
    """Linear, tanh, linear."""
    return nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, out))


def laid(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (B, N, D) as a map (B, D, h, w)."""
    return x.transpose(1, 2).unflatten(2, grid).contiguous()  # convolutions round by the layout in memory


def rows(x: Tensor) -> Tensor:
    """A map (B, D, h, w) as tokens (B, h w, D)."""
    return x.flatten(2).transpose(1, 2)


def compared(trial: TokenizeTrial, one: Callable[[], Tokenizer], two: Callable[[], Tokenizer], steps: int) -> Outcome:
    """Objects that a linear read-out of semantic codes names right: of ``one`` codebook that does both, and of ``two``.

    Both learn their objective for as many steps on the same pictures. Read are the vectors that a tokenizer's
    ``semantic(z)`` gives, (B, h * h, C), averaged to 4 x 4 places. Holds if two are better by 5 points and lose 0.5 dB
    of PSNR at most.
    """
    shares, fidelities, bits = [], [], []
    for build in (one, two):
        torch.manual_seed(trial.seed)
        model = build()
        trial.fit(model, steps, batch_size=16)

        def features(images: Tensor, model: Tokenizer = model) -> Tensor:
            z = model.encode(images).z
            assert z is not None
            seen = model.semantic(z)  # type: ignore[operator]
            side = round(seen.shape[1] ** 0.5)
            return adaptive_avg_pool2d(laid(seen, (side, side)), 4).flatten(1)

        shares.append(trial.probe(features))
        fidelities.append(trial.psnr(model))
        bits.append(int(model.encode(next(iter(trial.held_out()))[0][:1]).bits))
    told = f"PSNR {fidelities[0]:.2f} and {fidelities[1]:.2f} dB, {bits[0]} and {bits[1]} bits a picture"
    holds = shares[1] >= shares[0] + 0.05 and fidelities[1] >= fidelities[0] - 0.5
    return Outcome("objects read out of semantic codes", shares[0], shares[1], holds, told)


class OneCodebook(Tokenizer):
    """What two are held against: one codebook on a convolutional map, from which pixels and features are both read.

    ``encoder`` and ``decoder`` are networks on maps, ``reader`` gives features (B, N, C) of codes (B, N, D), and
    ``target`` those that it learns, (B, M, C) on a square grid, of pictures.
    """

    def __init__(
        self,
        image: int,
        encoder: ConvEncoder,
        bottleneck: Bottleneck,
        decoder: nn.Module,
        reader: nn.Module,
        target: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        side = image // encoder.factor
        self.image, self.grid = image, (side, side)
        self.encoder, self.bottleneck, self.decoder, self.reader = encoder, bottleneck, decoder, reader
        self._target = (target,)  # in a tuple: a network in it is not this one's

    @property
    def tokens(self) -> int:
        assert self.grid is not None
        return self.grid[0] * self.grid[1]

    def latents(self, images: Tensor) -> Tensor:
        return rows(self.encoder(2 * images - 1))

    def render(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        assert self.grid is not None
        return (self.decoder(laid(z, self.grid)) + 1) / 2

    def semantic(self, z: Tensor) -> Tensor:
        """All of the codes."""
        return z

    def objective(self, images: Tensor) -> Tensor:
        """Squared error of pixels, 1 - cosine of features, and the bottleneck's losses."""
        made, codes = self(images)
        assert codes.z is not None and self.grid is not None
        with torch.no_grad():
            wanted = self._target[0](images)
        side = round(wanted.shape[1] ** 0.5)
        found = resized(self.reader(codes.z), self.grid, (side, side))
        return pixel(made, images) + distillation(found, wanted) + codes.loss
