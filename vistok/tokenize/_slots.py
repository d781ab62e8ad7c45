"""Slot attention in the place of cross-attention (Slot-MLLM), and how well slots part a scene into its objects."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn.functional import one_hot

from vistok.parts.query_transformer import CrossAttention
from vistok.world import derive_seed, make

Mode = Literal["morph", "gru"]
EPSILON = 1e-4


class SlotCrossAttention(nn.Module):
    """Slots (B, S, ``width``) that compete for features (B, N, ``features``); a ``Cross`` of the query transformer.

    "morph": at each feature and head a softmax of q k / sqrt(head width) over the slots; what a slot got, divided by
    its sum over the features plus 1, weights the values; one pass, added to the slots. The 1 shrinks slots that got
    little: intended. "gru": keys scaled by S^-1/2 only, one softmax over heads and slots, plus 1e-4, divided by its sum
    over the features; a GRU in float32 takes the values up, an MLP with its residual follows; ``iterations`` times.

    A mask of the features works behind the softmax. ``legacy``: it is added to the scores, as released, and is without
    effect: it is the same for all slots, so that the softmax cancels it.
    """

    def __init__(
        self,
        width: int,
        features: int,
        heads: int,
        mode: Mode = "morph",
        iterations: int = 1,
        legacy: bool = False,
    ) -> None:
        super().__init__()
        if mode not in ("morph", "gru"):
            raise ValueError(f"mode: got {mode!r}, must be 'morph' or 'gru'")
        if iterations < 1 or (mode == "morph" and iterations > 1):
            raise ValueError(f"iterations: got {iterations}, must be 1 for 'morph', 1 or more for 'gru'")
        self.heads, self.mode, self.iterations, self.legacy = heads, mode, iterations, legacy
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (
            nn.Linear(width, width),
            nn.Linear(features, width),
            nn.Linear(features, width),
        )
        if mode == "morph":
            self.out = nn.Linear(width, width)
        else:
            self.gru = nn.GRUCell(width, width)
            self.norm_mlp, self.mlp = nn.LayerNorm(width), Mlp(width, 4 * width)

    def shares(self, x: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, H, S, N): how each feature is shared among the slots ("morph"), or among heads and slots ("gru")."""
        q, k = self._split(self.query(self.norm(x))), self._split(self.key(features))
        scores = q @ k.transpose(2, 3) * (q.shape[3] if self.mode == "morph" else x.shape[1]) ** -0.5
        if mask is not None and self.legacy:
            scores = scores + torch.where(mask, 0.0, -1e4)[:, None, None].to(scores.dtype)
        if self.mode == "morph":
            found = scores.softmax(2)
        else:
            found = scores.flatten(1, 2).softmax(1).view_as(scores) + EPSILON
        return found if mask is None or self.legacy else found * mask[:, None, None]

    def weights(self, x: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, H, S, N): the weights of the values."""
        shares = self.shares(x, features, mask)
        return shares / (shares.sum(3, keepdim=True) + (1.0 if self.mode == "morph" else 0.0))

    def forward(self, x: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        values = self._split(self.value(features))
        for _ in range(self.iterations):
            found = (self.weights(x, features, mask) @ values).transpose(1, 2).flatten(2)
            if self.mode == "morph":
                return x + self.out(found)
            taken = torch.gru_cell(
                found.flatten(0, 1).float(),
                x.flatten(0, 1).float(),
                *(p.float() for p in (self.gru.weight_ih, self.gru.weight_hh, self.gru.bias_ih, self.gru.bias_hh)),
            )
            x = taken.view_as(x).to(x.dtype)
            x = x + self.mlp(self.norm_mlp(x))
        return x

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


@torch.no_grad()
def owners(reader: Any, features: Tensor) -> Tensor:
    """(B, N) int64: the query of a ``QueryTransformer`` that each feature (B, N, C) belongs to at its last reading.

    The one with the largest weight in what it reads, mean over heads, of slots and of plain queries alike. The shares
    of slots before their second normalisation would not do: one slot may have the largest nearly everywhere.
    """
    seen: list[Tensor] = []

    def keep(module: Any, inputs: Any) -> None:
        x, told, mask = inputs
        if isinstance(module, CrossAttention):
            q = module.query(module.norm(x)).unflatten(2, (module.heads, -1)).transpose(1, 2)
            k = module.key_value(told).unflatten(2, (2, module.heads, -1)).permute(2, 0, 3, 1, 4)[0]
            weights = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(3)
        else:
            weights = module.weights(x, told, mask)
        seen.append(weights.mean(1).argmax(1))

    last = [block.cross for block in reader.blocks if block.cross is not None][-1]
    hook = last.register_forward_pre_hook(keep)
    try:
        reader(features)
    finally:
        hook.remove()
    return seen[0]


def adjusted_rand(truth: Tensor, found: Tensor, counted: Tensor) -> Tensor:
    """(B,) float64: the adjusted Rand index of two partitions (B, P) int64 of the ``counted`` places (B, P) bool.

    1: the same but for names, 0: what chance gives; NaN where neither partition can be told from chance (one part).
    """

    def pairs(n: Tensor) -> Tensor:
        return n * (n - 1) / 2

    one = one_hot(truth).double() * counted[..., None]
    both = one.transpose(1, 2) @ one_hot(found).double()
    a, b = pairs(both.sum(2)).sum(1), pairs(both.sum(1)).sum(1)
    expected = a * b / pairs(counted.sum(1).double())
    most = (a + b) / 2
    return (pairs(both).sum((1, 2)) - expected) / (most - expected)


def scenes(count: int, split: str, seed: int, size: int = 96) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, size, size) in [0, 1] of scenes, and the object at each pixel, (B, size, size) int64, 0: none."""
    pictures = [make("scenes", derive_seed(seed, i, split), size, questions=0) for i in range(count)]
    images = torch.from_numpy(np.stack([p.image for p in pictures])).permute(0, 3, 1, 2).float() / 255
    objects = torch.zeros(count, size, size, dtype=torch.int64)
    for truth, picture in zip(objects, pictures, strict=True):
        for number, thing in enumerate(picture.things, 1):
            truth[torch.from_numpy(thing.mask.copy())] = number
    return images, objects
