"""DaViT: attention within windows, and in turn attention among channels, whose tokens are the whole picture.

What: attention within windows is linear in the tokens but sees nothing beyond them. A second kind of block takes
channels for tokens: in a group of d channels each is a vector as long as the picture, and the (d, d) map that mixes
them is made from all places. So global mixing costs as much as the tokens are many. Before attention and before the MLP
a 3x3 depthwise convolution is added, as position. Source: Ding et al., arXiv 2204.03645, dingmyu/davit; parameters of a
block bear the authors' names. Where: a backbone of four stages, whose depths count pairs of the two blocks.

In the released code the three thirds of ``qkv`` are, for channels, value, query and key. Its logits are sums over all
places but scaled by d ** -0.5, so that they grow with the picture; ``scale="tokens"``, N ** -0.5, is that of timm's
second version (Florence-2), whose thirds are in the usual order. Windows at the border are filled with zeros after the
norm, which are attended to, as vectors of the biases; ``mask_padding`` hides them. Products over the places are made
in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from timm.layers import DropPath, Mlp
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn.functional import pad

from vistok.catalogue.card import AttendTrial, Card, Outcome
from vistok.core.attention import Window, attend
from vistok.core.tensors import upcast
from vistok.parts.pyramid import MapNorm, Pyramid, drop_rates
from vistok.parts.token_stage import TokenStage

Scale = Literal["head", "tokens"]
CARD = Card(
    title="DaViT: Dual Attention Vision Transformers",
    kind="trained",
    site="a backbone: windows and channels in turn, in place of attention to all tokens",
    paper="Ding et al., 2022, arXiv 2204.03645",
    repository="dingmyu/davit",
    mechanism=("transformation", "similarity"),
    score="products of channels over all places",
    select="the window of a token; the group of a channel",
    claim="Attention among channels sees the whole picture, in time that grows as its tokens do.",
)


class ChannelGroupAttention(nn.Module):
    """(B, N, dim) to the same, any N: softmax attention among the channels of each of ``groups``.

    ``scale``: "head", channels of a group ** -0.5, as published; "tokens", N ** -0.5, the same for any size of picture.
    """

    def __init__(self, dim: int, groups: int, qkv_bias: bool = True, scale: Scale = "head") -> None:
        super().__init__()
        if dim % groups:
            raise ValueError(f"groups: got {groups}, must divide dim, {dim}")
        if scale not in ("head", "tokens"):
            raise ValueError(f"scale: got {scale!r}, must be 'head' or 'tokens'")
        self.groups, self.scale = groups, scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """``size`` is not looked at: tokens are a set here."""
        value, query, key = self.qkv(x).unflatten(2, (3, self.groups, -1)).permute(2, 0, 3, 1, 4)
        scale = (x.shape[1] if self.scale == "tokens" else value.shape[3]) ** -0.5
        with torch.autocast(x.device.type, enabled=False):
            weights = ((upcast(query) * scale).transpose(2, 3) @ upcast(key)).softmax(3)
        out = value @ weights.transpose(2, 3).to(value.dtype)
        return self.proj(out.transpose(1, 2).flatten(2))


class WindowAttention(nn.Module):
    """(B, H * W, dim) to the same: attention within windows of ``window`` x ``window``, without a bias or a shift.

    ``mask_padding``: what a window at the border lacks is not attended to.
    """

    def __init__(
        self, dim: int, heads: int, window: int = 7, qkv_bias: bool = True, mask_padding: bool = False
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads: got {heads}, must divide dim, {dim}")
        self.heads, self.window, self.mask_padding = heads, window, mask_padding
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        h, w = size
        x = x.unflatten(1, size)
        if not self.mask_padding:
            x = pad(x, (0, 0, 0, -w % self.window, 0, -h % self.window))
        q, k, v = self.qkv(x).flatten(1, 2).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = attend(q, k, v, Window(tuple(x.shape[1:3]), self.window))
        out = out.transpose(1, 2).flatten(2).unflatten(1, x.shape[1:3])[:, :h, :w]
        return self.proj(out.flatten(1, 2))


class ConvPosition(nn.Module):
    """Tokens (B, H * W, dim) plus their 3x3 depthwise convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return x + self.proj(x.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """Position, ``attn`` (tokens and size to tokens), position, MLP, each added; (B, H * W, dim) to the same."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.cpe = nn.ModuleList([ConvPosition(dim), ConvPosition(dim)])
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = attn
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = self.cpe[0](x, size)
        x = x + self.drop_path(self.attn(self.norm1(x), size))
        x = self.cpe[1](x, size)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """A map made smaller: 7x7 by 4 and a norm at the start, else a norm and 2x2 by 2, or 3x3 if ``overlapped``.

    Zeros at the right and at the bottom where the stride does not divide the map.
    """

    def __init__(self, inputs: int, dim: int, first: bool, overlapped: bool = False) -> None:
        super().__init__()
        side, self.stride = (7, 4) if first else (3 if overlapped else 2, 2)
        self.before = nn.Identity() if first else MapNorm(inputs)
        self.proj = nn.Conv2d(inputs, dim, side, self.stride, side // 2 if side % 2 else 0)
        self.after = MapNorm(dim) if first else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        x = pad(x, (0, -x.shape[3] % self.stride, 0, -x.shape[2] % self.stride))
        return self.after(self.proj(x))


SIZES = {
    "tiny": ((96, 192, 384, 768), (1, 1, 3, 1), (3, 6, 12, 24), 7),
    "small": ((96, 192, 384, 768), (1, 1, 9, 1), (3, 6, 12, 24), 7),
    "base": ((128, 256, 512, 1024), (1, 1, 9, 1), (4, 8, 16, 32), 7),
    "large": ((192, 384, 768, 1536), (1, 1, 9, 1), (6, 12, 24, 48), 12),
}
"""Channels, pairs of blocks and heads (and groups) of each stage, and the window; large is for pictures of 384."""


@dataclass(frozen=True)
class DaViT:
    """The backbone, of four stages."""

    size: str = "tiny"
    """tiny, small, base or large."""
    scale: Literal["head", "tokens"] = "head"
    """Of channels' products; "tokens" is made for pictures of changing size."""
    overlapped: bool = False
    """Whether maps are made smaller by 3x3 convolutions."""
    mask_padding: bool = False
    """Whether what windows at the border lack is hidden."""
    drop_path: float = 0.1
    """Rate of stochastic depth of the last block (small: 0.2, base: 0.4)."""

    def build(self, num_classes: int = 1000, features_only: bool = False) -> Pyramid:
        """An untrained network; with ``features_only`` it gives the maps of its stages."""
        if self.size not in SIZES:
            raise ValueError(f"size: got {self.size!r}, must be {', '.join(SIZES)}")
        return self.of(*SIZES[self.size], num_classes, features_only)

    def of(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        window: int,
        num_classes: int = 1000,
        features_only: bool = False,
    ) -> Pyramid:
        """As ``build``, of any channels, pairs of blocks and heads of each stage."""
        stages = []
        rates = drop_rates(self.drop_path, [2 * depth for depth in depths])
        for i, (dim, head, given) in enumerate(zip(dims, heads, rates, strict=True)):
            embed = PatchEmbed(dims[i - 1] if i else 3, dim, not i, self.overlapped)
            stages.append(
                TokenStage(embed, [self._block(dim, head, window, j % 2, rate) for j, rate in enumerate(given)])
            )
        pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), MapNorm(dims[-1]))
        return Pyramid(stages, dims, [4 * 2**i for i in range(len(dims))], pooled, num_classes, features_only)

    def _block(self, dim: int, heads: int, window: int, channels: int, rate: float) -> Block:
        if channels:
            return Block(dim, ChannelGroupAttention(dim, heads, scale=self.scale), drop_path=rate)
        return Block(dim, WindowAttention(dim, heads, window, mask_padding=self.mask_padding), drop_path=rate)


