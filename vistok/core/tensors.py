"""What the other modules and most systems use: rows by index, precision, argument checks, rankings, cosine products."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding, normalize

PANEL = 96
"""Rows of a panel of the symmetric Gram matrix (measured best of 48 to 288 at N = 576)."""


def upcast(x: Tensor) -> Tensor:
    """float32 for half precision and integers, float32 and float64 as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length 1 (zero rows stay zero), at least in float32."""
    return normalize(upcast(x), dim=-1)


def length(x: Tensor) -> Tensor:
    """Euclidean length of each row, at least in float32."""
    norm: Tensor = torch.linalg.vector_norm(upcast(x), dim=-1)
    return norm


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (B, K) int64 of ``x`` (B, N) or (B, N, D): (B, K) or (B, K, D)."""
    if x.dim() == 2:
        return x.gather(1, index)
    if not x.is_floating_point():
        return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    return embedding(flat_rows(index, x.shape[1]), x.flatten(0, 1))  # whole rows: several times faster than gather


def flat_rows(index: Tensor, n: int) -> Tensor:
    """``index`` (B, K) int64 into pictures of ``n`` rows, as an index into all rows, picture after picture."""
    if len(index) == 1:  # what is left is small operations, which count in a single picture
        return index
    return index + n * torch.arange(len(index), device=index.device)[:, None]


def check_k(k: int, n: int, mask: Tensor | None = None, name: str = "k") -> None:
    """Raise ValueError unless every picture has ``k`` real tokens to choose from."""
    if not 0 <= k <= n:
        raise ValueError(f"{name}: got {k}, must be between 0 and the {n} tokens of a picture")
    if mask is not None and k:
        real = mask.sum(1)
        if bool((real < k).any()):
            picture = int(real.argmin())
            raise ValueError(f"{name}: got {k}, but picture {picture} has only {int(real[picture])} unmasked tokens")


def ranking(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, N) positions by falling score, ties by lower index, padded tokens last whatever their score."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    if mask is None:
        return order
    return order.gather(1, mask.gather(1, order).int().sort(dim=1, descending=True, stable=True).indices)


def gram(x: Tensor) -> Tensor:
    """``x @ x^T`` (B, N, N) of ``x`` (B, N, D), exactly symmetric.

    On a CPU only panels on and above the diagonal are computed, which takes about 2/3 of the time of a full product.
    """
    if x.device.type != "cpu" or (x.requires_grad and torch.is_grad_enabled()):
        out = torch.bmm(x, x.transpose(1, 2))
        return (out + out.transpose(1, 2)) / 2
    b, n, _ = x.shape
    out = x.new_empty(b, n, n)
    other = x.transpose(1, 2)
    for i in range(0, n, PANEL):
        j = min(i + PANEL, n)
        torch.bmm(x[:, i:j], other[:, :, i:], out=out[:, i:j, i:])
        corner = out[:, i:j, i:j]
        corner.copy_(torch.triu(corner) + torch.triu(corner, 1).transpose(1, 2))
        out[:, j:, i:j] = out[:, i:j, j:].transpose(1, 2)
    return out
