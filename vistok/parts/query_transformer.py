"""Queries that read features through cross-attention: the Q-Former and its kin.

Source: BLIP-2's Q-Former (Li et al., arXiv 2301.12597), with norms before each step and not after it, as networks that
are trained from scratch have them. Used by SEED, VL-GPT, ViLex, Slot-MLLM (which puts slots in place of the
cross-attention) and GigaTok.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

Cross = Callable[[int, int, int], nn.Module]
"""(width, width of the features, heads) to a module of (queries (B, Q, width), features (B, N, C), mask) -> queries;
the module itself adds what it found to the queries. ``mask`` (B, N) bool, True at features that are there, or None."""


class CrossAttention(nn.Module):
    """Queries (B, Q, ``width``) plus what they read from features (B, N, ``features``)."""

    def __init__(self, width: int, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(features, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        q = self.query(self.norm(x)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.key_value(features).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None])
        return x + self.out(seen.transpose(1, 2).flatten(2))


class QueryBlock(nn.Module):
    """Self-attention of the queries, ``cross`` to the features (or None), MLP; each with its residual."""

    def __init__(self, width: int, heads: int, cross: nn.Module | None, causal: bool, mlp_ratio: float) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-5)
        self.causal = causal
        self.norm_self, self.norm_mlp = norm(width), norm(width)
        self.attention = Attention(width, heads, qkv_bias=True)
        self.cross = cross
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm_self(x), is_causal=self.causal)
        if self.cross is not None:
            x = self.cross(x, features, mask)
        return x + self.mlp(self.norm_mlp(x))


class QueryTransformer(nn.Module):
    """Features (B, N, ``features``) to (B, Q, ``width``): what Q queries found in them.

    ``queries``: how many are learned; 0: none, all calls bring theirs. ``causal``: query i sees queries up to i; the
    cross-attention is never causal. Every ``cross_every``-th block reads the features, the first one among them;
    ``cross`` makes what it reads with, by default ``CrossAttention``. Raises ValueError for sizes that cannot be.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        features: int,
        queries: int,
        *,
        causal: bool = False,
        cross_every: int = 1,
        cross: Cross = CrossAttention,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads: got {heads}, must divide width, {width}")
        if depth < 1 or cross_every < 1:
            raise ValueError(f"depth, cross_every: got {depth} and {cross_every}, must be 1 or more")
        self.width, self.features = width, features
        self.queries = nn.Parameter(width**-0.5 * torch.randn(queries, width)) if queries else None
        self.norm_in = nn.LayerNorm(features)
        self.blocks = nn.ModuleList(
            QueryBlock(width, heads, None if i % cross_every else cross(width, features, heads), causal, mlp_ratio)
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor, queries: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """``features`` (B, N, C); ``queries`` (B, Q, width) in place of the learned ones; ``mask`` (B, N) bool: False
        is no feature. Raises ValueError for other shapes, and where no queries are there."""
        if features.dim() != 3 or features.shape[2] != self.features:
            raise ValueError(f"features: got shape {tuple(features.shape)}, must be (B, N, {self.features})")
        if queries is None and self.queries is None:
            raise ValueError("queries: got None, must be given where none are learned")
        x = self.queries.expand(len(features), -1, -1) if queries is None and self.queries is not None else queries
        assert x is not None
        if x.dim() != 3 or x.shape[0] != len(features) or x.shape[2] != self.width:
            raise ValueError(f"queries: got shape {tuple(x.shape)}, must be ({len(features)}, Q, {self.width})")
        features = self.norm_in(features)
        for block in self.blocks:
            x = block(x, features, mask)
        return self.norm(x)
