"""HaloNet: blocks of pixels attend to themselves and to a halo around them, one window for all pixels of a block.

What: local attention in which every pixel has a window of its own is slow on any hardware. Here the pixels of a
``block`` share the block and ``halo`` pixels around it: a little more is computed, as dense products. A strided query
samples in place of attention and pooling. Products of the query with two tables, by offset of row and of column, are
added to the logits. Source: Vaswani et al., arXiv 2103.12731; no code was released, so that timm's re-implementation
is what published weights depend on; the operator's parameters bear its names. Where: in place of the 3x3 convolutions
in the bottlenecks of a ResNet.

Around a map lies a rim of ``halo`` zeros that are attended to, without a value: they take part of a border pixel's
attention (``mask_border`` hides them). What a map lacks to whole blocks is beyond the rim, and seen by nobody. An entry
of a table belongs to the offset of a key's row in the window from the query's row in the block: no offset is entry
halo + window - 1, and the lowest ones are never used. Offsets are in pixels of the input; with a stride timm counts the
query's row in strides (``parity="authors"``). The tables enter the product itself, as more channels of query and key:
nothing of the size of the logits is added, and any executor of ``attend`` runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from timm.layers import make_divisible
from torch import Tensor, nn
from torch.nn.functional import one_hot, pad, relu

from vistok.catalogue.card import AttendTrial, Card, Outcome
from vistok.core.attention import Executor, GridWindow, Halo, attend
from vistok.parts.pyramid import Pyramid

Parity = Literal["paper", "authors"]
CARD = Card(
    title="Scaling Local Self-Attention for Parameter Efficient Visual Backbones (HaloNet)",
    kind="trained",
    site="in place of the 3x3 convolutions of a ResNet; a backbone of it",
    paper="Vaswani et al., 2021, arXiv 2103.12731",
    repository="huggingface/pytorch-image-models",
    mechanism=("transformation",),
    score="distance to the block of the query",
    select="the block of the query and the halo around it",
    claim="A window for each block of queries is faster than one for each query, though more pairs are computed.",
    departures=("offsets of strided queries are in pixels", "maps need not be made of whole blocks"),
)


def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int = 8,
    halo: int = 3,
    rel: tuple[Tensor, Tensor] | None = None,
    mask_border: bool = False,
    stride: int = 1,
    scale: float | None = None,
    scale_rel: bool = False,
    parity: Parity = "paper",
    executor: Executor = "auto",
) -> Tensor:
    """(B, heads, h, w, dv): attention of each block of ``block`` x ``block`` pixels over those and ``halo`` around.

    ``k`` (B, heads, H, W, d), ``v`` (B, heads, H, W, dv), any H and W; ``q`` (B, heads, h, w, d) of every ``stride``-th
    row and column, h = ceil(H / stride), ``stride`` dividing ``block``. ``rel``: tables by offset of rows and of
    columns, (2 * (block + 2 * halo) - 1, d) each; their products with q are scaled too if ``scale_rel``. ``scale`` is
    d ** -0.5 by default.
    """
    size = k.shape[2], k.shape[3]
    pattern = Halo(size, block, halo, not mask_border, stride)
    if q.shape[2:4] != (-(-size[0] // stride), -(-size[1] // stride)):
        raise ValueError(f"q: got {tuple(q.shape[2:4])}, must be every row and column of {size} by stride {stride}")
    bias = None
    if not mask_border:
        keys = pattern.key_shape
        beyond = keys[1] - size[1] - halo, keys[0] - size[0] - halo
        k, v = (pad(t, (0, 0, halo, beyond[0], halo, beyond[1])) for t in (k, v))
        if size != (keys[0] - 2 * halo, keys[1] - 2 * halo):
            seen = q.new_zeros(size[0] + 2 * halo, size[1] + 2 * halo)
            bias = pad(seen, (0, beyond[0] - halo, 0, beyond[1] - halo), value=-torch.inf).view(1, 1, 1, -1)
    scale = q.shape[4] ** -0.5 if scale is None else scale
    if rel is not None:
        window, start = block + 2 * halo, halo if mask_border else 0
        queries = q if scale_rel else q / scale
        by_offset = [_by_key(queries, rel[i], i + 2, block, window, stride, parity) for i in range(2)]
        q, k = torch.cat([q, *by_offset], 4), torch.cat([k, *_places(k, window, start)], 4)
    rows = q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3)
    out = attend(*rows, pattern, bias, scale, executor=executor)
    return out.unflatten(2, q.shape[2:4])


def _by_key(q: Tensor, table: Tensor, axis: int, block: int, window: int, stride: int, parity: Parity) -> Tensor:
    """(B, heads, h, w, window): products of ``q`` with ``table``, by the key's place along ``axis`` modulo ``window``.

    In a window every place modulo its length is there once, so that a key can say which it is whatever window it is in.
    """
    if table.shape != (2 * window - 1, q.shape[4]):
        raise ValueError(f"rel: got {tuple(table.shape)}, must be ({2 * window - 1}, {q.shape[4]})")
    place = torch.arange(0, q.shape[axis] * stride, stride, device=q.device)
    in_block = place % block // (stride if parity == "authors" else 1)
    in_window = (torch.arange(window, device=q.device) - (place // block * block)[:, None]) % window
    entry = in_window - in_block[:, None] + window - 1
    entry = entry[:, None] if axis == 2 else entry
    return (q @ table.T).gather(4, entry.expand(*q.shape[:4], window))


def _places(k: Tensor, window: int, start: int) -> list[Tensor]:
    """(B, heads, H, W, window) twice, one-hot: row and column of each key, from ``start`` on, modulo ``window``."""
    rows, columns = (one_hot((torch.arange(n, device=k.device) + start) % window, window) for n in k.shape[2:4])
    return [t.to(k.dtype).expand(*k.shape[:4], window) for t in (rows[:, None], columns)]


class RelativeTables(nn.Module):
    """Two tables of vectors by offset. ``std``: of what they start from."""

    def __init__(self, window: int, dim: int, std: float) -> None:
        super().__init__()
        self.height_rel, self.width_rel = (nn.Parameter(torch.randn(2 * window - 1, dim) * std) for _ in range(2))


class HaloAttn(nn.Module):
    """The operator with its projections: (B, dim, H, W) to (B, dim, H / stride, W / stride), any H and W.

    ``qk_ratio``: width of queries and keys over ``dim``, rounded to a multiple of 8. With ``avg_down``, and wherever
    ``stride`` does not divide ``block``, all pixels are queries and their outputs are averaged.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        block: int = 8,
        halo: int = 3,
        stride: int = 1,
        qk_ratio: float = 1.0,
        bias: bool = False,
        avg_down: bool = False,
        scale_rel: bool = False,
        mask_border: bool = False,
        parity: Parity = "paper",
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads: got {heads}, must divide dim, {dim}")
        if stride not in (1, 2):
            raise ValueError(f"stride: got {stride}, must be 1 or 2")
        if parity not in ("paper", "authors"):
            raise ValueError(f"parity: got {parity!r}, must be 'paper' or 'authors'")
        self.heads, self.block, self.halo = heads, block, halo
        self.scale_rel, self.mask_border, self.parity = scale_rel, mask_border, parity
        pooled = stride > 1 and (avg_down or block % stride > 0)
        self.stride = 1 if pooled else stride
        width = make_divisible(dim * qk_ratio, 8) // heads
        self.q = nn.Conv2d(dim, width * heads, 1, self.stride, bias=bias)
        self.kv = nn.Conv2d(dim, width * heads + dim, 1, bias=bias)
        self.pos_embed = RelativeTables(block + 2 * halo, width, width**-0.5)
        self.pool = nn.AvgPool2d(2, 2) if pooled else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, kv = (t.unflatten(1, (self.heads, -1)).movedim(2, 4) for t in (self.q(x), self.kv(x)))
        k, v = kv.split([q.shape[4], kv.shape[4] - q.shape[4]], 4)
        rel = self.pos_embed.height_rel, self.pos_embed.width_rel
        how = rel, self.mask_border, self.stride, None, self.scale_rel, self.parity
        out = halo_attention(q, k, v, self.block, self.halo, *how)
        return self.pool(out.movedim(4, 2).flatten(1, 2))


