"""STViT: the tokens of the picture are replaced by a few semantic ones, and made again from them where a task asks.

What: after a few ordinary blocks each window is max-pooled to a few centres, which attend to a neighbourhood a little
larger than their window, then, together with learned global queries, to all tokens. The blocks that follow run on these
centres alone. STViT-R makes the map again: its tokens attend to the centres; such units follow one another. Source:
Chang et al., CVPR 2023, changsn/STViT-R; parameters bear the authors' names. Where: in the middle of a ViT.

As released there is no shortcut from the pooled centres, whose branch starts at a scale of 1e-5: a network must be
trained with it. The released code cuts 10x10 neighbourhoods at a stride of 4, right for 14x14 tokens in 7x7 windows;
here the neighbourhoods are spread evenly over any map of whole windows, which is the same there.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from timm.layers import Mlp
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool2d, scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from vistok.catalogue.card import Card, Outcome, ViTTrial

CARD = Card(
    title="Making Vision Transformers Efficient from A Token Sparsification View (STViT, STViT-R)",
    kind="trained",
    site="in the middle of a vision transformer, patch tokens only",
    paper="Chang et al., CVPR 2023",
    repository="changsn/STViT-R",
    mechanism=("attention", "transformation"),
    score="attention of the centres of a window to its neighbourhood, then to all tokens",
    merge="max-pooled centres, made anew by attention",
    claim="16 semantic tokens give the same accuracy with nearly 60% fewer operations.",
    departures=("neighbourhoods for any map of whole windows, the released ones at 14 x 14",),
)


class CrossAttention(nn.Module):
    """(B, Q, C) queries attend to (B, M, C)."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads: got {heads}, must divide dim, {dim}")
        self.heads = heads
        self.q = nn.Linear(dim, dim, qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(y).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    """Attention of ``x`` (B, Q, C) to ``y`` (B, M, C) and an MLP, each scaled by channel from ``layer_scale``.

    One norm for queries and keys. Without ``shortcut`` the first residual is left out.
    """

    def __init__(
        self, dim: int, heads: int, mlp_ratio: float = 4.0, layer_scale: float = 1e-5, shortcut: bool = True
    ) -> None:
        super().__init__()
        self.shortcut = shortcut
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.attn = CrossAttention(dim, heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.layer_scale_1, self.layer_scale_2 = (nn.Parameter(torch.full((dim,), layer_scale)) for _ in range(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        attended = self.layer_scale_1 * self.attn(self.norm1(x), self.norm1(y))
        x = x + attended if self.shortcut else attended
        return x + self.layer_scale_2 * self.mlp(self.norm2(x))


class SemanticTokens(nn.Module):
    """N = h w tokens (B, N, C) to M = samples^2 a window (B, M, C), in raster order of the whole map of centres.

    ``grid`` (h, w) of the tokens, of whole windows of ``window`` x ``window``; ``neighbourhood``: side of what the
    centres of a window see in the first layer. ``queries``: whether the second layer adds learned global queries.
    ValueError for a grid that is not of whole windows.
    """

    around: Tensor
    """(windows, side^2) int64: the tokens that each window sees."""

    def __init__(
        self,
        dim: int,
        heads: int,
        grid: tuple[int, int] = (14, 14),
        window: int = 7,
        samples: int = 3,
        neighbourhood: int = 10,
        mlp_ratio: float = 4.0,
        shortcut: bool = False,
        queries: bool = True,
        layer_scale: float = 1e-5,
    ) -> None:
        super().__init__()
        if grid[0] % window or grid[1] % window or window < 1:
            raise ValueError(f"window: got {window}, must divide both sides of the grid, {grid}")
        if not 1 <= samples <= window <= neighbourhood:
            raise ValueError(
                f"samples, neighbourhood: got {samples}, {neighbourhood}, must be at most and at least window, {window}"
            )
        self.window, self.samples, self.grid = window, samples, grid
        self.windows = grid[0] // window, grid[1] // window
        self.num_tokens = samples**2 * self.windows[0] * self.windows[1]
        self.generate = CrossBlock(dim, heads, mlp_ratio, layer_scale, shortcut)
        self.globally = CrossBlock(dim, heads, mlp_ratio, layer_scale)
        self.queries = nn.Parameter(torch.randn(1, self.num_tokens, dim) * 0.02) if queries else None
        self.register_buffer("around", neighbourhoods(grid, window, neighbourhood), persistent=False)

    def centres(self, x: Tensor) -> Tensor:
        """(B, windows, samples^2, C): each window of ``x`` (B, N, C), max-pooled."""
        b, n, c = x.shape
        if n != self.grid[0] * self.grid[1]:
            raise ValueError(f"x: got {n} tokens, must be the {self.grid[0]} x {self.grid[1]} of the grid")
        (down, across), w = self.windows, self.window
        cut = x.view(b, down, w, across, w, c).permute(0, 1, 3, 5, 2, 4).flatten(0, 2)
        return adaptive_max_pool2d(cut, self.samples).view(b, down * across, c, -1).transpose(2, 3)

    def local(self, x: Tensor) -> Tensor:
        """(B, M, C): the first layer, each window's centres over themselves and the tokens around the window."""
        centres = self.centres(x)
        b, windows, s2, c = centres.shape
        seen = torch.cat([centres, x[:, self.around.flatten()].view(b, windows, -1, c)], 2)
        made = self.generate(centres.flatten(0, 1), seen.flatten(0, 1))
        return self._raster(made.view(b, windows, s2, c))

    def forward(self, x: Tensor) -> Tensor:
        centres = self.local(x)
        queries = centres if self.queries is None else centres + self.queries
        return self.globally(queries, torch.cat([centres, x], 1))

    def _raster(self, tokens: Tensor) -> Tensor:
        """Window after window (B, windows, samples^2, C) to rows of the whole map (B, M, C)."""
        b, _, _, c = tokens.shape
        (down, across), s = self.windows, self.samples
        return tokens.view(b, down, across, s, s, c).transpose(2, 3).reshape(b, self.num_tokens, c)


class Recover(CrossBlock):
    """The map again: tokens ``x`` (B, N, C) attend to semantic tokens (B, M, C). All scales 0 leave ``x`` as it is."""


class Dumbbell(nn.Module):
    """A unit of STViT-R, six layers: a Swin block, two that make semantic tokens, two on these alone, and recovery."""

    def __init__(
        self,
        dim: int,
        heads: int,
        grid: tuple[int, int] = (14, 14),
        window: int = 7,
        samples: int = 3,
        queries: bool = True,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.local = SwinTransformerBlock(dim, grid, heads, window_size=window, mlp_ratio=mlp_ratio)
        neighbourhood = window + window // 2
        self.tokens = SemanticTokens(dim, heads, grid, window, samples, neighbourhood, mlp_ratio, queries=queries)
        self.blocks = nn.Sequential(*(Block(dim, heads, mlp_ratio, qkv_bias=True) for _ in range(2)))
        self.recover = Recover(dim, heads, mlp_ratio)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map (B, N, C) and the semantic tokens (B, M, C) that it was made again from."""
        x = self.local(x.unflatten(1, self.grid)).flatten(1, 2)
        semantic = self.blocks(self.tokens(x))
        return self.recover(x, semantic), semantic


class SemanticViT(nn.Module):
    """A copy of a timm ViT that goes on with semantic tokens after its first ``early`` blocks.

    Two blocks are replaced by those that make the tokens. Class and other prefix tokens go past them. The logits are
    read from the class token, or where there is none from the mean, by the model's own head.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        early: int = 4,
        window: int = 7,
        samples: int = 2,
        shortcut: bool = False,
        layer_scale: float = 1e-5,
    ) -> None:
        super().__init__()
        depth = len(vit.blocks)
        if not 0 <= early <= depth - 2:
            raise ValueError(f"early: got {early}, must be between 0 and {depth - 2}, two less than the blocks")
        self.vit = copy.deepcopy(vit)
        del self.vit.blocks[early : early + 2]
        self.early_blocks = early
        heads, grid = vit.blocks[0].attn.num_heads, vit.patch_embed.grid_size
        near = window + window // 2
        self.tokens = SemanticTokens(
            vit.embed_dim, heads, grid, window, samples, near, shortcut=shortcut, layer_scale=layer_scale
        )

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        vit, prefix = self.vit, self.vit.num_prefix_tokens
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(pictures))))
        x = vit.blocks[: self.early_blocks](x)
        x = torch.cat([x[:, :prefix], self.tokens(x[:, prefix:])], 1)
        return vit.forward_head(vit.norm(vit.blocks[self.early_blocks :](x)))


@dataclass(frozen=True)
class SemanticTokenViT:
    """Where semantic tokens are made in a ViT, and how many of them."""

    early: int = 4
    """Blocks before them."""
    window: int = 7
    """Side of a window in tokens; the map must be of whole ones."""
    samples: int = 2
    """Centres a side of each window: 16 in all for the 14 x 14 tokens of DeiT."""
    shortcut: bool = False
    """Whether the pooled centres go on beside their attention; without, the network must learn its first steps anew."""
    layer_scale: float = 1e-5
    """What the scales of the new layers start at."""

    def build(self, vit: VisionTransformer) -> SemanticViT:
        """A copy of ``vit`` with semantic tokens in it."""
        return SemanticViT(vit, self.early, self.window, self.samples, self.shortcut, self.layer_scale)


def neighbourhoods(grid: tuple[int, int], window: int, side: int) -> Tensor:
    """(windows, side^2) int64: the tokens of ``grid`` (h, w) that each window sees, in raster order.

    The neighbourhoods are spread evenly, the first at one edge and the last at the other, and hold their window. A side
    longer than the map's is the map's.
    """
    spans = []
    for length in grid:
        count, near = length // window, min(side, length)
        starts = [i * (length - near) // max(count - 1, 1) for i in range(count)]
        spans.append(torch.tensor([[start + j for j in range(near)] for start in starts]))
    rows, columns = spans
    index = rows[:, None, :, None] * grid[1] + columns[None, :, None, :]
    return index.flatten(2).flatten(0, 1)


def claim(trial: ViTTrial, steps: int = 250) -> Outcome:
    """The abstract, of DeiT. A copy of the zoo's classifier goes on with 16 tokens and is trained for ``steps`` steps.

    It keeps the shortcut and starts at larger scales: so short a training continues a network and builds none.
    """
    vit = trial.classifier
    side = vit.patch_embed.grid_size[0]
    torch.manual_seed(trial.seed)
    system = SemanticTokenViT(window=side // 2, shortcut=True, layer_scale=0.1)
    model = system.build(vit)
    trial.fit(model, steps, peak_lr=5e-4)
    whole, ours = trial.accuracy(), trial.accuracy(model=model)
    size = vit.patch_embed.img_size[0]
    less = 1 - operations(model, size) / operations(vit, size)
    note = f"{model.tokens.num_tokens} of {side * side} tokens, {less:.0%} fewer operations, {steps} steps"
    return Outcome("accuracy with 16 semantic tokens", whole, ours, ours >= whole - 0.01 and less >= 0.5, note)


def operations(model: nn.Module, size: int) -> int:
    """Floating-point operations for one square picture of ``size`` pixels a side, as torch counts them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size))
    return counter.get_total_flops()
