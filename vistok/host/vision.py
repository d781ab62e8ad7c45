"""Evidence from a vision encoder that runs with fused attention: of the layers asked for, the rows asked for.

Every result is held per *patch*, flat over all patches that the encoder saw in one run; a Layout then says which
patches a token of the language model is made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from vistok.core.attention import attention_marginals, attention_rows, class_row
from vistok.core.tensors import upcast
from vistok.host.hooks import Hooks
from vistok.host.layout import Kind, Layout
from vistok.host.reducer import LayerSpec
from vistok.host.taps import Queries, Tap
from vistok.host.vit.state import TokenState

ATTENTION_FIELDS = (
    "cls_attention",
    "cls_logits",
    "wide_cls_attention",
    "received_attention",
    "given_attention",
    "encoder_attention",
    "encoder_keys",
    "encoder_mean_keys",
)
LAYER_FIELDS = (*ATTENTION_FIELDS, "encoder_states")


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
class VisionRun:
    """What was seen of one run of the vision encoder."""

    kind: Kind = "image"
    """Whether it ran on the pictures of a prompt or on its videos."""
    call: Mapping[str, Any] = field(default_factory=dict)
    """What the adapter watched of the call: ``grid_thw``, ``image_sizes``, ..."""
    fields: dict[tuple[str, int], Any] = field(default_factory=dict)
    """(field, layer) -> flat over patches: (H, S), (S,) or (S, D); for "encoder_attention" a list of
    ((P,) flat indices, (H, P, P)) blocks."""
    features: Tensor | None = None
    """(S, Dv) what the projector was given."""
    pixels: Tensor | None = None
    """(S, P) float32 grey values of each patch."""
    rows: int = 0
    """Rows that the projector was given (tokens or patches)."""
    anchor: Tensor | None = None
    """(S,) int64: the patch at whose place the slot stands that each patch ended in, after a method inside the encoder;
    -1 where it was dropped. None without such a method."""
    saved: int = 0
    """Floating-point operations that such a method spared the encoder, or pictures that were known (``reuse``)."""
    lengths: list[tuple[int, int]] = field(default_factory=list)
    """(sequences, tokens) that each encoder layer attended over, one entry a group of equal length and layer."""
    before: VisionRun | None = None
    """The run for the same prompt on what is of the other kind."""
    read: bool = False
    """Whether the language model has begun on the prompt."""

    @property
    def all(self) -> list[VisionRun]:
        """The runs for the prompt."""
        return [self] if self.before is None else [self.before, self]


def measure(name: str, x: Queries) -> Tensor:
    """One field of a layer per sequence: (U, H, P), (U, P), (U, P, D) or (U, H, P, P)."""
    class_token = x.q.shape[2] - x.where.shape[1]
    if name == "encoder_keys":
        return x.k[:, :, class_token:].transpose(1, 2).flatten(2)
    if name == "encoder_mean_keys":
        return x.k[:, :, class_token:].mean(1)
    if name == "encoder_attention":
        return attention_rows(x.q[:, :, class_token:], x.k, x.scale)[..., class_token:]
    if name == "cls_logits":
        return (upcast(x.q[:, :, :1]) * x.scale @ upcast(x.k[:, :, 1:]).transpose(2, 3))[:, :, 0]
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


def flatten(name: str, parts: list[Queries], patches: int | None = None) -> Any:
    """``measure`` of all sequences of a layer, laid flat over the encoder's ``patches``; those that none of the
    sequences names get 0. None: the sequences name them all."""
    values = [(x.where, measure(name, x)) for x in parts]
    if name == "encoder_attention":
        return [(place, block) for where, value in values for place, block in zip(where, value, strict=True)]
    size = sum(where.numel() for where, _ in values) if patches is None else patches
    if name in ("cls_attention", "cls_logits"):
        out = values[0][1].new_zeros(size, values[0][1].shape[1])
        for where, value in values:
            out[where.flatten()] = value.transpose(1, 2).flatten(0, 1)
        return out.T
    out = values[0][1].new_zeros(size, *values[0][1].shape[2:])
    for where, value in values:
        out[where.flatten()] = value.flatten(0, 1)
    return out


class Encoder(Protocol):
    """The part of a Host that a Probe hooks."""

    @property
    def blocks(self) -> Any: ...

    def tap(self, layer: int) -> Tap: ...

    def patch_states(self, hidden: Tensor) -> Tensor: ...


class Probe:
    """Hooks the encoder layers that the methods need; ``run`` is what the encoder's last run showed, and the one before
    it if that was for the same prompt."""

    def __init__(self, needs: Iterable[Mapping[str, LayerSpec]], depth: int) -> None:
        self.asked: set[str] = set()
        self.wanted: dict[int, set[str]] = {}
        for need in needs:
            self.asked |= set(need)
            for name, spec in need.items():
                if name in LAYER_FIELDS:
                    for layer in layers_of(spec, depth):
                        self.wanted.setdefault(layer, set()).add(name)
        self.depth = depth
        self.run: VisionRun | None = None
        self.states: Callable[[], Mapping[int, TokenState]] | None = None
        """What left each encoder block (-1: what entered the first), where a method drops tokens there."""

    def new_prompt(self, kind: Kind) -> bool:
        """Whether a run on ``kind`` that is about to begin is for another prompt than ``run``."""
        last = self.run
        return last is None or last.read or any(run.kind == kind for run in last.all)

    def begin(self, run: VisionRun) -> VisionRun:
        """Have ``run`` filled by what the encoder shows from now on."""
        run.before = None if self.new_prompt(run.kind) else self.run
        self.run = run
        return run

    def install(self, hooks: Hooks, encoder: Encoder) -> None:
        for layer, names in sorted(self.wanted.items()):
            rows = names - {"encoder_states"}
            if rows:
                encoder.tap(layer).install(hooks, partial(self._attended, layer, rows))
            if "encoder_states" in names:
                hooks.after(encoder.blocks[layer], partial(self._left, layer, encoder))

    def _attended(self, layer: int, names: set[str], parts: list[Queries]) -> None:
        if self.run is not None:
            patches = None
            if self.states is not None and not (state := self.states()[layer - 1]).untouched:
                patches = state.source.numel()
                parts = [replace(parts[0], where=state.flat_anchor)]
            with torch.no_grad():
                self.run.fields.update({(name, layer): flatten(name, parts, patches) for name in names})

    def _left(self, layer: int, encoder: Encoder, module: Any, args: Any, output: Any) -> None:
        if self.run is not None:
            hidden = output[0] if isinstance(output, tuple) else output
            if self.states is not None:
                hidden = self.states()[layer].restored(hidden, "nearest")
            self.run.fields["encoder_states", layer] = encoder.patch_states(hidden.detach())

    def evidence(self, needs: Mapping[str, LayerSpec], layout: Layout, first: Tensor) -> dict[str, Any]:
        """The fields of ``needs`` that come from the encoder, for B pictures of one layout whose patches begin at
        ``first`` (B,) int64, per token of the language model."""
        run = next((run for run in (self.run.all if self.run is not None else []) if run.kind == layout.kind), None)
        if run is None:
            return {}
        out: dict[str, Any] = {}
        for name, spec in needs.items():
            if name == "encoder_features" and run.features is not None:
                out[name] = _tokens(run.features, layout, first, join=True)
            elif name == "patch_pixels" and run.pixels is not None:
                out[name] = _tokens(run.pixels, layout, first, join=True)
            elif name == "anchor" and run.anchor is not None:
                out[name] = on_tokens(run.anchor, layout, first)
            elif name in LAYER_FIELDS:
                values = [_field(name, run.fields[name, layer], layout, first) for layer in layers_of(spec, self.depth)]
                out[name] = tuple(values) if isinstance(spec, (slice, tuple)) else values[0]
        return out


def _field(name: str, value: Any, layout: Layout, first: Tensor) -> Tensor:
    if name == "encoder_attention":
        return torch.stack([_square(value, layout, start) for start in first.tolist()])
    if name in ("cls_attention", "cls_logits"):
        return _tokens(value.T, layout, first).transpose(1, 2)
    if name in ("encoder_keys", "encoder_mean_keys", "encoder_states"):
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


def on_tokens(anchor: Tensor, layout: Layout, first: Tensor) -> Tensor:
    """(B, N) int64: which token of its picture stands for each, -1 where none does; ``anchor`` (S,) says it of patches.

    A token of several patches stands for itself if one of them does, and is not stood for otherwise. A slot whose place
    is not among the tokens (the padding of a cut picture) stands at the first of its patches that is.
    """
    _, patches, _ = layout.on(anchor.device)
    first = first.to(anchor.device)
    index = first[:, None, None] + patches
    at, place = anchor[index], torch.arange(len(patches), device=anchor.device)
    if patches.shape[1] > 1:
        return torch.where((at == index).any(2), place, -1)
    token = place.new_full((layout.num_patches,), -1)
    token[patches[:, 0]] = place
    there = (at[:, :, 0] - first[:, None]).clamp_min(0)
    others = torch.where(at[:, :, 0] < 0, len(place), place)  # the first of a slot's tokens is the lowest
    seen = place.new_full((len(first), layout.num_patches), len(place)).scatter_reduce(1, there, others, "amin")
    stand = torch.where(token < 0, seen, token).gather(1, there)
    return torch.where(at[:, :, 0] < 0, -1, stand)


def _square(blocks: list[tuple[Tensor, Tensor]], layout: Layout, first: int) -> Tensor:
    """(H, N, N) of one picture: zero between patches that the encoder kept apart, means over the patches of a token."""
    last = first + layout.num_patches
    mine = [(place - first, block) for place, block in blocks if first <= int(place[0]) < last]
    full = mine[0][1].new_zeros(mine[0][1].shape[0], layout.num_patches, layout.num_patches)
    for place, block in mine:
        full[:, place[:, None], place] = block
    _, patches, weights = layout.on(full.device)
    if weights is None and patches.shape[1] == 1:
        order = patches[:, 0]
        same = len(order) == len(full[0]) and torch.equal(order, torch.arange(len(order), device=order.device))
        return full if same else full[:, order][:, :, order]
    share = torch.full(patches.shape, 1 / patches.shape[1]) if weights is None else weights
    share = share.to(full.device, full.dtype)
    rows = (full[:, patches] * share[..., None]).sum(2)
    return (rows[:, :, patches] * share).sum(3)
