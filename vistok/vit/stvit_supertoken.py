"""STViT: attention among super tokens, pooled from the map by a sparse association and spread back by the same one.

What: global attention is dear where a network is young and its map is large. Each pixel is associated with the 3x3
cells around it by a softmax of products; cells take in their pixels; the super tokens attend to one another; each pixel
gets back its share of them. A block adds a 3x3 depthwise convolution in front, as position, and one inside its MLP.
Source: Huang et al., arXiv 2211.11167, hhb072/STViT; parameters bear the authors' names. Where: in place of attention,
in the two early stages of a four-stage backbone; cells of one pixel (the later stages) are ordinary attention.

As released: cells beyond the edge take part in the softmax with a product of 0, so that a border pixel loses that
share; the association has no gradient. In the released qkv a head's query, key and value stand together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu
from torch.utils.flop_counter import FlopCounterMode

from vistok.catalogue.card import Card, Outcome, ViTTrial
from vistok.core.supertoken import associate

CARD = Card(
    title="Vision Transformer with Super Token Sampling (STViT)",
    kind="trained",
    site="in place of attention, in the early stages of a hierarchical backbone",
    paper="Huang et al., 2022, arXiv 2211.11167",
    repository="hhb072/STViT",
    mechanism=("similarity",),
    score="softmax of products with the 3x3 super tokens around",
    merge="mean of the pixels, weighted by their part in a super token",
    claim="Global attention in early layers learns better than a plain vision transformer of no fewer operations.",
)


class MapAttention(nn.Module):
    """Self-attention of the places of a map (B, C, h, w), with 1x1 convolutions."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool = False) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads: got {heads}, must divide dim, {dim}")
        self.heads = heads
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=qkv_bias)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3).chunk(3, 3)
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape))


class SuperTokenAttention(nn.Module):
    """(B, C, H, W) to the same, any H and W. ``cell`` (height, width) in pixels, ``n_iter`` rounds of association.

    ``refine``: the super tokens attend to one another; without it the map is pooled and spread, no more.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        cell: tuple[int, int] = (4, 4),
        n_iter: int = 1,
        refine: bool = True,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__()
        self.cell, self.n_iter = cell, n_iter
        self.stoken_refine = MapAttention(dim, heads, qkv_bias) if refine else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.cell == (1, 1):
            return self.stoken_refine(x)
        tokens, association = associate(x, self.cell, self.n_iter)
        return association.unpool(self.stoken_refine(tokens))


class ResidualDepthwise(nn.Module):
    """``x`` plus its 3x3 depthwise convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class ChannelNorm(nn.Module):
    """Layer norm over the channels of a map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvMLP(nn.Module):
    """1x1 convolution, GELU, residual 3x3 depthwise convolution, 1x1 convolution."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.act1 = nn.GELU()
        self.conv = ResidualDepthwise(hidden)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.conv(self.act1(self.fc1(x))))


