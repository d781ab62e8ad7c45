"""Choices whose counts differ from picture to picture of a batch: bool masks (B, N) instead of positions (B, K).

``absorb`` and ``fold`` are the merge of PruMerge (arXiv 2403.15388) and Recoverable Compression (arXiv 2409.01179),
whose number of centres is read off the data: each centre adds up its nearest tokens, one more slot what nobody kept.
``vistok.core.merge.knn_weighted`` is the form with one number for the batch and no exchange between centres.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.core.tensors import ranking, take, upcast


def top_mask(scores: Tensor, count: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, N) bool: the ``count`` (B,) int best of each picture's ``scores`` (B, N), ties to the lower index.

    ``mask`` (B, N) bool: only these can be chosen; a picture with fewer of them than its count has them all.
    """
    order = ranking(scores, mask)
    places = torch.arange(order.shape[1], device=order.device)
    chosen = torch.zeros_like(order, dtype=torch.bool).scatter(1, order, places < count[:, None])
    return chosen if mask is None else chosen & mask


def positions(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where ``mask`` (B, N) is True: positions (B, K) int64 ascending and (B, K) bool, which of them are real.

    K is the largest count of a row; what fills up the others is False in the second tensor.
    """
    count = mask.sum(1)
    width = int(count.max()) if len(count) else 0
    order = mask.int().sort(dim=1, descending=True, stable=True).indices[:, :width]
    return order, torch.arange(width, device=mask.device) < count[:, None]


def absorb(
    x: Tensor, centres: Tensor, among: Tensor, affinity: Tensor, weight: Tensor, neighbours: int
) -> tuple[Tensor, Tensor]:
    """Each centre adds up its ``neighbours`` nearest tokens: ``c' = x_c + sum w_j x_j``, weights as they are.

    ``x`` (B, N, D); ``centres`` (B, N) bool; ``among`` (B, N) bool, True at the centres and at all that they may take
    in, other centres included (with the values that they had before). ``affinity`` (B, C, N): how near each token is to
    the c-th centre of ``positions(centres)``. ``weight`` (B, N). Ties to the lower index.

    Returns (B, N, D) at least float32, ``x`` with the centres grown, and (B, N) int64, the position of the centre of
    largest affinity that took each token in, -1 where none did.
    """
    at, real = positions(centres)
    if affinity.shape != (*at.shape, x.shape[1]):
        raise ValueError(f"affinity: got {tuple(affinity.shape)}, must be {(*at.shape, x.shape[1])}")
    wide = upcast(x)
    if not at.shape[1]:
        return wide, torch.full_like(centres, -1, dtype=torch.int64)
    every = torch.arange(x.shape[1], device=x.device)
    allowed = among.unsqueeze(1) & (every != at.unsqueeze(2)) & real.unsqueeze(2)
    affinity = upcast(affinity).masked_fill(~allowed, -torch.inf)
    near = affinity.sort(dim=2, descending=True, stable=True).indices[..., :neighbours]
    entered = torch.zeros_like(allowed).scatter(2, near, True) & allowed
    grown = take(wide, at) + torch.bmm(entered * upcast(weight).unsqueeze(1), wide)
    behind = torch.where(real, at, x.shape[1]).unsqueeze(2).expand_as(grown)  # unused rows go past the end
    values = torch.cat([wide, wide[:, :1]], 1).scatter(1, behind, grown)[:, :-1]
    owner = at.gather(1, affinity.masked_fill(~entered, -torch.inf).argmax(1))
    return values, torch.where(entered.any(1), owner, -1)


def fold(
    x: Tensor, values: Tensor, stays: Tensor, owner: Tensor, folds: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The slots that stay, and one more: at the token of largest ``weight`` of those that fold, their weighted sum.

    ``x`` (B, N, D) and its ``values`` (B, N, D) after ``absorb``; ``stays`` and ``folds`` (B, N) bool, apart; ``owner``
    (B, N) int64 as of ``absorb``; ``weight`` (B, N). Nothing folds in a picture without any: it gets no more slot.

    Returns positions (B, K) ascending and (B, K) bool, which of them are real; tokens (B, K, D) as ``values``; and
    (B, N) int64, the slot that each token ended in: its own, its owner's, the extra one where it folds, else -1.
    """
    extra = top_mask(weight, torch.ones_like(owner[:, 0]), folds)
    folded = torch.bmm((weight * folds).unsqueeze(1).to(values.dtype), x.to(values.dtype))
    values = torch.where(extra.unsqueeze(2), folded, values)
    stays = stays | extra
    places, real = positions(stays)
    slot = stays.cumsum(1) - 1
    source = torch.where(folds, (slot * extra).sum(1, keepdim=True), -1)
    source = torch.where(owner >= 0, slot.gather(1, owner.clamp_min(0)), source)
    return places, real, take(values, places), torch.where(stays, slot, source)
