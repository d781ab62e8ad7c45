"""BiFormer: each region of a map picks the few regions that matter to it, then its tokens attend to all of theirs.

What: a map is cut into regions. The mean query of a region times the mean key of each says which ``topk`` regions it
looks at; inside those every token is seen. The first step is small, the second made of dense products: here the tokens
are laid out region by region, and a ``BlockMask`` of the routes goes to ``attend``. A depthwise convolution of the
values is added, as position. Source: Zhu et al., arXiv 2303.08810, rayleizhu/BiFormer; parameters of the operator
bear the authors' names. Where: in place of attention, in the first three stages of a backbone; the last is dense.

No gradient goes through the routing. The scale is that of the full width, not of a head, as in the released weights.
As published, a side that ``n_win`` does not divide has more than ``n_win`` regions, the last ones cut off. What they
lack is masked here; the released code attends to zeros in its place (``parity="authors"``). Maps smaller than
``n_win`` have regions of one token, and a module's ``topk`` is cut to the number of regions. Left out: what the
released code does not do by default (learned and soft routing, pooled keys), and the ablation in Swin's layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, layer_norm, pad, pixel_unshuffle

from vistok.catalogue.card import AttendTrial, Card, Outcome
from vistok.core.attention import BlockMask, Dense, Executor, GridWindow, TileOrder, attend
from vistok.core.tensors import ranking
from vistok.parts.pyramid import MapNorm, Pyramid, drop_rates
from vistok.world.photographs import photos

Parity = Literal["paper", "authors"]
CARD = Card(
    title="BiFormer: Vision Transformer with Bi-Level Routing Attention",
    kind="trained",
    site="in place of a layer's attention, on maps; a backbone of it",
    paper="Zhu et al., 2023, arXiv 2303.08810",
    repository="rayleizhu/BiFormer",
    mechanism=("similarity",),
    score="product of the mean query and the mean key of two regions",
    select="the k best regions of each region, all tokens in them",
    claim="Routing is faster than attention to all tokens, and what is seen holds more of it than the nearest do.",
    departures=("padded keys of cut-off regions are masked",),
)
FULL = -2
"""As ``topk``: ordinary attention to all tokens."""


def route(q: Tensor, k: Tensor, region: tuple[int, int], topk: int) -> tuple[Tensor, Tensor]:
    """(B, R, topk) int64, the regions that each region looks at, best first; and the logits (B, R, R).

    ``q``, ``k`` (B, C, H, W); ``region`` (height, width) in tokens, the R regions in raster order, cut off where the
    map ends. Ties go to the lower region. Neither has a gradient.
    """
    means = [avg_pool2d(x.detach(), region, ceil_mode=True, count_include_pad=False).flatten(2) for x in (q, k)]
    logits = means[0].transpose(1, 2) @ means[1]
    regions = logits.shape[2]
    if not 1 <= topk <= regions:
        raise ValueError(f"topk: got {topk}, must be 1 to the {regions} regions of the map")
    return ranking(logits.flatten(0, 1))[:, :topk].view(len(q), regions, topk), logits


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    region: tuple[int, int],
    index: Tensor,
    scale: float | None = None,
    parity: Parity = "paper",
    executor: Executor = "auto",
) -> Tensor:
    """(B, Cv, H, W): attention of ``q`` (B, C, H, W) over ``k`` and ``v`` (B, Cv, H, W) in the regions of ``index``.

    ``index`` (B, R, K) int64, or (B, heads, R, K): the regions that each region sees. Heads are channels side by side;
    ``scale`` is C ** -0.5 by default, of all heads together.
    """
    h, w = q.shape[2:]
    short = -h % region[0], -w % region[1]
    q, k, v = (pad(x, (0, short[1], 0, short[0])) for x in (q, k, v))
    order = TileOrder.of(q.shape[2:], region)
    rows = [order.permute(_rows(x, heads)) for x in (q, k, v)]
    n, size = rows[0].shape[2], region[0] * region[1]
    bias = None
    if any(short) and parity == "paper":
        inside = pad(q.new_zeros(h, w), (0, short[1], 0, short[0]), value=-torch.inf)
        bias = inside.flatten()[order.order.to(q.device)].view(1, 1, 1, n)
    pattern = BlockMask.from_index(index if index.dim() == 4 else index[:, None], n, n, (size, size))
    out = attend(
        rows[0], rows[1], rows[2], pattern, bias, q.shape[1] ** -0.5 if scale is None else scale, executor=executor
    )
    return order.unpermute(out).transpose(2, 3).flatten(1, 2).unflatten(2, q.shape[2:])[:, :, :h, :w]


def bi_level_routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    region: tuple[int, int],
    topk: int,
    scale: float | None = None,
    parity: Parity = "paper",
    executor: Executor = "auto",
) -> tuple[Tensor, Tensor]:
    """``routed_attention`` over the ``topk`` regions of ``route``, and these, (B, R, topk) int64."""
    index, _ = route(q, k, region, topk)
    return routed_attention(q, k, v, heads, region, index, scale, parity, executor), index


def _rows(x: Tensor, heads: int) -> Tensor:
    """A map (B, C, H, W) as (B, heads, H * W, C / heads)."""
    return x.flatten(2).unflatten(1, (heads, -1)).transpose(2, 3)


class BiLevelRoutingAttention(nn.Module):
    """The operator with its projections: (B, dim, H, W) to the same, any H and W.

    ``n_win``: regions along a side; ``topk``: regions that each one sees, or FULL; ``side_dwconv``: side of the
    convolution of the values, 0 for none.
    """

    def __init__(
        self, dim: int, heads: int, n_win: int = 7, topk: int = 4, side_dwconv: int = 5, parity: Parity = "paper"
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads: got {heads}, must divide dim, {dim}")
        if topk < 1 and topk != FULL:
            raise ValueError(f"topk: got {topk}, must be 1 or more, or {FULL} for all tokens")
        if parity not in ("paper", "authors"):
            raise ValueError(f"parity: got {parity!r}, must be 'paper' or 'authors'")
        self.heads, self.n_win, self.topk, self.parity = heads, n_win, topk, parity
        self.qkv_linear = nn.Conv2d(dim, 3 * dim, 1)
        self.output_linear = nn.Conv2d(dim, dim, 1)
        self.lepe = nn.Conv2d(dim, dim, side_dwconv, padding=side_dwconv // 2, groups=dim) if side_dwconv else None

    def region(self, h: int, w: int) -> tuple[int, int]:
        """Height and width of the regions of a map, in tokens."""
        return max(1, h // self.n_win), max(1, w // self.n_win)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv_linear(x).chunk(3, 1)
        if self.topk == FULL:
            n = x.shape[2] * x.shape[3]
            seen = attend(_rows(q, self.heads), _rows(k, self.heads), _rows(v, self.heads), Dense(n, n))
            out = seen.transpose(2, 3).reshape(x.shape)
        else:
            region = self.region(*x.shape[2:])
            regions = -(-x.shape[2] // region[0]) * -(-x.shape[3] // region[1])
            out, _ = bi_level_routing_attention(
                q, k, v, self.heads, region, min(self.topk, regions), parity=self.parity
            )
        return self.output_linear(out if self.lepe is None else out + self.lepe(v))


class BiFormerBlock(nn.Module):
    """Position by a 3x3 depthwise convolution, the operator, and an MLP of three times the width; each added."""

    def __init__(
        self, dim: int, heads: int, n_win: int = 7, topk: int = 4, drop_path: float = 0.0, parity: Parity = "paper"
    ) -> None:
        super().__init__()
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1, self.norm2 = MapNorm(dim, eps=1e-6), MapNorm(dim, eps=1e-6)
        self.attn = BiLevelRoutingAttention(dim, heads, n_win, topk, parity=parity)
        self.mlp = nn.Sequential(nn.Conv2d(dim, 3 * dim, 1), nn.GELU(), nn.Conv2d(3 * dim, dim, 1))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos_embed(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


SIZES = {
    "tiny": ((64, 128, 256, 512), (2, 2, 8, 2)),
    "small": ((64, 128, 256, 512), (4, 4, 18, 4)),
    "base": ((96, 192, 384, 768), (4, 4, 18, 4)),
}
"""Channels and blocks of each stage."""


@dataclass(frozen=True)
class BiFormer:
    """The backbone, of four stages."""

    size: str = "tiny"
    """tiny, small or base."""
    n_win: int = 7
    """Regions along a side of a map."""
    topks: tuple[int, ...] = (1, 4, 16, -2)
    """Regions that each region sees, by stage; -2: all tokens, ordinary attention."""
    head_dim: int = 32
    """Channels of a head."""
    drop_path: float = 0.1
    """Rate of stochastic depth of the last block (small: 0.15, base: 0.4)."""
    parity: Literal["paper", "authors"] = "paper"
    """"authors": padded keys of cut-off regions are attended to as zeros."""

    def build(self, num_classes: int = 1000, features_only: bool = False) -> Pyramid:
        """An untrained network; with ``features_only`` it gives the maps of its stages."""
        if self.size not in SIZES:
            raise ValueError(f"size: got {self.size!r}, must be {', '.join(SIZES)}")
        return self.of(*SIZES[self.size], num_classes, features_only)

    def of(
        self, dims: tuple[int, ...], depths: tuple[int, ...], num_classes: int = 1000, features_only: bool = False
    ) -> Pyramid:
        """As ``build``, of any channels and blocks of each stage."""
        if not len(dims) == len(depths) == len(self.topks):
            raise ValueError(f"topks: got {len(self.topks)} for {len(dims)} and {len(depths)}, must be one a stage")
        stages = []
        for i, (dim, rates) in enumerate(zip(dims, drop_rates(self.drop_path, depths), strict=True)):
            heads = max(1, dim // self.head_dim)
            blocks = [BiFormerBlock(dim, heads, self.n_win, self.topks[i], rate, self.parity) for rate in rates]
            start = _smaller(dims[i - 1], dim) if i else [*_smaller(3, dim // 2), nn.GELU(), *_smaller(dim // 2, dim)]
            stages.append(nn.Sequential(*start, *blocks))
        norm = nn.BatchNorm2d(dims[-1])
        return Pyramid(stages, dims, [4 * 2**i for i in range(len(dims))], norm, num_classes, features_only)


def _smaller(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs)]


def claim(trial: AttendTrial) -> Outcome:
    """The abstract: efficient by dense products in few regions, which content chooses, not hand.

    56 x 56 tokens, 7 x 7 regions, of which each sees 4; 2 heads. What the regions hold of dense attention is counted on
    the patches of a photograph, each query and key its pixels in norm, against the region with its nearest 3.
    """
    q, k, v = torch.randn(3, 1, 64, 56, 56, generator=torch.Generator().manual_seed(trial.seed)).unbind()
    taken = trial.milliseconds(
        {
            "dense": lambda: attend(_rows(q, 2), _rows(k, 2), _rows(v, 2), Dense(3136, 3136)),
            "routed": lambda: bi_level_routing_attention(q, k, v, 2, (8, 8), 4),
        }
    )
    routed, near = _held()
    note = f"of dense attention on a photograph the routed regions hold {routed:.1%}, the nearest {near:.1%}"
    holds = taken["routed"] < taken["dense"] and routed > near
    return Outcome("milliseconds, against dense", taken["dense"], taken["routed"], holds, note)


def _held() -> tuple[float, float]:
    """Shares of dense attention among the 56 x 56 patches of a photograph: in 4 routed regions, in the nearest 4."""
    picture = torch.tensor(next(p.image for p in photos(224) if p.name == "cat")).permute(2, 0, 1).float() / 255
    x = pixel_unshuffle(picture, 4)[None]
    x = layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2)
    rows = TileOrder.of((56, 56), (8, 8)).permute(_rows(x, 1))[0, 0]
    weights = (rows @ rows.T * len(x[0]) ** -0.5).softmax(1).view(49, 64, 49, 64).sum((1, 3)) / 3136
    near = GridWindow((7, 7), 2).to_dense()[0, 0]
    index, _ = route(x, x, (8, 8), 4)
    return weights.gather(1, index[0]).sum().item(), weights[near].sum().item()
