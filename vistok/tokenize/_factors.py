"""FAR, FQGAN's generator: a causal model of positions, each with an id in several books, one drawn after the other."""

from __future__ import annotations

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


def _blocks(width: int, depth: int, heads: int) -> nn.ModuleList:
    norm = partial(nn.LayerNorm, eps=1e-5)
    return nn.ModuleList(Block(width, heads, 4.0, qkv_bias=True, norm_layer=norm) for _ in range(depth))


class FactorHead(nn.Module):
    """Logits of a position's ids: of the first from its context, of each further one from the ids before it as well.

    A small causal transformer over [context, first id, second id, ...]; so it costs ``books`` times ``codes`` logits
    and not ``codes`` to the power of ``books``.
    """

    def __init__(self, codes: int, books: int, width: int, depth: int = 3, heads: int = 8) -> None:
        super().__init__()
        self.embeds = nn.ModuleList(nn.Embedding(codes, width) for _ in range(books - 1))
        self.positions = nn.Parameter(0.02 * torch.randn(books, width))
        self.blocks, self.norm = _blocks(width, depth, heads), nn.LayerNorm(width)
        self.outs = nn.ModuleList(nn.Linear(width, codes) for _ in range(books))

    def forward(self, context: Tensor, ids: Tensor) -> Tensor:
        """(M, J + 1, codes): logits of contexts (M, width) with their first J ids (M, J) int64, J below books."""
        before = [embed(column) for embed, column in zip(self.embeds, ids.unbind(1), strict=False)]
        x = torch.stack([context, *before], 1) + self.positions[: len(before) + 1]
        for block in self.blocks:
            x = block(x, is_causal=True)
        x = self.norm(x)
        return torch.stack([out(x[:, i]) for i, out in enumerate(list(self.outs)[: x.shape[1]])], 1)

    def loss(self, context: Tensor, ids: Tensor) -> Tensor:
        """Mean of the books' cross-entropies in nats, of ids (M, books)."""
        logits = self(context, ids[:, :-1])
        return cross_entropy(logits.float().flatten(0, 1), ids.flatten())

    @torch.no_grad()
    def sample(self, context: Tensor, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """(M, books) int64: ids drawn one after the other; at ``temperature`` 0 the likeliest."""
        ids = torch.zeros(len(context), 0, dtype=torch.int64, device=context.device)
        for _ in self.outs:
            logits = self(context, ids)[:, -1].float()
            if temperature:
                new = torch.multinomial((logits / temperature).softmax(1), 1, generator=generator)
            else:
                new = logits.argmax(1, keepdim=True)
            ids = torch.cat([ids, new], 1)
        return ids


class FactorModel(nn.Module):
    """Ids (B, N, ``books``), position after position, of pictures of ``classes`` classes.

    A position is read as a linear map of its ids' embeddings side by side.
    """

    def __init__(
        self, codes: int, books: int, tokens: int, width: int, depth: int, heads: int, classes: int = 1
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.start = nn.Embedding(classes, width)
        self.embeds = nn.ModuleList(nn.Embedding(codes, width) for _ in range(books))
        self.gather = nn.Linear(books * width, width)
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.blocks, self.norm = _blocks(width, depth, heads), nn.LayerNorm(width)
        self.head = FactorHead(codes, books, width, heads=heads)

    def forward(self, before: Tensor, label: Tensor) -> Tensor:
        """(B, M + 1, width): contexts of each position and the next, of ids ``before`` (B, M, books), M below N."""
        if before.dim() != 3 or before.shape[1] >= self.tokens or before.shape[2] != len(self.embeds):
            shape = f"(B, M, {len(self.embeds)}) with M below {self.tokens}"
            raise ValueError(f"before: got shape {tuple(before.shape)}, must be {shape}")
        seen = torch.cat([embed(before[..., i]) for i, embed in enumerate(self.embeds)], -1)
        x = torch.cat([self.start(label)[:, None], self.gather(seen)], 1)
        x = x + self.positions[: x.shape[1]]
        for block in self.blocks:
            x = block(x, is_causal=True)
        return self.norm(x)

    def loss(self, ids: Tensor, label: Tensor) -> Tensor:
        """Mean cross-entropy of ids (B, N, books) of pictures of classes ``label`` (B,), in nats an id."""
        return self.head.loss(self(ids[:, :-1], label).flatten(0, 1), ids.flatten(0, 1))

    @torch.no_grad()
    def sample(self, label: Tensor, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """(B, N, books) int64: drawn ids of pictures of classes ``label`` (B,)."""
        ids = torch.zeros(len(label), 0, len(self.embeds), dtype=torch.int64, device=label.device)
        for _ in range(self.tokens):
            new = self.head.sample(self(ids, label)[:, -1], generator, temperature)
            ids = torch.cat([ids, new[:, None]], 1)
        return ids
