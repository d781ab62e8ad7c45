"""Evidence from a vision encoder that runs with fused attention: of the layers asked for, the rows asked for.

Every result is held per *patch*, flat over all patches that the encoder saw in one run; a Layout then says which
patches a token of the language model is made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from vistok.core.attention import attention_marginals, attention_rows, class_row
from vistok.host.hooks import Hooks
from vistok.host.layout import Layout
from vistok.host.reducer import LayerSpec

ATTENTION_FIELDS = (
    "cls_attention",
    "wide_cls_attention",
    "received_attention",
    "given_attention",
    "encoder_attention",
    "encoder_keys",
)


def layers_of(spec: LayerSpec, depth: int) -> list[int]:
    """The encoder layers that a LayerSpec names, of ``depth``; ValueError if there is no such layer."""
    if isinstance(spec, slice):
        layers = list(range(depth))[spec]
    elif isinstance(spec, tuple):
        layers = [layer for part in spec for layer in layers_of(part, depth)]
    elif isinstance(spec, float) and 0 < spec < 1:
        layers = [max(1, math.floor(spec * depth + 0.5)) - 1]
    elif isinstance(spec, int) and not isinstance(spec, bool) and -depth <= spec < depth:
        layers = [spec % depth]
    else:
        layers = []
    if not layers:
        raise ValueError(f"needs: layer {spec!r} names none of the vision encoder's {depth} layers")
    return layers


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


@dataclass
class VisionRun:
    """What was seen of one run of the vision encoder."""

    call: Mapping[str, Any] = field(default_factory=dict)
    """What the adapter watched of the call: ``grid_thw``, ``image_sizes``, ..."""
    fields: dict[tuple[str, int], Any] = field(default_factory=dict)
    """(field, layer) -> flat over patches: (H, S), (S,) or (S, D); for "encoder_attention" a list of
    ((P,) flat indices, (H, P, P)) blocks."""
    features: Tensor | None = None
    """(S, Dv) what the projector was given."""
    rows: int = 0
    """Rows that the projector was given (tokens or patches)."""
    lengths: list[tuple[int, int]] = field(default_factory=list)
    """(sequences, tokens) that each encoder layer attended over, one entry a group of equal length and layer."""


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
            places = torch.arange(len(q), device=q.device)
            order = self.order()
            flat = places if order is None else order.to(q.device)
            by_length: dict[int, list[int]] = {}
            for start, end in pairwise(cuts):
                by_length.setdefault(end - start, []).append(start)
            parts = []
            for length, starts in by_length.items():
                index = torch.tensor(starts, device=q.device)[:, None] + places[:length]
                parts.append(Queries(q[index].transpose(1, 2), k[index].transpose(1, 2), module.scaling, flat[index]))
            use(parts)

        hooks.after(self.attention, attended)


def measure(name: str, x: Queries) -> Tensor:
    """One field of a layer per sequence: (U, H, P), (U, P), (U, P, D) or (U, H, P, P)."""
    class_token = x.q.shape[2] - x.where.shape[1]
    if name == "encoder_keys":
        return x.k[:, :, class_token:].transpose(1, 2).flatten(2)
    if name == "encoder_attention":
        return attention_rows(x.q[:, :, class_token:], x.k, x.scale)[..., class_token:]
    if name == "cls_attention":
        if class_token:
            return class_row(x.q, x.k, x.scale)
        q, k = (t.flatten(0, 1)[:, None] for t in (x.q, x.k))  # heads apart: the marginals are means over heads
        return attention_marginals(q, k, x.scale)[0].view(*x.q.shape[:3])
    if name == "wide_cls_attention":
        q, k = (t.transpose(1, 2).flatten(2)[:, None] for t in (x.q, x.k))
        return class_row(q, k)[:, 0] if class_token else attention_marginals(q, k)[0]
    received, given = attention_marginals(x.q, x.k, x.scale, prefix=class_token)
    return (received if name == "received_attention" else given)[:, class_token:]


def flatten(name: str, parts: list[Queries]) -> Any:
    """``measure`` of all sequences of a layer, laid flat over the encoder's patches."""
    values = [(x.where, measure(name, x)) for x in parts]
    if name == "encoder_attention":
        return [(place, block) for where, value in values for place, block in zip(where, value, strict=True)]
    size = sum(where.numel() for where, _ in values)
    if name == "cls_attention":
        out = values[0][1].new_empty(size, values[0][1].shape[1])
        for where, value in values:
            out[where.flatten()] = value.transpose(1, 2).flatten(0, 1)
        return out.T
    out = values[0][1].new_empty(size, *values[0][1].shape[2:])
    for where, value in values:
        out[where.flatten()] = value.flatten(0, 1)
    return out


