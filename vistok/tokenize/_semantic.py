"""Ming-UniVision's decoders: latents to semantic features, one after another, and features to pixels."""

from __future__ import annotations

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from vistok.parts.diffusion_transformer import grid_sinusoids, sinusoids, unpatch

Past = list[tuple[Tensor, Tensor]]
"""Keys and values (B, heads, M, width / heads) of each block."""


class SemanticDecoder(nn.Module):
    """Latents (B, M, ``dim``) to features (B, M, width); causal, so that it goes on where its cache ends."""

    def __init__(self, dim: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(_CausalBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, latents: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        """The features, and the cache with these tokens in it. Without ``past`` the sequence begins."""
        x = self.embed(latents)
        begun = past[0][0].shape[2] if past else 0
        places = torch.arange(begun, begun + x.shape[1], device=x.device)
        x = x + sinusoids(places, x.shape[2] // 2 * 2).to(x.dtype)
        cache: Past = []
        for number, block in enumerate(self.blocks):
            x, kept = block(x, past[number] if past else None)
            cache.append(kept)
        return self.norm(x), cache


class _CausalBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.mlp = Attention(width, heads, qkv_bias=True), Mlp(width, 4 * width)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        own = self.attention
        q, k, v = own.qkv(self.norm1(x)).unflatten(2, (3, own.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        n, m = q.shape[2], k.shape[2]
        seen = torch.ones(n, m, dtype=torch.bool, device=x.device).tril(m - n)
        x = x + own.proj(scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x)), (k, v)


class PixelDecoder(nn.Module):
    """Features (B, h * w, width), by way of ``finer`` ** 2 tokens each, to pictures (B, 3, H, W) around [-1, 1]."""

    def __init__(self, width: int, depth: int, heads: int, patch: int, finer: int) -> None:
        super().__init__()
        self.patch, self.finer = patch // finer, finer
        self.split = nn.Linear(width, finer**2 * width)
        self.blocks = nn.ModuleList(Block(width, heads, 4.0, qkv_bias=True) for _ in range(depth))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * self.patch**2)

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        x = unpatch(self.split(features), size, self.finer)
        fine = x.shape[2], x.shape[3]
        x = x.flatten(2).transpose(1, 2)
        x = x + grid_sinusoids(fine, x.shape[2], x.device).to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return unpatch(self.out(self.norm(x)), fine, self.patch)
