"""RaftMLP: MLPs along columns and along rows, in which a few related channels are mixed together with the axis.

What: MLP-Mixer mixes all tokens by one MLP of N x N, blind to where they are. Here columns and rows have an MLP each,
shared by all columns, or rows, and groups of channels. A raft is ``raft`` channels that lie C / raft apart: they go
through the MLP together, as one vector of raft times the axis. A channel MLP follows. Maps are made smaller by patches
of several sizes at once, one linear layer of all their pixels. Source: Tatsunami and Taki, arXiv 2108.04384,
okojoalg/raft-mlp. Where: a backbone of four stages, with no attention.

An MLP along an axis has the length of the training's map: other maps are resized to that by bicubic interpolation
before the columns are mixed, and back after the rows; a picture that patches do not divide is resized too. As released
the norm's weights are in the order of a group's channels, not of the map's. Left out: the heads that join several
stages, which the published configurations switch off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.layers import DropPath
from timm.models.mlp_mixer import MixerBlock
from torch import Tensor, nn
from torch.nn.functional import interpolate, unfold

from vistok.catalogue.card import AttendTrial, Card, Outcome
from vistok.parts.pyramid import MapNorm, Pyramid, drop_rates
from vistok.parts.token_stage import TokenStage

CARD = Card(
    title="RaftMLP: How Much Can Be Done Without Attention and with Less Spatial Locality?",
    kind="trained",
    site="a backbone: in place of attention",
    paper="Tatsunami and Taki, 2021, arXiv 2108.04384",
    repository="okojoalg/raft-mlp",
    mechanism=("transformation",),
    score="learned, by place along an axis and channel of a raft",
    select="all tokens of a column, then of a row",
    claim="Mixing rows and columns apart takes fewer parameters than MLP-Mixer's tokens, and is no less accurate.",
)


def mlp(width: int, expansion: int) -> nn.Sequential:
    """Of vectors (..., width)."""
    return nn.Sequential(nn.Linear(width, expansion * width), nn.GELU(), nn.Linear(expansion * width, width))


class RaftBlock(nn.Module):
    """(B, h, w, dim) to the same: an MLP along an axis of ``length``, 1 (columns) or 2 (rows), added."""

    def __init__(
        self, dim: int, length: int, axis: int, raft: int = 2, expansion: int = 2, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        if dim % raft:
            raise ValueError(f"raft: got {raft}, must divide dim, {dim}")
        if axis not in (1, 2):
            raise ValueError(f"axis: got {axis}, must be 1 or 2")
        self.length, self.axis, self.raft = length, axis, raft
        self.norm = nn.LayerNorm(dim)
        self.mlp = mlp(raft * length, expansion)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[self.axis] != self.length:
            raise ValueError(f"x: got {x.shape[self.axis]} tokens along axis {self.axis}, must be {self.length}")
        rafts = self.norm(x.unflatten(3, (self.raft, -1)).transpose(3, 4).flatten(3)).unflatten(3, (-1, self.raft))
        last = rafts.movedim(self.axis, 4)  # (B, the other axis, groups, raft, axis)
        mixed = self.mlp(last.flatten(3)).unflatten(3, last.shape[3:]).movedim(4, self.axis)
        return x + self.drop_path(mixed.transpose(3, 4).flatten(3))


class RaftTokenMixer(nn.Module):
    """(B, H, W, dim) to the same: columns, then rows, on a map of ``h`` x ``w``, to which others are resized."""

    def __init__(self, dim: int, h: int, w: int, raft: int = 2, expansion: int = 2, drop_path: float = 0.0) -> None:
        super().__init__()
        self.size = h, w
        self.vertical = RaftBlock(dim, h, 1, raft, expansion, drop_path)
        self.horizontal = RaftBlock(dim, w, 2, raft, expansion, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1], x.shape[2]
        return _resized(self.horizontal(self.vertical(_resized(x, self.size))), size)


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, *size, C) of a map with its channels last."""
    if x.shape[1:3] == size:
        return x
    return interpolate(x.permute(0, 3, 1, 2), size, mode="bicubic").permute(0, 2, 3, 1)


class Block(nn.Module):
    """Token mixer, then an MLP of ``channel_expansion`` times the width; tokens (B, H * W, dim) to the same."""

    def __init__(self, dim: int, mixer: nn.Module, channel_expansion: int = 4, drop_path: float = 0.0) -> None:
        super().__init__()
        self.mixer, self.norm, self.mlp = mixer, nn.LayerNorm(dim), mlp(dim, channel_expansion)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = self.mixer(x.unflatten(1, size)).flatten(1, 2)
        return x + self.drop_path(self.mlp(self.norm(x)))


