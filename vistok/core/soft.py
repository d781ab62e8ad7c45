"""Soft aggregation: K slots are weighted means of N tokens, and the way back from the slots to the tokens.

    slots = weights (B, K, N) @ x (B, N, C)

What SiT (arXiv 2111.12624), PatchMerger, STViT's attention, LookupViT's gather and every learned resampler share. They
differ in where the logits come from. The weights are a softmax over the tokens, so that a slot is a convex combination
of them. There are two ways back: the same weights read the other way and normalised anew (``unpool``), or a softmax of
the same logits over the slots (``return_weights``, LookupViT). Dimensions may stand between B and the last two, such as
attention heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.core.tensors import upcast


def gather_weights(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, ..., K, N): softmax of ``logits`` over the N tokens, in float32 at least.

    Tokens that ``mask`` (B, N) bool marks False get 0; where no token is left a row is 0 throughout.
    """
    if mask is None:
        return upcast(logits).softmax(-1)
    seen = _spread_mask(mask, logits, -1)
    weights = upcast(logits).masked_fill(~seen, torch.finfo(torch.float32).min).softmax(-1)
    return weights.masked_fill(~seen, 0)


def return_weights(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, ..., N, K): softmax over the K slots of the transposed ``logits`` (B, ..., K, N), in float32 at least.

    What goes back to a token that ``mask`` (B, N) bool marks False is 0.
    """
    weights = upcast(logits).transpose(-1, -2).softmax(-1)
    return weights if mask is None else weights.masked_fill(~_spread_mask(mask, weights, -2), 0)


def aggregate(x: Tensor, weights: Tensor) -> Tensor:
    """(B, ..., K, C) slots of ``x`` (B, ..., N, C) by ``weights`` (B, ..., K, N), in the dtype of ``x``.

    ``aggregate(slots, return_weights(logits))`` is the way back. ValueError where the tokens do not match.
    """
    if weights.shape[-1] != x.shape[-2]:
        raise ValueError(f"weights: got columns for {weights.shape[-1]} tokens, must be the {x.shape[-2]} of x")
    return weights.to(x.dtype) @ x


def unpool(slots: Tensor, weights: Tensor) -> Tensor:
    """(B, ..., N, C): each token gets the mean of ``slots`` (B, ..., K, C), weighted by its part in each.

    ``weights`` (B, ..., K, N) are those of ``aggregate``, 0 or more; a token with no part in any slot gets 0. Equal
    slots come back as they are. ValueError where the slots do not match.
    """
    if weights.shape[-2] != slots.shape[-2]:
        raise ValueError(f"weights: got rows for {weights.shape[-2]} slots, must be the {slots.shape[-2]} of slots")
    back = upcast(weights).transpose(-1, -2)
    total = back.sum(-1, keepdim=True)
    return aggregate(slots, torch.where(total > 0, back / torch.where(total > 0, total, 1), 0))


def _spread_mask(mask: Tensor, like: Tensor, dim: int) -> Tensor:
    """``mask`` (B, N), shaped to broadcast with ``like`` (B, ..., _, _), N at ``dim``."""
    if mask.shape != (like.shape[0], like.shape[dim]):
        raise ValueError(f"mask: got {tuple(mask.shape)}, must be {(like.shape[0], like.shape[dim])}, one a token")
    shape = [1] * like.dim()
    shape[0], shape[dim] = mask.shape
    return mask.view(shape)