class Probe:
    """Hooks the encoder layers that the methods need; ``run`` is what the last run of the encoder showed."""

    def __init__(self, needs: Iterable[Mapping[str, LayerSpec]], depth: int) -> None:
        self.wanted: dict[int, set[str]] = {}
        for need in needs:
            for name, spec in need.items():
                if name in ATTENTION_FIELDS:
                    for layer in layers_of(spec, depth):
                        self.wanted.setdefault(layer, set()).add(name)
        self.depth = depth
        self.run: VisionRun | None = None

    def install(self, hooks: Hooks, tap: Callable[[int], Tap]) -> None:
        for layer, names in sorted(self.wanted.items()):

            def use(parts: list[Queries], layer: int = layer, names: frozenset[str] = frozenset(names)) -> None:
                if self.run is not None:
                    with torch.no_grad():
                        self.run.fields.update({(name, layer): flatten(name, parts) for name in names})

            tap(layer).install(hooks, use)

    def evidence(self, needs: Mapping[str, LayerSpec], layout: Layout, first: Tensor) -> dict[str, Any]:
        """The fields of ``needs`` that come from the encoder, for B pictures of one layout whose patches begin at
        ``first`` (B,) int64, per token of the language model."""
        run = self.run
        if run is None:
            return {}
        out: dict[str, Any] = {}
        for name, spec in needs.items():
            if name == "encoder_features" and run.features is not None:
                out[name] = _tokens(run.features, layout, first, join=True)
            elif name in ATTENTION_FIELDS:
                values = [_field(name, run.fields[name, layer], layout, first) for layer in layers_of(spec, self.depth)]
                out[name] = tuple(values) if isinstance(spec, (slice, tuple)) else values[0]
        return out


def _field(name: str, value: Any, layout: Layout, first: Tensor) -> Tensor:
    if name == "encoder_attention":
        return torch.stack([_square(value, layout, start) for start in first.tolist()])
    if name == "cls_attention":
        return _tokens(value.T, layout, first).transpose(1, 2)
    if name == "encoder_keys":
        return _tokens(value, layout, first, join=True)
    return _tokens(value[:, None], layout, first)[..., 0]


def _tokens(flat: Tensor, layout: Layout, first: Tensor, join: bool = False) -> Tensor:
    """(S, D) per patch to (B, N, D) per token: mean over a token's patches, or (B, N, g * D) if ``join``; interpolated
    tokens get the weighted mean either way."""
    _, patches, weights = layout.on(flat.device)
    values = flat[first.to(flat.device)[:, None, None] + patches]
    if weights is not None:
        return (values * weights[..., None].to(values.dtype)).sum(2)
    if patches.shape[1] == 1:
        return values[:, :, 0]
    return values.flatten(2) if join else values.mean(2)


def _square(blocks: list[tuple[Tensor, Tensor]], layout: Layout, first: int) -> Tensor:
    """(H, N, N) of one picture: zero between patches that the encoder kept apart, means over the patches of a token."""
    last = first + layout.num_patches
    mine = [(place - first, block) for place, block in blocks if first <= int(place[0]) < last]
    full = mine[0][1].new_zeros(mine[0][1].shape[0], layout.num_patches, layout.num_patches)
    for place, block in mine:
        full[:, place[:, None], place] = block
    _, patches, weights = layout.on(full.device)
    share = torch.full(patches.shape, 1 / patches.shape[1]) if weights is None else weights
    share = share.to(full.device, full.dtype)
    rows = (full[:, patches] * share[..., None]).sum(2)
    return (rows[:, :, patches] * share).sum(3)