class Bottleneck(nn.Module):
    """A ResNet's, with ``HaloAttn`` of ``heads`` in its middle, or a 3x3 convolution where ``heads`` is 0."""

    def __init__(
        self, inputs: int, dim: int, heads: int, stride: int, ratio: float, block: int, halo: int, parity: Parity
    ) -> None:
        super().__init__()
        inner = make_divisible(dim * ratio)
        self.shortcut = nn.Identity() if inputs == dim and stride == 1 else _conv(inputs, dim, 1, stride)
        self.conv1 = nn.Sequential(_conv(inputs, inner, 1), nn.ReLU())
        mixed = [HaloAttn(inner, heads, block, halo, stride, parity=parity), nn.BatchNorm2d(inner)] if heads else []
        self.mix = nn.Sequential(*(mixed or _conv(inner, inner, 3, stride)), nn.ReLU())
        last = nn.BatchNorm2d(dim)
        nn.init.zeros_(last.weight)
        self.conv3 = nn.Sequential(nn.Conv2d(inner, dim, 1, bias=False), last)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.shortcut(x) + self.conv3(self.mix(self.conv1(x))))


def _conv(inputs: int, outputs: int, side: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=False), nn.BatchNorm2d(outputs))


@dataclass(frozen=True)
class Shape:
    """A backbone's."""

    dims: Sequence[int]
    """Channels of each stage."""
    depths: Sequence[int]
    """Blocks of each stage."""
    convs: Sequence[int]
    """How many of them, the first, are ordinary bottlenecks."""
    ratio: float
    """Channels in the middle of a block, over those of the stage."""
    halo: int
    stem: Sequence[int]
    """Channels of the convolutions before the pooling; one of 7x7, or several of 3x3."""


