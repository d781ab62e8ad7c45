"""Queries and keys of a vision encoder's attention layers, caught by hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from vistok.host.hooks import Hooks


@dataclass
class Queries:
    """Queries and keys of one encoder layer as its attention used them."""

    q: Tensor
    """(U, H, M, d) for U sequences of M tokens (class token first if there is one)."""
    k: Tensor
    """(U, H, M, d)"""
    scale: float
    where: Tensor
    """(U, P) int64: the flat index of each patch, class token left out."""


class Tap(Protocol):
    """How to get queries and keys out of one attention layer."""

    def install(self, hooks: Hooks, use: Callable[[list[Queries]], None]) -> None: ...


@dataclass
class SplitTap:
    """An attention module with separate query and key projections (CLIP, SigLIP, InternVL)."""

    attention: Any
    query: Any
    key: Any
    class_token: bool

    def install(self, hooks: Hooks, use: Callable[[list[Queries]], None]) -> None:
        held: dict[str, Tensor] = {}
        hooks.after(self.query, lambda module, args, output: held.update(q=output))
        hooks.after(self.key, lambda module, args, output: held.update(k=output))

        def attended(module: Any, args: Any, output: Any) -> None:
            heads: int = module.num_heads
            q, k = (held.pop(n).detach().unflatten(-1, (heads, -1)).transpose(1, 2) for n in ("q", "k"))
            units, patches = q.shape[0], q.shape[2] - self.class_token
            where = torch.arange(units * patches, device=q.device).view(units, patches)
            use([Queries(q, k, module.scale, where)])

        hooks.after(self.attention, attended)


@dataclass
class StackedTap:
    """An attention module of vLLM's CLIP or SigLIP: one projection gives queries, keys and values side by side."""

    attention: Any
    class_token: bool

    def install(self, hooks: Hooks, use: Callable[[list[Queries]], None]) -> None:
        def projected(module: Any, args: Any, output: Any) -> None:
            heads: int = self.attention.num_heads_per_partition
            q, k, _ = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in output[0].detach().chunk(3, dim=-1))
            units, patches = q.shape[0], q.shape[2] - self.class_token
            where = torch.arange(units * patches, device=q.device).view(units, patches)
            use([Queries(q, k, self.attention.scale, where)])

        hooks.after(self.attention.qkv_proj, projected)


@dataclass
class PackedTap:
    """A Qwen-VL attention module: one projection, pictures (or windows) in one sequence cut by ``cu_seqlens``."""

    attention: Any
    projection: Any
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    order: Callable[[], Tensor | None]
    """The flat patch index of each place of the sequence, or None where they are the same."""

    def install(self, hooks: Hooks, use: Callable[[list[Queries]], None]) -> None:
        held: dict[str, Any] = {}
        hooks.before(self.attention, lambda module, args, kwargs: held.update(kwargs))
        hooks.after(self.projection, lambda module, args, output: held.update(qkv=output))

        def attended(module: Any, args: Any, output: Any) -> None:
            cuts, angles = held["cu_seqlens"].tolist(), held["position_embeddings"]
            q, k, _ = held["qkv"].detach().unflatten(-1, (3, module.num_heads, -1)).unbind(-3)
            held.clear()
            q, k = self.rotate(q, k, *angles)
            use(cut(q, k, module.scaling, cuts, self.order()))

        hooks.after(self.attention, attended)


@dataclass
class RowsTap:
    """An attention module that works on rows of patches padded to one length, each turned by its place (Gemma 4)."""

    attention: Any
    query: Any
    key: Any
    """What its queries and keys (U, M, H, d) leave before they are turned."""
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    slots: Callable[[], tuple[Tensor, list[int]]]
    """(S,) where each patch is in the rows laid flat, row after row, and how many each row has."""

    def install(self, hooks: Hooks, use: Callable[[list[Queries]], None]) -> None:
        held: dict[str, Any] = {}
        hooks.before(self.attention, lambda module, args, kwargs: held.update(kwargs))
        hooks.after(self.query, lambda module, args, output: held.update(q=output))
        hooks.after(self.key, lambda module, args, output: held.update(k=output))

        def attended(module: Any, args: Any, output: Any) -> None:
            turns = *held["position_embeddings"], held["position_ids"]
            q, k = (self.rotate(held[name].detach(), *turns).flatten(0, 1) for name in "qk")
            held.clear()
            flat, lengths = self.slots()
            k = k.repeat_interleave(module.num_key_value_groups, 1)
            use(cut(q[flat], k[flat], module.scaling, [0, *accumulate(lengths)]))

        hooks.after(self.attention, attended)


def cut(q: Tensor, k: Tensor, scale: float, cuts: list[int], order: Tensor | None = None) -> list[Queries]:
    """The sequences between the ``cuts`` (0, ..., S) of packed ``q`` and ``k`` (S, H, d), those of one length together.
    ``order`` (S,): the flat patch index of each place, or None where they are the same."""
    places = torch.arange(len(q), device=q.device)
    flat = places if order is None else order.to(q.device)
    by_length: dict[int, list[int]] = {}
    for start, end in pairwise(cuts):
        by_length.setdefault(end - start, []).append(start)
    parts = []
    for length, starts in by_length.items():
        index = torch.tensor(starts, device=q.device)[:, None] + places[:length]
        parts.append(Queries(q[index].transpose(1, 2), k[index].transpose(1, 2), scale, flat[index]))
    return parts