def claim(trial: AttendTrial) -> Outcome:
    """The abstract: channels see the whole picture, and cost as much as its tokens are many.

    784 and 3136 tokens of width 96 in 3 groups or heads, projections included, against attention to all tokens. Holds
    if four times the tokens take at most five times as long, dense attention longer than that, and every token reaches
    the first one.
    """
    torch.manual_seed(trial.seed)
    dense, channels = Attention(96, 3, qkv_bias=True), ChannelGroupAttention(96, 3)
    few, many = torch.randn(1, 784, 96), torch.randn(1, 3136, 96, requires_grad=True)
    taken = trial.milliseconds(
        {
            "dense": lambda: dense(few),
            "channels": lambda: channels(few),
            "dense, more": lambda: dense(many),
            "channels, more": lambda: channels(many),
        }
    )
    plain, ours = (taken[f"{name}, more"] / taken[name] for name in ("dense", "channels"))
    (grad,) = torch.autograd.grad(channels(many)[:, 0].square().sum(), many)
    share = (grad != 0).any(2).float().mean().item()
    note = f"{taken['channels, more']:.1f} against {taken['dense, more']:.1f} ms; {share:.0%} of the tokens seen"
    return Outcome("times as long for 4 times the tokens", plain, ours, ours <= 5 < plain and share == 1, note)