SIZES = {
    "h1": Shape((64, 128, 256, 512), (3, 3, 10, 3), (0, 0, 0, 0), 1.0, 3, (64,)),
    "26t": Shape((256, 512, 1024, 2048), (2, 2, 2, 2), (2, 2, 1, 0), 0.25, 2, (24, 32, 64)),
}
"""The smallest of the paper as timm has it, and timm's own mixture of convolutions and attention."""


@dataclass(frozen=True)
class HaloNet:
    """The backbone, of four stages."""

    size: str = "h1"
    """h1, or 26t with ordinary bottlenecks first."""
    block: int = 8
    """Side of the blocks of queries."""
    heads: int = 8
    """Heads of every attention."""
    parity: Literal["paper", "authors"] = "paper"
    """"authors": offsets of strided queries as in timm, which published weights depend on."""

    def build(self, num_classes: int = 1000, features_only: bool = False) -> Pyramid:
        """An untrained network; with ``features_only`` it gives the maps of its stages."""
        if self.size not in SIZES:
            raise ValueError(f"size: got {self.size!r}, must be {', '.join(SIZES)}")
        return self.of(SIZES[self.size], num_classes, features_only)

    def of(self, shape: Shape, num_classes: int = 1000, features_only: bool = False) -> Pyramid:
        """As ``build``, of any shape."""
        widths, side = [3, *shape.stem], 7 if len(shape.stem) == 1 else 3
        stem: list[nn.Module] = []
        for i in range(len(shape.stem)):
            stem += [_conv(widths[i], widths[i + 1], side, 1 if i else 2), nn.ReLU()]
        stages, inputs = [], widths[-1]
        for i, (dim, depth, convs) in enumerate(zip(shape.dims, shape.depths, shape.convs, strict=True)):
            layers: list[nn.Module] = [] if i else [*stem, nn.MaxPool2d(3, 2, 1)]
            for j in range(depth):
                heads, stride = 0 if j < convs else self.heads, 2 if i and not j else 1
                how = heads, stride, shape.ratio, self.block, shape.halo, self.parity
                layers.append(Bottleneck(inputs, dim, *how))
                inputs = dim
            stages.append(nn.Sequential(*layers))
        reductions = [4 * 2**i for i in range(len(shape.dims))]
        return Pyramid(stages, shape.dims, reductions, nn.Identity(), num_classes, features_only)


def claim(trial: AttendTrial) -> Outcome:
    """Section 2: blocks trade a little more compute for dense products. 64 x 64 pixels, 4 heads.

    Blocks of 8 with a halo of 3 see 14 x 14 keys; pixel by pixel each sees the 13 x 13 around it, computed window by
    window and in tiles, whichever is faster here.
    """
    q, k, v = torch.randn(3, 1, 4, 64, 64, 32, generator=torch.Generator().manual_seed(trial.seed)).unbind()
    single = GridWindow((64, 64), 13)
    rows = q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3)
    taken = trial.milliseconds(
        {
            "window by window": lambda: attend(*rows, single, executor="gather"),
            "in tiles": lambda: attend(*rows, single, executor="tiles"),
            "blocks": lambda: halo_attention(q, k, v, mask_border=True, executor="tiles"),
        }
    )
    each = min(taken["window by window"], taken["in tiles"])
    more = Halo((64, 64), 8, 3).pairs / single.pairs
    note = f"window by window {taken['window by window']:.1f}, in tiles {taken['in tiles']:.1f} ms; {more:.2f} x pairs"
    return Outcome("milliseconds, against a window a pixel", each, taken["blocks"], taken["blocks"] < each, note)
