"""CATANet: tokens are sorted by the cluster they belong to, so that like ones, however far apart, attend in one group.

What: super-resolution finds detail where the same texture stands elsewhere, which windows do not see. Learned centres,
shared by all pictures, part the tokens by cosine; sorted by centre, groups of equal size attend to themselves and the
next group. A second softmax, added, is over the centres. Centres move with spherical k-means in training, the
last of its steps with a gradient, and are averages over time when they are used. Each block goes on with attention
inside overlapping patches. Source: Liu et al., arXiv 2503.06896, EquationWalker/CATANet; parameters of the block bear
the authors' names. Where: the blocks of a network for small super-resolution.

Groups at the end are cut short; the released code fills them, and the one after the last, with mirrored tokens, which
then count twice (``parity="authors"``, which also fills up for its first centres where nothing lacks). Sorting is
stable, so that within a cluster tokens keep their order. Where patches overlap, pixels are averaged by how many cover
them. With several processes the centres are of all their pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, l1_loss, normalize, one_hot

from vistok.catalogue.card import AttendTrial, Card, Outcome
from vistok.core.attention import BlockMask, Dense, TileOrder, attend
from vistok.core.tensors import take
from vistok.parts.distributed import of_first, summed
from vistok.world.real import photographs

Parity = Literal["paper", "authors"]
CARD = Card(
    title="CATANet: Efficient Content-Aware Token Aggregation for Lightweight Image Super-Resolution",
    kind="trained",
    site="blocks of a super-resolution network",
    paper="Liu et al., 2025, arXiv 2503.06896",
    repository="EquationWalker/CATANet",
    mechanism=("similarity",),
    score="cosine with the centres of clusters",
    select="groups of equal size of the tokens sorted by cluster, each with the next",
    claim="Groups by content restore a picture better than windows of the same size and cost.",
    departures=("groups at the end are cut short, not filled with mirrored tokens",),
)


def center_iter(x: Tensor, centers: Tensor) -> Tensor:
    """A step of spherical k-means over the whole batch: (M, C) of unit length.

    ``x`` (B, N, C) and ``centers`` (M, C), of unit length. A centre becomes the direction of the sum of those that are
    nearest to it; one without any stays. Gradients reach ``x`` through the sums.
    """
    own = (x.detach() @ centers.T).argmax(2)
    member = one_hot(own.flatten(), len(centers)).to(x.dtype)
    total, count = summed(member.T @ x.flatten(0, 1)), summed(member.sum(0))
    return torch.where(count[:, None] > 0, normalize(total, dim=1), centers)


def run_means(x: Tensor, centers: int, parity: Parity = "paper") -> Tensor:
    """(M, C): means of M runs of tokens of ``x`` (B, N, C) and over the batch; the tail is filled by mirrored ones."""
    n = x.shape[1]
    lacking = centers - n % centers if parity == "authors" else -n % centers
    x = torch.cat([x, x[:, _mirrored(n, lacking)]], 1)
    return x.unflatten(1, (centers, -1)).mean((0, 2))


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, group: int, parity: Parity = "paper") -> Tensor:
    """(B, H, N, dv): the tokens in groups of ``group``, each group sees itself and the next.

    ``q``, ``k`` (B, H, N, d), ``v`` (B, H, N, dv). With "authors" the last groups see mirrored tokens too.
    """
    n = q.shape[2]
    group = min(group, n)
    if parity == "authors":
        tail = _mirrored(n, -n % group + group)
        k, v = (torch.cat([t, t[:, :, tail]], 2) for t in (k, v))
    return attend(q, k, v, _bands(n, k.shape[2], group, q.device))


@lru_cache(maxsize=64)
def _bands(queries: int, keys: int, group: int, device: torch.device) -> BlockMask:
    rows, columns = (torch.arange(math.ceil(n / group), device=device) for n in (queries, keys))
    ahead = columns - rows[:, None]
    return BlockMask(((ahead == 0) | (ahead == 1))[None, None], queries, keys, (group, group))


def _mirrored(n: int, count: int) -> Tensor:
    """Positions of ``count`` tokens beyond the last of n: backwards from it, and forth again where that is too few."""
    at = torch.arange(count) % (2 * n)
    return torch.where(at < n, n - 1 - at, at - n)


def _heads(x: Tensor, heads: int) -> Tensor:
    """(..., N, C) as (..., heads, N, C / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


class IntraGroupAttention(nn.Module):
    """Attention of (B, N, dim) tokens in the order (B, N) int64, in groups; plus that over the centres."""

    def __init__(self, dim: int, qk_dim: int, heads: int, group: int, parity: Parity = "paper") -> None:
        super().__init__()
        if dim % heads or qk_dim % heads:
            raise ValueError(f"heads: got {heads}, must divide dim and qk_dim, {dim} and {qk_dim}")
        self.heads, self.group, self.parity = heads, group, parity
        self.to_q, self.to_k = (nn.Linear(dim, qk_dim, bias=False) for _ in range(2))
        self.to_v, self.proj = (nn.Linear(dim, dim, bias=False) for _ in range(2))

    def forward(self, x: Tensor, order: Tensor, k_global: Tensor, v_global: Tensor) -> Tensor:
        """``k_global`` and ``v_global`` (heads, M, d): of the centres."""
        q, k, v = (_heads(take(t, order), self.heads) for t in (self.to_q(x), self.to_k(x), self.to_v(x)))
        out = grouped_attention(q, k, v, self.group, self.parity)
        k, v = (t.expand(len(x), -1, -1, -1) for t in (k_global, v_global))
        out = out + attend(q, k, v, Dense(x.shape[1], k.shape[2]))
        return self.proj(take(out.transpose(1, 2).flatten(2), order.argsort(1)))


class CenterKeys(nn.Module):
    """Keys and values (heads, M, d) of centres (M, dim)."""

    def __init__(self, dim: int, qk_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_k, self.to_v = nn.Linear(dim, qk_dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, centers: Tensor) -> tuple[Tensor, Tensor]:
        return _heads(self.to_k(centers), self.heads), _heads(self.to_v(centers), self.heads)


class ConvFFN(nn.Module):
    """An MLP of map (B, C, H, W) with a depthwise convolution of its hidden channels beside them."""

    def __init__(self, dim: int, hidden: int, kernel: int = 5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dwconv = nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden)

    def forward(self, x: Tensor) -> Tensor:
        h = gelu(self.fc1(self.norm(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        return self.fc2((h + gelu(self.dwconv(h))).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TokenAggregationBlock(nn.Module):
    """(B, dim, H, W) to the same. ``centers`` clusters, ``group`` tokens of a group, ``n_iter`` steps in training."""

    def __init__(
        self,
        dim: int = 40,
        qk_dim: int = 36,
        heads: int = 4,
        centers: int = 16,
        group: int = 256,
        mlp_dim: int = 96,
        n_iter: int = 5,
        parity: Parity = "paper",
    ) -> None:
        super().__init__()
        if n_iter < 1:
            raise ValueError(f"n_iter: got {n_iter}, must be 1 or more")
        self.n_iter, self.parity = n_iter, parity
        self.norm = nn.LayerNorm(dim)
        self.iasa_attn = IntraGroupAttention(dim, qk_dim, heads, group, parity)
        self.irca_attn = CenterKeys(dim, qk_dim, heads)
        self.conv1x1 = nn.Conv2d(dim, dim, 1, bias=False)
        self.mlp = ConvFFN(dim, mlp_dim)
        self.means: Tensor
        self.initialised: Tensor
        self.register_buffer("means", torch.zeros(centers, dim))
        self.register_buffer("initialised", torch.tensor(False))

    def find_centers(self, x: Tensor) -> Tensor:
        """The centres (M, dim) for tokens ``x`` (B, N, dim); in training they are those of this batch."""
        if self.initialised:
            centers = self.means.clone()  # they may move before the backward pass
        else:
            centers = of_first(run_means(x.detach(), len(self.means), self.parity))
        if self.training:
            unit = normalize(x, dim=2)
            for step in range(self.n_iter):
                last = step == self.n_iter - 1
                centers = center_iter(unit if last else unit.detach(), normalize(centers, dim=1))
            with torch.no_grad():
                self.means.copy_(torch.lerp(self.means, centers, 0.001) if self.initialised else centers)
                self.initialised.fill_(True)
        return centers

    def order(self, x: Tensor, centers: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, N) int64: tokens ``x`` (B, N, dim) sorted by their nearest centre."""
        own = (normalize(x.detach(), dim=2) @ normalize(centers.detach(), dim=1).T).argmax(2)
        return own.sort(dim=1, stable=True).indices

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        centers = self.find_centers(tokens)
        order = self.order(tokens, centers, (x.shape[2], x.shape[3]))
        mixed = self.iasa_attn(tokens, order, *self.irca_attn(centers))
        x = x + self.conv1x1(mixed.transpose(1, 2).unflatten(2, x.shape[2:]))
        return x + self.mlp(x)


class PatchAttention(nn.Module):
    """(B, dim, H, W) to the same: attention inside patches of ``patch`` pixels a side, 2 of which overlap."""

    def __init__(self, dim: int, qk_dim: int, heads: int, patch: int, mlp_dim: int = 96) -> None:
        super().__init__()
        if patch < 3:
            raise ValueError(f"patch: got {patch}, must be 3 or more")
        self.heads, self.patch = heads, patch
        self.norm = nn.LayerNorm(dim)
        self.to_q, self.to_k = (nn.Linear(dim, qk_dim, bias=False) for _ in range(2))
        self.to_v, self.proj = (nn.Linear(dim, dim, bias=False) for _ in range(2))
        self.mlp = ConvFFN(dim, mlp_dim)

    def places(self, h: int, w: int) -> Tensor:
        """(patches, pixels of one) int64: where each patch's pixels stand in the map; the last ones end at its end."""
        lines = []
        for length in (h, w):
            size = min(self.patch, length)
            starts = torch.arange(0, length - size + self.patch - 2, self.patch - 2).clamp_max(length - size).unique()
            lines.append(starts[:, None] + torch.arange(size))
        return (lines[0][:, None, :, None] * w + lines[1][None, :, None]).flatten(2).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        places = self.places(*x.shape[2:]).to(x.device)
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        q, k, v = (_heads(of(tokens)[:, places], self.heads).flatten(0, 1) for of in (self.to_q, self.to_k, self.to_v))
        seen = attend(q, k, v, Dense(places.shape[1], places.shape[1])).transpose(1, 2).flatten(2)
        total = torch.zeros_like(tokens).index_add(1, places.flatten(), seen.view(len(x), -1, x.shape[1]))
        cover = torch.bincount(places.flatten(), minlength=tokens.shape[1])
        x = x + self.proj(total / cover[:, None]).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.mlp(x)


class SuperResolution(nn.Module):
    """Pictures (B, 3, H, W) in 0 .. 1 to (B, 3, scale * H, scale * W). ``blocks``: two modules each, on maps."""

    def __init__(self, scale: int, dim: int, blocks: Sequence[tuple[nn.Module, nn.Module]]) -> None:
        super().__init__()
        if scale not in (2, 3, 4):
            raise ValueError(f"scale: got {scale}, must be 2, 3 or 4")
        self.scale = scale
        self.first_conv = nn.Conv2d(3, dim, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Sequential(*both) for both in blocks)
        self.mid_convs = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in blocks)
        steps = (2, 2) if scale == 4 else (scale,)
        up: list[nn.Module] = []
        for step in steps:
            up += [nn.Conv2d(dim, dim * step**2, 3, padding=1), nn.PixelShuffle(step), nn.LeakyReLU(0.1)]
        self.upsample = nn.Sequential(*up)
        self.last_conv = nn.Conv2d(dim, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        shallow = deep = self.first_conv(x)
        for block, conv in zip(self.blocks, self.mid_convs, strict=True):
            deep = deep + conv(block(deep))
        larger = interpolate(x, scale_factor=self.scale, mode="bilinear", align_corners=False)
        return self.last_conv(self.upsample(deep + shallow)) + larger


@dataclass(frozen=True)
class CATANet:
    """The super-resolution network. Values by block are tuples of equal length."""

    scale: int = 2
    """2, 3 or 4 times larger."""
    dim: int = 40
    """Channels."""
    qk_dim: int = 36
    """Channels of queries and keys."""
    heads: int = 4
    """Heads of attention."""
    mlp_dim: int = 96
    """Hidden channels of the MLPs."""
    patches: tuple[int, ...] = (16, 20, 24, 28, 16, 20, 24, 28)
    """Sides of the overlapping patches."""
    centers: tuple[int, ...] = (16, 32, 64, 128, 16, 32, 64, 128)
    """Clusters."""
    groups: tuple[int, ...] = (256, 128, 64, 32, 256, 128, 64, 32)
    """Tokens of a group."""
    n_iter: int = 5
    """Steps of k-means a training step."""
    parity: Literal["paper", "authors"] = "paper"
    """"authors": mirrored tokens fill the last groups."""

    def build(self) -> SuperResolution:
        """An untrained network."""
        return self.of(TokenAggregationBlock)

    def of(self, first: Any) -> SuperResolution:
        """As ``build``, with another class in place of TokenAggregationBlock, made with the same arguments."""
        if not len(self.patches) == len(self.centers) == len(self.groups):
            lengths = len(self.patches), len(self.centers), len(self.groups)
            raise ValueError(f"patches, centers, groups: got {lengths} entries, must be one a block each")
        shape, blocks = (self.dim, self.qk_dim, self.heads), []
        for patch, centers, group in zip(self.patches, self.centers, self.groups, strict=True):
            block = first(*shape, centers, group, self.mlp_dim, self.n_iter, self.parity)
            blocks.append((block, PatchAttention(*shape, patch, self.mlp_dim)))
        return SuperResolution(self.scale, self.dim, blocks)


class _Windows(TokenAggregationBlock):
    """The control: groups are windows of the map, whatever they show."""

    def order(self, x: Tensor, centers: Tensor, grid: tuple[int, int]) -> Tensor:
        order = TileOrder.of(grid, math.isqrt(self.iasa_attn.group)).order
        return order[order >= 0].to(x.device).expand(len(x), -1)


def claim(trial: AttendTrial, steps: int = 200) -> Outcome:
    """The abstract: better than lightweight networks that attend in windows. Twice as large, on photographs.

    Two small networks of equal size and cost learn on crops of some photographs and are judged on others. They differ
    in how tokens are grouped. Holds only where what is learned is better than bilinear, too.
    """
    system = CATANet(dim=24, qk_dim=24, heads=2, mlp_dim=48, patches=(8, 8), centers=(16, 16), groups=(16, 16))
    train, test = (_pixels(part) for part in (False, True))

    def loss(net: Any, rng: Any) -> Tensor:
        large = _crops(train, 4, 32, rng)
        return l1_loss(net(_halved(large)), large)

    found = []
    for block in (_Windows, TokenAggregationBlock):
        torch.manual_seed(trial.seed)
        net = system.of(block)
        for parameter in net.last_conv.parameters():
            nn.init.zeros_(parameter)  # begins as bilinear
        trial.fit(net, steps, loss=loss)
        found.append(psnr(net, test))
    large = _crops(test, 32, 64, torch.Generator().manual_seed(0))
    plain = _decibels(interpolate(_halved(large), scale_factor=2, mode="bilinear", align_corners=False), large)
    windows, ours = found
    note = f"bilinear {plain:.2f}; {steps} steps each, one seed"
    return Outcome("PSNR of photographs in dB, against windows", windows, ours, ours > max(windows, plain), note)


def psnr(net: nn.Module, pictures: Sequence[Tensor]) -> float:
    """Mean over 32 fixed crops of ``pictures``, 64 pixels a side, in dB."""
    large = _crops(pictures, 32, 64, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return _decibels(torch.cat([net(_halved(part)) for part in large.split(8)]), large)


def _decibels(made: Tensor, real: Tensor) -> float:
    return (-10 * (made.clamp(0, 1) - real).square().mean((1, 2, 3)).log10()).mean().item()


def _halved(x: Tensor) -> Tensor:
    return interpolate(x, scale_factor=0.5, mode="bicubic", antialias=True).clamp(0, 1)


def _pixels(test: bool) -> list[Tensor]:
    """Photographs of one part, (3, H, W) in 0 .. 1."""
    return [
        torch.tensor(bytearray(p.tobytes())).view(p.height, p.width, 3).permute(2, 0, 1) / 255
        for p in photographs(test)
    ]


def _crops(pictures: Sequence[Tensor], count: int, side: int, rng: torch.Generator) -> Tensor:
    found = []
    for which in torch.randint(len(pictures), (count,), generator=rng).tolist():
        top, left = (int(torch.randint(n - side + 1, (), generator=rng)) for n in pictures[which].shape[1:])
        found.append(pictures[which][:, top : top + side, left : left + side])
    return torch.stack(found)
