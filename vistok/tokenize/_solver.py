"""AiT's solver: pictures to sequences of ids of which some may stay soft, one after another or all at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import one_hot

from vistok.parts.query_transformer import QueryTransformer


class Stretch(NamedTuple):
    """``length`` ids of a sequence, all of the ``size`` ids of the vocabulary that begin at ``start``."""

    start: int
    size: int
    length: int
    soft: bool


class Solver(nn.Module):
    """Pictures, through ``trunk`` to features (B, ``channels``, h, w), to sequences of at most ``longest`` ids.

    ``size``: width (a multiple of 4), blocks of encoder and decoder each, heads. ``parallel``: all ids at once.
    """

    def __init__(
        self,
        trunk: nn.Module,
        channels: int,
        vocabulary: int,
        longest: int,
        size: tuple[int, int, int],
        parallel: bool = False,
    ) -> None:
        super().__init__()
        width, depth, heads = size
        self.trunk, self.parallel = trunk, parallel
        self.enter = nn.Conv2d(channels, width, 1)
        norm = partial(nn.LayerNorm, eps=1e-5)
        self.encoder = nn.Sequential(*(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)))
        self.words = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.words.weight, std=0.02)
        self.positions = nn.Parameter(0.02 * torch.randn(longest, width))
        self.decoder = QueryTransformer(width, depth, heads, width, 0, causal=not parallel)
        self.head = nn.Linear(width, vocabulary)

    def read(self, images: Tensor) -> Tensor:
        """(B, h * w, width): the picture as the decoder reads it."""
        x = self.enter(self.trunk(images))
        where = build_sincos2d_pos_embed(list(x.shape[2:]), dim=x.shape[1], device=x.device, dtype=x.dtype)
        made: Tensor = self.encoder(x.flatten(2).transpose(1, 2) + where)
        return made

    def logits(self, read: Tensor, inputs: Tensor) -> Tensor:
        """(B, T, V): of each id, from ``inputs`` (B, T, width), what stands before each: a start, then embeddings."""
        if inputs.shape[1] > len(self.positions):
            raise ValueError(f"inputs: got {inputs.shape[1]} ids, must be {len(self.positions)} at most")
        found: Tensor = self.head(self.decoder(read, inputs + self.positions[: inputs.shape[1]]))
        return found

    def begin(self, start: int, batch: int, total: int) -> Tensor:
        """(B, 1, width): the embedding of the id ``start``; in parallel (B, ``total``, width), at each place."""
        return self.words.weight[start].expand(batch, total if self.parallel else 1, -1)

    def forced(self, images: Tensor, ids: Tensor, start: int) -> Tensor:
        """(B, T, V): logits with ``start`` and the true ``ids`` (B, T) before each; in parallel without these."""
        before = self.begin(start, *ids.shape)
        if not self.parallel:
            before = torch.cat([before, self.words(ids[:, :-1])], 1)
        return self.logits(self.read(images), before)

    @torch.no_grad()
    def generate(
        self,
        images: Tensor,
        start: int,
        stretches: Sequence[Stretch],
        *,
        soft: bool = True,
        top_p: float = 0.3,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Ids (B, T) that follow ``start``, and of each stretch its logits (B, length, size) among its own ids alone.

        Soft stretches take the likeliest id and feed the expected embedding back, unless ``soft`` is False: then that
        of the id. The others are drawn from the likeliest ids that have ``top_p`` of the probability together.
        """
        read, total = self.read(images), sum(part.length for part in stretches)
        x = self.begin(start, len(read), total)
        at_once = self.logits(read, x) if self.parallel else None
        ids: list[Tensor] = []
        found = []
        for part in stretches:
            own = []
            table = self.words.weight[part.start : part.start + part.size]
            for _ in range(part.length):
                row = self.logits(read, x)[:, -1] if at_once is None else at_once[:, len(ids)]
                own.append(row[:, part.start : part.start + part.size].float())
                p = own[-1].softmax(-1)
                chosen = p.argmax(-1) if part.soft else nucleus(p, top_p, generator)
                weights = p if part.soft and soft else one_hot(chosen, part.size)
                if at_once is None:
                    x = torch.cat([x, (weights.to(table) @ table)[:, None]], 1)
                ids.append(chosen + part.start)
            found.append(torch.stack(own, 1))
        return torch.stack(ids, 1), found


def nucleus(p: Tensor, top_p: float, generator: torch.Generator | None = None) -> Tensor:
    """(B,) int64: draws from ``p`` (B, K) among the likeliest that have ``top_p`` together, the first at least."""
    likely, order = p.sort(dim=1, descending=True, stable=True)
    beyond = likely.cumsum(1) - likely >= top_p
    beyond[:, 0] = False
    return order.gather(1, torch.multinomial(likely.masked_fill(beyond, 0), 1, generator=generator))[:, 0]