class MultiScalePatchEmbed(nn.Module):
    """(B, C, H, W) to (B, dim, H / s, W / s): patches of every side in ``kernels`` around places s = min apart."""

    def __init__(self, inputs: int, dim: int, kernels: Sequence[int]) -> None:
        super().__init__()
        self.kernels, self.stride = tuple(kernels), min(kernels)
        if any((k - self.stride) % 2 for k in kernels):
            raise ValueError(f"kernels: got {self.kernels}, must differ by even numbers")
        self.fc = nn.Linear(inputs * sum(k**2 for k in kernels), dim)

    def forward(self, x: Tensor) -> Tensor:
        size = -(-x.shape[2] // self.stride), -(-x.shape[3] // self.stride)
        full = size[0] * self.stride, size[1] * self.stride
        if x.shape[2:] != full:
            x = interpolate(x, full, mode="bicubic")
        patches = [unfold(x, k, padding=(k - self.stride) // 2, stride=self.stride) for k in self.kernels]
        return self.fc(torch.cat(patches, 1).transpose(1, 2)).transpose(1, 2).unflatten(2, size)


SIZES = {"small": (64, 128, 256, 512), "medium": (96, 192, 384, 768), "large": (128, 192, 512, 1024)}
"""Channels of each stage."""


@dataclass(frozen=True)
class RaftMLP:
    """The backbone, of four stages."""

    size: str = "small"
    """small, medium or large."""
    image: int = 224
    """Side of the pictures of training."""
    kernels: tuple[tuple[int, ...], ...] = ((4, 8), (2, 4), (2, 4), (2,))
    """Sides of the patches of each stage; the least is how much smaller the map becomes."""
    depths: tuple[int, ...] = (2, 2, 6, 2)
    """Blocks of each stage."""
    raft: int = 2
    """Channels that are mixed together."""
    token_expansion: int = 2
    """Width of the MLPs along axes, over raft times the axis."""
    channel_expansion: int = 4
    """Width of the MLPs of channels, over the channels."""
    drop_path: float = 0.1
    """Rate of stochastic depth of the last block."""

    def build(self, num_classes: int = 1000, features_only: bool = False) -> Pyramid:
        """An untrained network; with ``features_only`` it gives the maps of its stages."""
        if self.size not in SIZES:
            raise ValueError(f"size: got {self.size!r}, must be {', '.join(SIZES)}")
        return self.of(SIZES[self.size], num_classes, features_only)

    def of(self, dims: Sequence[int], num_classes: int = 1000, features_only: bool = False) -> Pyramid:
        """As ``build``, of any channels of each stage."""
        if not len(dims) == len(self.kernels) == len(self.depths):
            got = len(self.kernels), len(self.depths)
            raise ValueError(f"dims: got {len(dims)} for {got} kernels and depths, must be one a stage")
        stages, reductions, side = [], [1], self.image
        for i, (dim, rates) in enumerate(zip(dims, drop_rates(self.drop_path, self.depths), strict=True)):
            embed = MultiScalePatchEmbed(dims[i - 1] if i else 3, dim, self.kernels[i])
            side = -(-side // embed.stride)
            mixers = [RaftTokenMixer(dim, side, side, self.raft, self.token_expansion, rate) for rate in rates]
            blocks = [
                Block(dim, mixer, self.channel_expansion, rate) for mixer, rate in zip(mixers, rates, strict=True)
            ]
            stages.append(TokenStage(embed, blocks))
            reductions.append(reductions[-1] * embed.stride)
        return Pyramid(stages, dims, reductions[1:], MapNorm(dims[-1]), num_classes, features_only)


def claim(trial: AttendTrial, steps: int = 150) -> Outcome:
    """Sections 1 and 4: less than MLP-Mixer's cost, for no less. Untrained networks of two blocks, 8 x 8 tokens.

    Holds if there are fewer parameters, and accuracy on digits is at most a point lower.
    """
    found, parameters = [], []
    for rafts in (False, True):
        torch.manual_seed(trial.seed)
        model = small(rafts)
        trial.fit(model, steps)
        found.append(trial.accuracy(model))
        parameters.append(sum(p.numel() for p in model.parameters()))
    mixer, ours = found
    note = f"{parameters[1]} parameters, {parameters[0]} of the mixer; {steps} steps each"
    holds = ours >= mixer - 0.01 and parameters[1] < parameters[0]
    return Outcome("accuracy on digits, against MLP-Mixer", mixer, ours, holds, note)


def small(rafts: bool) -> Pyramid:
    """What the claim trains: a token a pixel, two blocks of rafts, or of MLP-Mixer with as wide an expansion."""
    blocks: list[nn.Module] = [Block(32, RaftTokenMixer(32, 8, 8)) if rafts else _Mixer() for _ in range(2)]
    return Pyramid([TokenStage(nn.Conv2d(1, 32, 1), blocks)], [32], [1], MapNorm(32), 10)


class _Mixer(MixerBlock):
    """Two times 64 tokens, and four times 32 channels."""

    def __init__(self) -> None:
        super().__init__(32, 64, mlp_ratio=(4.0, 4.0))

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return super().forward(x)
