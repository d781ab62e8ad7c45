"""S2AFormer: attention to fewer keys, made from very few channels of queries and keys, between local convolutions.

What: attention with spatial reduction makes keys and values fewer. Strip self-attention makes the vectors that are
compared thinner as well: ``qk_dim`` channels a head, by default one, so that a head's logits are products of two
numbers, a matrix of rank 1. A head then ranks keys forward or backward and no more; what is selected by content needs
several heads. A block is a depthwise convolution, strip attention, a local module and an MLP, each added. Source: Xu et
al., arXiv 2505.22195, known from its text and summaries: no code was released, so that there are no weights to load.
Where: a backbone of four stages.

Not told or not known to us, and chosen: one channel a head (the paper says that they are compressed), reductions 8, 4,
2, 1 by depthwise convolutions, the local module as 3x3 depthwise convolution, batch norm, GELU, 1x1 convolution; sizes
of stages are PVT v2's smallest. Products are scaled by qk_dim ** -0.5. Where ``sr`` does not divide a map, zeros are
added at the right and at the bottom. Fused kernels want queries as wide as values: they are filled with zeros, so that
what is saved in time here is in the projections alone; without zeros attention took twice as long on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from vistok.catalogue.card import AttendTrial, Card, Outcome
from vistok.core import flops
from vistok.parts.pyramid import MapNorm, Pyramid, drop_rates
from vistok.parts.token_stage import TokenStage

CARD = Card(
    title="S2AFormer: Strip Self-Attention for Efficient Vision Transformer",
    kind="trained",
    site="a backbone: in place of attention, among convolutions",
    paper="Xu et al., 2025, arXiv 2505.22195",
    mechanism=("transformation", "attention"),
    score="products of one channel a head",
    merge="a depthwise convolution over sr x sr tokens, for keys and values",
    claim="With one channel a head for queries and keys, attention is faster and accuracy is preserved.",
)


class StripSelfAttention(nn.Module):
    """(B, H * W, dim) to the same: all tokens attend to a map smaller by ``sr``, with ``qk_dim`` channels a head."""

    def __init__(self, dim: int, heads: int, qk_dim: int = 1, sr: int = 8) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads: got {heads}, must divide dim, {dim}")
        if qk_dim < 1 or sr < 1:
            raise ValueError(f"qk_dim, sr: got {qk_dim}, {sr}, must be 1 or more")
        self.heads, self.sr = heads, sr
        self.reduce = nn.Conv2d(dim, dim, sr, sr, groups=dim) if sr > 1 else None
        self.norm = nn.LayerNorm(dim) if sr > 1 else nn.Identity()
        self.q, self.k = nn.Linear(dim, heads * qk_dim), nn.Linear(dim, heads * qk_dim)
        self.v, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def reduced(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """What keys and values are made from: (B, ceil(H / sr) * ceil(W / sr), dim)."""
        if self.reduce is None:
            return x
        h, w = size
        grid = pad(x.transpose(1, 2).unflatten(2, size), (0, -w % self.sr, 0, -h % self.sr))
        return self.norm(self.reduce(grid).flatten(2).transpose(1, 2))

    def split(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, heads, N, qk_dim), k (B, heads, M, qk_dim) and v (B, heads, M, dim / heads)."""
        few = self.reduced(x, size)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (self.q(x), self.k(few), self.v(few)))
        return q, k, v

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        q, k, v = self.split(x, size)
        # Fused kernels want queries as wide as values; zeros change no product, and to leave them costs much more.
        scale, lacking = q.shape[3] ** -0.5, (0, max(0, v.shape[3] - q.shape[3]))
        out = scaled_dot_product_attention(pad(q, lacking), pad(k, lacking), v, scale=scale)
        return self.proj(out.transpose(1, 2).flatten(2))


