"""What LaVIT is made of: a selector, blocks whose masks carry a gradient, codes of sets that differ in size."""

from __future__ import annotations

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from vistok.core.codes import Codes
from vistok.parts.quantize import EMAQuantizer

EPS = 1e-6


def masked_softmax(scores: Tensor, allowed: Tensor, over_all: bool = False) -> Tensor:
    """(exp(scores - max) allowed + eps / N) / (sum + eps) over the last axis, in float32; differentiable in both.

    ``allowed``: 0 or 1, broadcastable to ``scores`` (..., N). Each forbidden key keeps a weight of about eps / N, and a
    row that allows none is uniform. The maximum is of the allowed keys, or ``over_all`` as released. A forbidden key's
    exponential counts as 1 at most where it passes the gradient on.
    """
    scores = scores.float()
    seen = scores if over_all else scores.masked_fill(allowed.detach() == 0, -torch.inf)
    top = seen.detach().amax(-1, keepdim=True)
    p = (scores - top.masked_fill(top == -torch.inf, 0)).clamp_max(0).exp() * allowed
    return (p + EPS / p.shape[-1]) / (p.sum(-1, keepdim=True) + EPS)


class MaskedAttention(nn.Module):
    """Queries (B, Q, width) read ``keys`` (B, N, width) that ``allowed`` (B, 1, Q or 1, N) lets in."""

    def __init__(self, width: int, heads: int, over_all: bool) -> None:
        super().__init__()
        self.heads, self.over_all = heads, over_all
        self.query, self.key_value, self.out = (nn.Linear(width, n * width) for n in (1, 2, 1))

    def forward(self, x: Tensor, keys: Tensor, allowed: Tensor) -> Tensor:
        q = self.query(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.key_value(keys).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = masked_softmax(q @ k.transpose(2, 3) * q.shape[3] ** -0.5, allowed, self.over_all)
        return self.out((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))


class MergerBlock(nn.Module):
    """Causal attention among kept places, attention to dropped features, MLP; each with its norm and residual."""

    def __init__(self, width: int, heads: int, over_all: bool, mlp_ratio: float) -> None:
        super().__init__()
        self.norm_self, self.norm_cross, self.norm_features, self.norm_mlp = (nn.LayerNorm(width) for _ in range(4))
        self.own, self.cross = (MaskedAttention(width, heads, over_all) for _ in range(2))
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, features: Tensor, keep: Tensor) -> Tensor:
        """``x`` and ``features`` (B, N, width), ``keep`` (B, N), 0 or 1."""
        itself = torch.eye(x.shape[1], device=x.device)
        visible = torch.ones_like(itself).tril() * keep[:, None, None] * (1 - itself) + itself
        x = x + self.own(y := self.norm_self(x), y, visible)
        x = x + self.cross(self.norm_cross(x), self.norm_features(features), 1 - keep[:, None, None])
        return x + self.mlp(self.norm_mlp(x))


class Selector(nn.Module):
    """Features (B, N, ``dim``) to log-probabilities (B, N, 2) of keep and drop; half of the channels are shared."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        one, two = nn.Linear(dim, dim // 2), nn.Linear(dim // 2, dim // 4)
        self.out = nn.Sequential(one, nn.GELU(), two, nn.GELU(), last := nn.Linear(dim // 4, 2))
        # All are likelier kept at first: else an untrained one might drop all.
        nn.init.constant_(last.bias, 0.5)
        nn.init.constant_(last.bias[1:], -0.5)

    def forward(self, features: Tensor) -> Tensor:
        own, shared = self.enter(features).chunk(2, -1)
        both = torch.cat([own, shared.mean(1, keepdim=True).expand_as(own)], -1)
        return self.out(both).float().log_softmax(-1)


class RaggedQuantizer(EMAQuantizer):
    """Codes of vectors that are scaled to length 1, of a table as it is held; a vector of zeros is no token."""

    def forward(self, z: Tensor, mask: Tensor | None = None, grid: tuple[int, int] | None = None) -> Codes:
        there = z.detach().ne(0).any(-1)
        return super().forward(z, there if mask is None else there & mask, grid)
