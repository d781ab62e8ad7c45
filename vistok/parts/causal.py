"""A small causal transformer over ids: what a generator pays for a tokenizer's codes."""

from __future__ import annotations

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class CausalModel(nn.Module):
    """Ids (B, N) to logits of each from those before it and, if ``classes``, from a picture's class.

    ``codes``: ids are below it; where columns of different books follow one another, add offsets first.
    """

    def __init__(
        self, codes: int, tokens: int, width: int = 96, depth: int = 3, heads: int = 3, classes: int = 0
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads: got {heads}, must divide width, {width}")
        self.codes, self.tokens, self.classes = codes, tokens, classes
        self.embed = nn.Embedding(codes, width)
        self.start = nn.Embedding(max(classes, 1), width)
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, width))
        norm = partial(nn.LayerNorm, eps=1e-5)
        self.blocks = nn.ModuleList(Block(width, heads, 4.0, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, codes)
        for table in (self.embed, self.start):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, before: Tensor, label: Tensor | None = None) -> Tensor:
        """(B, M + 1, codes): logits of each id, and of the one that comes next, from ``before``, (B, M) int64.

        M is below ``tokens``. ``label`` (B,) int64 with ``classes``, else None; ValueError otherwise.
        """
        if before.dim() != 2 or before.shape[1] >= self.tokens:
            raise ValueError(f"before: got shape {tuple(before.shape)}, must be (B, M) with M below {self.tokens}")
        if (label is None) != (self.classes == 0):
            raise ValueError(f"label: got {label}, must be given with classes and only then; there are {self.classes}")
        which = before.new_zeros(len(before)) if label is None else label
        x = torch.cat([self.start(which)[:, None], self.embed(before)], 1)
        x = x + self.positions[: x.shape[1]]
        for block in self.blocks:
            x = block(x, is_causal=True)
        return self.head(self.norm(x))

    def loss(self, ids: Tensor, label: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of ``ids`` (B, N), in nats a token; a scalar."""
        return self.nats(ids, label).mean() / ids.shape[1]

    def nats(self, ids: Tensor, label: Tensor | None = None) -> Tensor:
        """(B,): what each row of ``ids`` (B, N) costs, the sum of their cross-entropies."""
        logits = self(ids[:, :-1], label).float()
        return cross_entropy(logits.transpose(1, 2), ids, reduction="none").sum(1)