class SuperTokenBlock(nn.Module):
    """Position, super token attention and MLP on a map (B, C, H, W). ``layer_scale``: what scales start at, if any."""

    def __init__(
        self,
        dim: int,
        heads: int,
        cell: tuple[int, int],
        n_iter: int = 1,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.pos_embed = ResidualDepthwise(dim)
        self.norm1 = ChannelNorm(dim)
        self.attn = SuperTokenAttention(dim, heads, cell, n_iter, qkv_bias=qkv_bias)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp2 = ConvMLP(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.gamma_1: nn.Parameter | None = None
        self.gamma_2: nn.Parameter | None = None
        if layer_scale is not None:
            self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((1, dim, 1, 1), layer_scale)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_embed(x)
        attended = self.attn(self.norm1(x))
        x = x + self.drop_path(attended if self.gamma_1 is None else self.gamma_1 * attended)
        mixed = self.mlp2(self.norm2(x))
        return x + self.drop_path(mixed if self.gamma_2 is None else self.gamma_2 * mixed)


class SuperTokenViT(nn.Module):
    """Pictures (B, 3, H, W) to logits (B, num_classes): a stem of stride 4, stages of blocks, each half as large.

    ``dims``, ``depths``, ``heads`` and ``cells`` (side of a square cell) have one entry a stage; defaults: STViT-S of
    the paper (B: 96, 192, 384, 512 / 4, 6, 14, 6 / 2, 3, 6, 8; L: 96, 192, 448, 640 / 4, 7, 19, 8 / 2, 3, 7, 10).
    ``drop_path`` rises from 0 to this rate. ``projection``: channels before the pooling.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 5, 9, 3),
        heads: Sequence[int] = (1, 2, 5, 8),
        cells: Sequence[int] = (8, 4, 1, 1),
        mlp_ratio: float = 4.0,
        drop_path: float = 0.1,
        projection: int = 1024,
    ) -> None:
        super().__init__()
        if not len(dims) == len(depths) == len(heads) == len(cells):
            lengths = tuple(map(len, (dims, depths, heads, cells)))
            raise ValueError(f"dims, depths, heads, cells: got {lengths} entries, must be one a stage each")
        half = dims[0] // 2
        widths = [(3, half, 2), (half, half, 1), (half, dims[0], 2), (dims[0], dims[0], 1)]
        self.stem = nn.Sequential(*(layer for w in widths for layer in _stem_layer(*w)))
        rates = [drop_path * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
        stages: list[nn.Module] = []
        for i, (dim, depth, head, cell) in enumerate(zip(dims, depths, heads, cells, strict=True)):
            if i:
                stages += [nn.Conv2d(dims[i - 1], dim, 3, 2, 1), nn.BatchNorm2d(dim)]
            stages += [SuperTokenBlock(dim, head, (cell, cell), 1, mlp_ratio, True, rates.pop(0)) for _ in range(depth)]
        self.stages = nn.Sequential(*stages)
        self.proj = nn.Conv2d(dims[-1], projection, 1)
        self.norm = nn.BatchNorm2d(projection)
        self.head = nn.Linear(projection, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, dims[-1], h, w): the last map, before the projection."""
        return self.stages(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(silu(self.norm(self.proj(self.forward_features(x)))).mean((2, 3)))


@dataclass(frozen=True)
class SuperTokens:
    """A backbone by stage: STViT-S by default."""

    dims: tuple[int, ...] = (64, 128, 320, 512)
    """Channels (B: 96, 192, 384, 512; L: 96, 192, 448, 640)."""
    depths: tuple[int, ...] = (3, 5, 9, 3)
    """Blocks (B: 4, 6, 14, 6; L: 4, 7, 19, 8)."""
    heads: tuple[int, ...] = (1, 2, 5, 8)
    """Heads (B: 2, 3, 6, 8; L: 2, 3, 7, 10)."""
    cells: tuple[int, ...] = (8, 4, 1, 1)
    """Sides of the cells in pixels of the stage's map; 1: ordinary attention."""
    drop_path: float = 0.1
    """Rate of the last block (B: 0.4; L: 0.6)."""
    projection: int = 1024
    """Channels before the pooling."""

    def build(self, num_classes: int = 1000) -> SuperTokenViT:
        """An untrained network."""
        shape = (self.dims, self.depths, self.heads, self.cells)
        return SuperTokenViT(num_classes, *shape, drop_path=self.drop_path, projection=self.projection)


def _stem_layer(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GELU(), nn.BatchNorm2d(outputs)]


SMALL = SuperTokens((24, 48, 96), (1, 2, 2), (1, 2, 4), (4, 2, 1), 0.0, 128)
"""What the claim trains."""


def claim(trial: ViTTrial, steps: int = 250) -> Outcome:
    """The abstract: efficient and effective global context early in a network. Both networks start untrained.

    The plain one is a timm ViT of 8 px patches; both are trained for ``steps`` steps.
    """
    vit, found, cost = trial.classifier, [], []
    size, classes = vit.patch_embed.img_size[0], vit.num_classes
    for build in (lambda: _plain(size, classes), lambda: SMALL.build(classes)):
        torch.manual_seed(trial.seed)
        model = build()
        trial.fit(model, steps, peak_lr=2e-3)
        found.append(trial.accuracy(model=model))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, size, size))
        cost.append(counter.get_total_flops())
    plain, ours = found
    note = f"{steps} steps each; {cost[1] / cost[0]:.0%} of the plain one's operations"
    return Outcome("accuracy on objects, from scratch", plain, ours, ours > plain and cost[1] <= cost[0], note)


def _plain(size: int, classes: int) -> VisionTransformer:
    return VisionTransformer(size, 8, embed_dim=96, depth=6, num_heads=4, num_classes=classes)
