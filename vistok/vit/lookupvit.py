"""LookupViT: the heavy work is done on a few compressed tokens, and the many fine ones look up what it gave.

What: two sets of tokens. The compressed ones gather from the fine ones by cross-attention, then go through an ordinary
ViT layer; the fine ones get the result back by the same products of queries and keys, turned round, and go through a
small MLP. The compressed tokens start as the fine map made smaller, so one set of weights serves any number of them,
and a number is chosen for each call. Source: Koner et al., arXiv 2407.12753; no authors' code. Where: every block.

The way back is a softmax of the turned products over the compressed tokens. The port in lucidrains/vit-pytorch has a
norm between the way back and the small MLP, without a residual: left out. Both sets are pooled, added and normed for
the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from vistok.catalogue.card import Card, Outcome, ViTTrial
from vistok.core.soft import aggregate, gather_weights, return_weights

CARD = Card(
    title="LookupViT: Compressing visual information to a limited number of tokens",
    kind="trained",
    site="every block of a vision transformer",
    paper="Koner et al., 2024, arXiv 2407.12753",
    mechanism=("attention",),
    score="cross-attention of the compressed to the fine tokens",
    merge="the fine map made smaller, which gathers by attention in every block",
    claim="One trained model serves any number of compressed tokens, trading accuracy for computation.",
)


class LookupBlock(nn.Module):
    """Fine tokens (B, N, C) and compressed ones (B, M, C) to the same; any N and M.

    ``mlp_ratio`` is that of the ordinary layer on the compressed tokens, ``lookup_ratio`` that of the small MLP on the
    fine ones: hidden over C.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0, lookup_ratio: float = 0.5) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads: got {heads}, must divide dim, {dim}")
        self.heads = heads
        self.norm_fine, self.norm_compressed, self.norm_mlp = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.gathered = nn.Linear(dim, dim)
        self.block = Block(dim, heads, mlp_ratio, qkv_bias=True)
        self.value = nn.Linear(dim, dim)
        self.returned = nn.Linear(dim, dim)
        hidden = max(1, int(dim * lookup_ratio))
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def products(self, fine: Tensor, compressed: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, M, N) of queries of the compressed and keys of the fine tokens, and the values (B, H, N, d)."""
        q = self._heads(self.q(self.norm_compressed(compressed)))
        k, v = (self._heads(t) for t in self.kv(self.norm_fine(fine)).chunk(2, 2))
        return q @ k.transpose(2, 3) * q.shape[3] ** -0.5, v

    def forward(self, fine: Tensor, compressed: Tensor) -> tuple[Tensor, Tensor]:
        logits, v = self.products(fine, compressed)
        gathered = aggregate(v, gather_weights(logits))
        compressed = self.block(compressed + self.gathered(gathered.transpose(1, 2).flatten(2)))
        back = aggregate(self._heads(self.value(compressed)), return_weights(logits))
        fine = fine + self.returned(back.transpose(1, 2).flatten(2))
        return fine + self.mlp(self.norm_mlp(fine)), compressed

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class LookupViT(nn.Module):
    """Pictures (B, 3, H, W) to logits, with any number of compressed tokens.

    ``image`` and ``patch``: sides in pixels. ``sizes``: sides of the compressed maps that training draws from; the
    middle one serves where a call says none.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        image: int = 224,
        patch: int = 16,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        sizes: Sequence[int] = (3, 5, 7, 10),
        lookup_ratio: float = 0.5,
    ) -> None:
        super().__init__()
        if image % patch:
            raise ValueError(f"patch: got {patch}, must divide image, {image}")
        side = image // patch
        if not sizes or not all(1 <= size <= side for size in sizes):
            raise ValueError(f"sizes: got {tuple(sizes)}, must be between 1 and the {side} patches of a side")
        self.sizes = tuple(sizes)
        self.patch_embed = nn.Conv2d(3, dim, patch, patch)
        self.pos_embed = nn.Parameter(torch.randn(1, dim, side, side) * 0.02)
        self.blocks = nn.ModuleList(LookupBlock(dim, heads, 4.0, lookup_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)

    def draw(self, rng: torch.Generator | None = None) -> tuple[int, int]:
        """One of ``sizes``, for a training step."""
        size = self.sizes[int(torch.randint(len(self.sizes), (1,), generator=rng))]
        return size, size

    def forward_features(self, pictures: Tensor, m: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """Fine (B, N, C) and compressed tokens (B, m[0] m[1], C) after the last block."""
        m = (self.sizes[len(self.sizes) // 2],) * 2 if m is None else m
        x = self.patch_embed(pictures) + self.pos_embed
        fine, compressed = (t.flatten(2).transpose(1, 2) for t in (x, compress(x, m)))
        for block in self.blocks:
            fine, compressed = block(fine, compressed)
        return fine, compressed

    def forward(self, pictures: Tensor, m: tuple[int, int] | None = None) -> Tensor:
        fine, compressed = self.forward_features(pictures, m)
        return self.head(self.norm(fine.mean(1) + compressed.mean(1)))


@dataclass(frozen=True)
class Lookup:
    """A network by its size: that of ViT-B by default."""

    image: int = 224
    """Side of a picture in pixels."""
    patch: int = 16
    """Side of a patch in pixels."""
    dim: int = 768
    """Channels."""
    depth: int = 12
    """Blocks."""
    heads: int = 12
    """Heads of every attention."""
    sizes: tuple[int, ...] = (3, 5, 7, 10)
    """Sides of the compressed maps that training draws from."""
    lookup_ratio: float = 0.5
    """Hidden units of the small MLP over channels."""

    def build(self, num_classes: int = 1000) -> LookupViT:
        """An untrained network."""
        shape = (self.image, self.patch, self.dim, self.depth, self.heads, self.sizes, self.lookup_ratio)
        return LookupViT(num_classes, *shape)


def compress(x: Tensor, m: tuple[int, int]) -> Tensor:
    """The map ``x`` (B, C, h, w) made smaller to (B, C, *m), bilinear and antialiased; itself if it has that size."""
    if m == tuple(x.shape[2:]):
        return x
    if not (1 <= m[0] <= x.shape[2] and 1 <= m[1] <= x.shape[3]):
        raise ValueError(f"m: got {m}, must be between (1, 1) and the map's {tuple(x.shape[2:])}")
    return interpolate(x, m, mode="bilinear", antialias=True, align_corners=False)


def claim(trial: ViTTrial, steps: int = 200) -> Outcome:
    """The abstract: one model trained with maps of many sizes, and a size chosen at test.

    It starts from the zoo's classifier (``warm_start``), is trained for ``steps`` steps and asked with 4, 9 and 36
    compressed tokens of 144. Holds if accuracy rises with their number, by 2 points at least in all.
    """
    vit = trial.classifier
    side = vit.patch_embed.grid_size[0]
    sizes = (2, 3, side // 2)
    torch.manual_seed(trial.seed)
    shape = (side * vit.patch_embed.patch_size[0], vit.patch_embed.patch_size[0], vit.embed_dim, len(vit.blocks))
    model = Lookup(*shape, vit.blocks[0].attn.num_heads, sizes).build(vit.num_classes)
    warm_start(model, vit)
    rng = torch.Generator().manual_seed(trial.seed)

    def loss(model: LookupViT, batch: Any) -> tuple[Tensor, Tensor]:
        pixels = batch.pixels
        logits = model(pixels, model.draw(rng)).float()
        return cross_entropy(logits, batch.label), (logits.argmax(1) == batch.label).float().mean()

    trial.fit(model, steps, loss=loss, peak_lr=1e-3)
    found = [trial.accuracy(model=_Fixed(model, (size, size))) for size in sizes]
    told = ", ".join(f"{size * size} tokens: {value:.3f}" for size, value in zip(sizes, found, strict=True))
    holds = found == sorted(found) and found[-1] >= found[0] + 0.02
    return Outcome("accuracy, most against fewest compressed tokens", found[0], found[-1], holds, told)


def warm_start(model: LookupViT, vit: Any) -> None:
    """Start from a timm ViT of the same shape: patches, positions, blocks (of the compressed tokens), norm and head.

    What is new begins at nothing, so that the network first does what ``vit`` would on the smaller map, whose class
    token it has not.
    """
    positions = vit.pos_embed[:, -vit.patch_embed.num_patches :]
    blocks: list[Any] = list(model.blocks)
    with torch.no_grad():
        model.patch_embed.load_state_dict(vit.patch_embed.proj.state_dict())
        model.pos_embed.copy_(positions.transpose(1, 2).view_as(model.pos_embed))
        model.norm.load_state_dict(vit.norm.state_dict())
        model.head.load_state_dict(vit.head.state_dict())
        for block, theirs in zip(blocks, vit.blocks, strict=True):
            block.block.load_state_dict(theirs.state_dict())
            for new in (block.gathered, block.returned, block.mlp[2]):
                new.weight.zero_()
                new.bias.zero_()


class _Fixed(nn.Module):
    """The network with one number of compressed tokens."""

    def __init__(self, model: LookupViT, m: tuple[int, int]) -> None:
        super().__init__()
        self.model, self.m = model, m

    def forward(self, pictures: Tensor) -> Tensor:
        return self.model(pictures, self.m)