class LocalInteraction(nn.Module):
    """(B, H * W, dim) to the same: a 3x3 depthwise convolution, batch norm, GELU, and a mix of channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.local = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.BatchNorm2d(dim), nn.GELU())
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.proj(self.local(x.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2))


class HybridPerceptionBlock(nn.Module):
    """Convolution, strip attention, local module, MLP, each added; (B, H * W, dim) to the same."""

    def __init__(
        self, dim: int, heads: int, qk_dim: int = 1, sr: int = 8, mlp_ratio: float = 4.0, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.attn = StripSelfAttention(dim, heads, qk_dim, sr)
        self.lim = LocalInteraction(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = x + self.conv(x.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)
        x = x + self.drop_path(self.attn(self.norm1(x), size))
        x = x + self.drop_path(self.lim(self.norm2(x), size))
        return x + self.drop_path(self.mlp(self.norm3(x)))


def strip_flops(tokens: int, keys: int, dim: int, heads: int, qk_dim: int) -> tuple[int, int]:
    """Of Q K^T and of P V, counted as in ``vistok.core.flops``; projections and the reduction are not in it."""
    return flops.attention(tokens, keys, heads, qk_dim) // 2, flops.attention(tokens, keys, 1, dim) // 2


def stem(inputs: int, dim: int) -> nn.Sequential:
    """Three 3x3 convolutions, the first by 2; what is left of the first stage's 4 is its patch embedding's."""
    widths = (inputs, dim, dim, dim)
    layers: list[nn.Module] = []
    for i in range(3):
        layers += [nn.Conv2d(widths[i], dim, 3, 1 if i else 2, 1, bias=False), nn.BatchNorm2d(dim), nn.GELU()]
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class S2AFormer:
    """The backbone, of four stages."""

    dims: tuple[int, ...] = (32, 64, 160, 256)
    """Channels of each stage."""
    depths: tuple[int, ...] = (2, 2, 2, 2)
    """Blocks of each stage."""
    heads: tuple[int, ...] = (1, 2, 5, 8)
    """Heads of each stage."""
    reductions: tuple[int, ...] = (8, 4, 2, 1)
    """Side of the square of tokens that is a key, by stage."""
    qk_dim: int = 1
    """Channels of queries and keys, a head."""
    mlp_ratio: float = 4.0
    """Width of the MLP over the channels."""
    drop_path: float = 0.1
    """Rate of stochastic depth of the last block."""

    def build(self, num_classes: int = 1000, features_only: bool = False) -> Pyramid:
        """An untrained network; with ``features_only`` it gives the maps of its stages."""
        stages = []
        rates = drop_rates(self.drop_path, self.depths)
        each = zip(self.dims, self.heads, self.reductions, rates, strict=True)
        for i, (dim, heads, sr, given) in enumerate(each):
            smaller = nn.Sequential(nn.Conv2d(self.dims[i - 1] if i else dim, dim, 3, 2, 1), MapNorm(dim))
            embed = smaller if i else nn.Sequential(stem(3, dim), smaller)
            blocks = [HybridPerceptionBlock(dim, heads, self.qk_dim, sr, self.mlp_ratio, rate) for rate in given]
            stages.append(TokenStage(embed, blocks, nn.LayerNorm(dim)))
        strides = [4 * 2**i for i in range(len(stages))]
        return Pyramid(stages, self.dims, strides, nn.Identity(), num_classes, features_only)


def small(qk_dims: Sequence[int]) -> Pyramid:
    """What the claim trains on digits: two stages of two blocks, of 64 and 16 tokens."""
    stages = []
    for i, (inputs, dim, heads, sr, qk_dim) in enumerate(zip((1, 32), (32, 64), (2, 4), (2, 1), qk_dims, strict=True)):
        embed = nn.Sequential(nn.Conv2d(inputs, dim, 3, i + 1, 1), MapNorm(dim))
        stages.append(TokenStage(embed, [HybridPerceptionBlock(dim, heads, qk_dim, sr) for _ in range(2)]))
    return Pyramid(stages, (32, 64), (1, 2), MapNorm(64), 10)


def claim(trial: AttendTrial, steps: int = 250) -> Outcome:
    """The abstract: less computation, accuracy preserved. Holds if at most a point is lost and attention is faster.

    Beside the same networks with all 16 channels a head for queries and keys, trained alike on digits. Time: attention,
    projections included, of 3136 tokens, 64 channels and 4 heads to 49 keys of 8 x 8 tokens each.
    """
    accuracy = []
    for qk_dims in ((16, 16), (1, 1)):
        torch.manual_seed(trial.seed)
        net = small(qk_dims)
        trial.fit(net, steps)
        accuracy.append(trial.accuracy(net))
    x = torch.randn(4, 3136, 64)
    full, strip = StripSelfAttention(64, 4, 16), StripSelfAttention(64, 4, 1)
    taken = trial.milliseconds({"full": lambda: full(x, (56, 56)), "strip": lambda: strip(x, (56, 56))})
    before, after = (sum(strip_flops(3136, 49, 64, 4, qk_dim)) / 1e6 for qk_dim in (16, 1))
    note = f"{taken['strip']:.1f} against {taken['full']:.1f} ms, {after:.1f} against {before:.1f} million operations "
    note += f"between projections; {steps} steps, one seed"
    holds = accuracy[1] >= accuracy[0] - 0.01 and taken["strip"] < taken["full"]
    return Outcome("accuracy on digits", accuracy[0], accuracy[1], holds, note)
