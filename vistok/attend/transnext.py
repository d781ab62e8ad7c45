"""TransNeXt: each place attends to its neighbours finely and to the whole picture coarsely, in one softmax.

What: blocks that see little need many layers to mix a picture. Here a query sees the 3x3 places around it and the map
pooled by ``sr``, all in one softmax of cosines: queries and keys are of length 1, a learned vector is added to the
query, and the scale is the logarithm of how many keys there are times a learned temperature. Near keys have a bias by
offset, pooled ones that of a small network of the offset. Weights that learned tokens read off the query are added to
those of the neighbours after the softmax. The MLP is gated, behind a 3x3 depthwise convolution. Source: Shi,
arXiv 2311.17132, DaiShiResearch/TransNeXt; parameters of the operators bear the authors' names, but for ``sr_conv``
(sr) and ``dwconv`` (dwconv.dwconv). Where: a backbone of four stages, the last with the same cosine attention to all.

Neighbours are taken one by one from a padded map, in place of copies of nine times the keys and of the authors' kernel.
Beyond the map there is no key, and the value is 0. On a map of another size than that of training the bias is that of
its own offsets, or (``extrapolation`` False) that of the trained map, interpolated. A map smaller than ``sr`` is pooled
to one token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from timm.layers import DropPath
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d, gelu, interpolate, normalize, pad, softplus

from vistok.catalogue.card import AttendTrial, Card, Outcome
from vistok.core.attention import Dense, attend
from vistok.parts.pyramid import MapNorm, Pyramid, drop_rates
from vistok.parts.token_stage import TokenStage

CARD = Card(
    title="TransNeXt: Robust Foveal Visual Perception for Vision Transformers",
    kind="trained",
    site="a backbone: in place of attention and of the MLP",
    paper="Shi, 2023, arXiv 2311.17132",
    repository="DaiShiResearch/TransNeXt",
    mechanism=("transformation", "similarity"),
    score="cosines with near and with pooled keys, biases by offset",
    select="the neighbours of a token, and all pooled tokens",
    merge="mean over sr x sr tokens",
    claim="Every pixel reaches every place within one block, in less time than attention to all tokens takes.",
)
FULLY = 8.0
"""Offsets as long as the map are this, before the logarithm."""


@lru_cache(maxsize=32)
def _offsets(queries: int, keys: int, trained: int) -> tuple[Tensor, Tensor]:
    """Along an axis: the different offsets of a query from a pooled key, (U,), and which is whose, (queries, keys)."""
    at = torch.arange(queries, dtype=torch.float64)
    apart = at[:, None] - adaptive_avg_pool1d(at[None], keys)[0]
    far, which = (apart / max(trained - 1, 1) * FULLY).unique(return_inverse=True)
    return (far.sign() * (far.abs() + 1).log2() / math.log2(FULLY)).float(), which


class CosineAttention(nn.Module):
    """What both kinds of attention share: the scaled query, the bias of pooled keys.

    ``trained``: height and width of the map in training.
    """

    def __init__(self, dim: int, heads: int, trained: tuple[int, int], sr: int, extrapolation: bool) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads: got {heads}, must divide dim, {dim}")
        self.heads, self.trained, self.sr, self.extrapolation = heads, trained, sr, extrapolation
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), math.log(math.expm1(1 / 0.24))))
        self.query_embedding = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, 1, dim // heads), std=0.02))
        self.cpb_fc1, self.cpb_fc2 = nn.Linear(2, 512), nn.Linear(512, heads)
        self.proj = nn.Linear(dim, dim)

    def split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(B, N, parts * dim) as so many of (B, heads, N, dim / heads)."""
        return x.unflatten(2, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()

    def scaled(self, unit: Tensor, keys: Tensor) -> Tensor:
        """Queries of length 1 as they meet the keys; ``keys``: how many each sees, (N,) or one number."""
        return (unit + self.query_embedding) * softplus(self.temperature) * keys.log()[:, None]

    def pooled(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the pooled map."""
        return max(1, size[0] // self.sr), max(1, size[1] // self.sr)

    def position_bias(self, size: tuple[int, int]) -> Tensor:
        """(heads, N, P) of a map of ``size``."""
        own = size if self.extrapolation else self.trained
        keys = self.pooled(own)
        (down, rows), (across, columns) = (_offsets(n, p, t) for n, p, t in zip(own, keys, self.trained, strict=True))
        weight = self.cpb_fc1.weight
        pairs = torch.cartesian_prod(down, across).to(weight)
        which = (rows[:, None, :, None] * len(across) + columns[None, :, None]).to(weight.device)
        table = self.cpb_fc2(self.cpb_fc1(pairs).relu())
        bias = table[which.flatten(2).flatten(0, 1)].permute(2, 0, 1)
        if own != size:
            bias = interpolate(bias.unflatten(2, keys), self.pooled(size), mode="bilinear").flatten(2)
            bias = bias.transpose(1, 2).unflatten(2, own)
            bias = interpolate(bias, size, mode="bilinear").flatten(2).transpose(1, 2)
        return bias


class AggregatedAttention(CosineAttention):
    """(B, H * W, dim) to the same: attention to ``window`` x ``window`` places and to the map pooled by ``sr``."""

    def __init__(
        self,
        dim: int,
        heads: int,
        trained: tuple[int, int],
        sr: int,
        window: int = 3,
        extrapolation: bool = True,
    ) -> None:
        super().__init__(dim, heads, trained, sr, extrapolation)
        if window % 2 == 0:
            raise ValueError(f"window: got {window}, must be odd")
        self.window, area = window, window**2
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.sr_conv = nn.Conv2d(dim, dim, 1)
        self.norm = nn.LayerNorm(dim)
        self.relative_pos_bias_local = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, area), std=0.0004))
        self.learnable_tokens = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, dim // heads, area), std=0.02))
        self.learnable_bias = nn.Parameter(torch.zeros(heads, 1, area))

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        unit = normalize(self.split(self.q(x), 1)[0], dim=3)
        k, v = self.split(self.kv(x), 2)
        far = gelu(self.sr_conv(x.transpose(1, 2).unflatten(2, size)))
        far = self.norm(adaptive_avg_pool2d(far, self.pooled(size)).flatten(2).transpose(1, 2))
        far_k, far_v = self.split(self.kv(far), 2)
        inside = self._inside(size, x.device)
        q = self.scaled(unit, inside.sum(1) + far.shape[1])
        near = torch.stack([(q * key).sum(3) for key in self._around(normalize(k, dim=3), size)], 3)
        near = (near + self.relative_pos_bias_local[:, None]).masked_fill(~inside, -torch.inf)
        pooled = q @ normalize(far_k, dim=3).transpose(2, 3) + self.position_bias(size)
        weights = torch.cat([near, pooled], 3).softmax(3)
        by_place = weights[..., : self.window**2] + unit @ self.learnable_tokens + self.learnable_bias
        out = weights[..., self.window**2 :] @ far_v
        for i, value in enumerate(self._around(v, size)):
            out = out + by_place[..., i, None] * value
        return self.proj(out.transpose(1, 2).flatten(2))

    def _around(self, x: Tensor, size: tuple[int, int]) -> Iterator[Tensor]:
        """``x`` (B, heads, N, d) of each place's neighbours, one after the other in raster order; 0 beyond the map."""
        reach = self.window // 2
        padded = pad(x.unflatten(2, size), (0, 0, reach, reach, reach, reach))
        for i in range(self.window):
            for j in range(self.window):
                yield padded[:, :, i : i + size[0], j : j + size[1]].flatten(2, 3)

    def _inside(self, size: tuple[int, int], device: torch.device) -> Tensor:
        """(N, window ** 2) bool: whether there is such a neighbour."""
        ones = torch.ones(1, 1, size[0] * size[1], 1, dtype=torch.bool, device=device)
        return torch.cat(list(self._around(ones, size)), 3)[0, 0]


class DenseAttention(CosineAttention):
    """(B, H * W, dim) to the same: cosine attention to all places."""

    def __init__(self, dim: int, heads: int, trained: tuple[int, int], extrapolation: bool = True) -> None:
        super().__init__(dim, heads, trained, 1, extrapolation)
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        q, k, v = self.split(self.qkv(x), 3)
        n = x.shape[1]
        q, k = self.scaled(normalize(q, dim=3), x.new_tensor([float(n)])), normalize(k, dim=3)
        out = attend(q, k, v, Dense(n, n), self.position_bias(size), scale=1.0)
        return self.proj(out.transpose(1, 2).flatten(2))


class ConvGLU(nn.Module):
    """(B, H * W, dim) to the same: a gated MLP of two thirds of ``ratio`` times the width, with a 3x3 convolution."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        hidden = int(2 * int(dim * ratio) / 3)
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        given, gate = self.fc1(x).chunk(2, 2)
        near = self.dwconv(given.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)
        return self.fc2(gelu(near) * gate)


class TransNeXtBlock(nn.Module):
    """``attn`` and ``mlp``, each behind a norm and added; both take tokens and the size of the map."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = attn, ConvGLU(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), size))
        return x + self.drop_path(self.mlp(self.norm2(x), size))


SIZES = {
    "micro": ((48, 96, 192, 384), (2, 2, 15, 2)),
    "tiny": ((72, 144, 288, 576), (2, 2, 15, 2)),
    "small": ((72, 144, 288, 576), (5, 5, 22, 5)),
    "base": ((96, 192, 384, 768), (5, 5, 23, 5)),
}
"""Channels and blocks of each stage."""


@dataclass(frozen=True)
class TransNeXt:
    """The backbone, of four stages."""

    size: str = "tiny"
    """micro, tiny, small or base."""
    image: int = 224
    """Side of the pictures of training."""
    window: int = 3
    """Side of the neighbourhood."""
    sr: tuple[int, ...] = (8, 4, 2, 1)
    """How much the keys of each stage are pooled; 1: attention to all."""
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)
    """Of each stage; two thirds of it are built."""
    head_dim: int = 24
    """Channels of a head."""
    extrapolation: bool = True
    """Whether maps of other sizes have biases of their own offsets, or else those of training, interpolated."""
    drop_path: float = 0.3
    """Rate of stochastic depth of the last block (micro: 0.15, small: 0.5, base: 0.6)."""

    def build(self, num_classes: int = 1000, features_only: bool = False) -> Pyramid:
        """An untrained network; with ``features_only`` it gives the maps of its stages."""
        if self.size not in SIZES:
            raise ValueError(f"size: got {self.size!r}, must be {', '.join(SIZES)}")
        return self.of(*SIZES[self.size], num_classes, features_only)

    def of(
        self, dims: tuple[int, ...], depths: tuple[int, ...], num_classes: int = 1000, features_only: bool = False
    ) -> Pyramid:
        """As ``build``, of any channels and blocks of each stage."""
        if not len(dims) == len(depths) == len(self.sr) == len(self.mlp_ratios):
            got = len(dims), len(depths), len(self.mlp_ratios)
            raise ValueError(f"sr: got {len(self.sr)} for {got} channels, depths and ratios, must be one a stage")
        stages = []
        for i, (dim, rates) in enumerate(zip(dims, drop_rates(self.drop_path, depths), strict=True)):
            conv = nn.Conv2d(dims[i - 1], dim, 3, 2, 1) if i else nn.Conv2d(3, dim, 7, 4, 3)
            side = -(-self.image // (4 * 2**i))
            blocks = [TransNeXtBlock(dim, self._attention(i, dim, (side, side)), self.mlp_ratios[i], r) for r in rates]
            stages.append(TokenStage(nn.Sequential(conv, MapNorm(dim)), blocks, nn.LayerNorm(dim, eps=1e-6)))
        reductions = [4 * 2**i for i in range(len(dims))]
        return Pyramid(stages, dims, reductions, nn.Identity(), num_classes, features_only)

    def _attention(self, stage: int, dim: int, trained: tuple[int, int]) -> CosineAttention:
        heads = max(1, dim // self.head_dim)
        if self.sr[stage] == 1:
            return DenseAttention(dim, heads, trained, self.extrapolation)
        return AggregatedAttention(dim, heads, trained, self.sr[stage], self.window, self.extrapolation)


def claim(trial: AttendTrial) -> Outcome:
    """The abstract: global perception in every layer, at the cost of few keys. 56 x 56 tokens, 4 heads, pooled by 8.

    Against a plain layer of attention to all, of equal width, with its projections. What reaches a corner is counted
    by gradients.
    """
    torch.manual_seed(trial.seed)
    size = 56, 56
    ours, plain = AggregatedAttention(96, 4, size, 8), Attention(96, 4, qkv_bias=True)
    x = torch.randn(1, 56 * 56, 96)
    taken = trial.milliseconds({"dense": lambda: plain(x), "aggregated": lambda: ours(x, size)})
    share = reach(ours, x, size)
    holds = share == 1 and taken["aggregated"] < taken["dense"]
    note = f"{share:.0%} of the pixels reach the corner; {9 + 49} keys a query, of {56 * 56}"
    return Outcome("milliseconds, against dense", taken["dense"], taken["aggregated"], holds, note)


def reach(attn: nn.Module, x: Tensor, size: tuple[int, int]) -> float:
    """Share of the tokens of ``x`` (B, N, C) that the first token of the output depends on, by its gradient."""
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(attn(x, size)[:, 0].square().sum(), x)
    return (grad != 0).any(2).float().mean().item()
