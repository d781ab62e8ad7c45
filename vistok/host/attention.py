"""Methods that change how the layers of a language model attend, with all its tokens in the KV cache.

They run as an attention function that is registered with ``transformers``, for as long as a session lasts; what a
method leaves to the model runs on fused attention (SDPA), whatever the model was loaded with. A method sees rows
without padding: real tokens lie first, and where padding lay before is put right when it has answered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vistok.core.ragged import positions as places_of
from vistok.core.tensors import upcast
from vistok.host.cache import ReducedLayer
from vistok.host.encoder import in_encoder
from vistok.host.hooks import Hooks
from vistok.host.hosts.base import UnsupportedModel
from vistok.host.llm import rotated
from vistok.host.rows import take, take_keys
from vistok.host.stream import Stream

NAME = "vistok_attention"


@dataclass(frozen=True)
class AttentionCall:
    """What one layer is asked: attention of the new tokens over all tokens of the conversation.

    Of each row the first ``keys`` tokens are real, and the new ones are the last ``queries`` of them, which are the
    first of ``q``. What lies behind is padding: any number may be returned for it.
    """

    q: Tensor
    """(B, H, Q, d) new queries, turned by their positions (RoPE)."""
    k: Tensor
    """(B, Hk, N, d) keys, turned by theirs; Hk divides H, query heads side by side share a key head."""
    v: Tensor
    """(B, Hk, N, dv)"""
    keys: Tensor
    """(B,) int64"""
    queries: Tensor
    """(B,) int64"""
    scale: float
    """Of the products."""
    layer: int
    num_layers: int
    positions: Tensor | None
    """(..., B, N) the positions by which the keys were turned, where the method asks for them."""
    turn: Callable[[Tensor, Tensor], Tensor]
    """(x (B, H, T, d), by (..., B, T)) -> x with its positions moved on by ``by``, as the model's RoPE has it."""
    memory: dict[str, Any]
    """What the method leaves for its next call in this layer and conversation; forgotten at the end of the session."""


class AttentionMethod:
    """Base of such methods. A system is a dataclass of its hyper-parameters that writes ``attend``.

    * ``reads_positions``: True if it reads ``positions`` or calls ``turn``. Tokens must then stay at their original
      positions (``vistok.apply(position="keep")``), and a conversation must have begun inside the session.
    """

    reads_positions: ClassVar[bool] = False

    def attend(self, call: AttentionCall) -> Tensor | None:
        """(B, H, Q, dv) in place of the layer's attention; None to leave it as it is. Pure but for ``call.memory``."""
        raise TypeError(f"{type(self).__name__} must define attend()")


def split_attention(methods: Sequence[Any], hyper: dict[str, Any]) -> tuple[list[Any], AttentionMethod | None]:
    """The ``methods`` that are none of attention, as they were given; and the one that is, made if given by name.

    Raises ValueError for more than one.
    """
    from vistok import catalogue

    rest: list[Any] = []
    found: list[AttentionMethod] = []
    for method in methods:
        made = method
        if isinstance(method, str) and not in_encoder(method):
            try:
                made = catalogue.create(method, **hyper) if catalogue.card(method).family == "attend" else method
            except catalogue.UnknownSystem:  # said where the others are made
                made = method
        if isinstance(made, AttentionMethod):
            found.append(made)
        else:
            rest.append(method)
    if len(found) > 1:
        raise ValueError(f"method: got {found}, must be at most one that changes how layers attend")
    return rest, found[0] if found else None


def decoder_of(model: nn.Module) -> Any:
    """The decoder in a language model of ``transformers``. Raises UnsupportedModel where there is none."""
    get: Any = getattr(model, "get_decoder", None)
    decoder = None if get is None else get()
    if decoder is None or not hasattr(decoder, "layers"):
        raise UnsupportedModel(f"{type(model).__name__}: methods of attention need a decoder with layers")
    return decoder


@torch.no_grad()
def layer_drifts(model: nn.Module, **inputs: Any) -> Tensor:
    """(layers,): how far each decoder layer moves hidden states on a prompt, |out - in| / |in|, mean over
    tokens, as shares of all layers. ``inputs``: as for ``model``; padding counts where ``attention_mask`` says it."""
    mask, hooks = inputs.get("attention_mask"), Hooks()
    found: list[Tensor] = []

    def see(module: Any, args: Any, output: Any) -> None:
        before, after = upcast(args[0]), upcast(output[0] if isinstance(output, tuple) else output)
        moved = (after - before).norm(dim=-1) / before.norm(dim=-1)
        found.append(moved.mean() if mask is None else moved[mask.bool()].mean())

    try:
        for layer in decoder_of(model).layers:
            hooks.after(layer, see)
        model(**inputs)
    finally:
        hooks.remove()
    drifts = torch.stack(found)
    return drifts / drifts.sum()


@dataclass
class TextLog:
    """What a session without pictures counts."""

    pictures: list[Any] = field(default_factory=list)
    flops: dict[str, int] = field(default_factory=dict)
    milliseconds: dict[str, float] = field(default_factory=dict)
    kv_bytes: int = 0


class Attending:
    """An ``AttentionMethod`` at work in one decoder."""

    def __init__(
        self, method: AttentionMethod, decoder: Any, stream: Callable[[], Stream | None] | None = None
    ) -> None:
        """``stream``: how the sequence was shortened on its way through the decoder, if it was."""
        self.method, self.decoder, self.log = method, decoder, TextLog()
        self.modules = [layer.self_attn for layer in decoder.layers if hasattr(layer, "self_attn")]
        self._stream = stream or (lambda: None)
        self._width, self._now = 0, torch.empty(0)
        self._cache: Cache | None = None
        self._positions: WeakKeyDictionary[Cache, Tensor] = WeakKeyDictionary()
        self._memory: WeakKeyDictionary[Cache, dict[int, dict[str, Any]]] = WeakKeyDictionary()
        self._check()

    def _check(self) -> None:
        name, config = type(self.decoder).__name__, self.decoder.config
        kinds = getattr(config, "layer_types", None)
        if "sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None) is not None:
            raise UnsupportedModel(f"{name} has sliding windows, with which methods of attention do not go")
        if not self.modules or not all(hasattr(m, "q_proj") and hasattr(m, "layer_idx") for m in self.modules):
            raise UnsupportedModel(f"{name}: methods of attention need layers with projected queries and keys")
        if any(hasattr(module, "sinks") for module in self.modules):
            raise UnsupportedModel(f"{name} has a sink in each softmax, with which methods of attention do not go")
        kind = getattr(getattr(self.decoder, "rotary_emb", None), "rope_type", "none")
        if self.method.reads_positions and kind in ("none", "dynamic", "longrope"):
            raise UnsupportedModel(
                f"{name} with {kind} RoPE: {type(self.method).__name__} moves tokens to other positions, which needs "
                "RoPE whose frequencies do not depend on the length"
            )

    # Coming and going ------------------------------------------------------------------------------------------------

    def install(self, hooks: Hooks) -> None:
        """Until ``hooks.remove()``; before hooks that shorten the sequence."""
        for config in {id(module.config): module.config for module in self.modules}.values():
            hooks.undo(partial(setattr, config, "_attn_implementation", config._attn_implementation))
            config._attn_implementation = NAME
        hooks.before(self.decoder, self._begins)
        hooks.after(self.decoder, self._ends)
        for module in self.modules:
            _AT_WORK[module] = self
            hooks.undo(partial(_AT_WORK.pop, module, None))
            hooks.before(module, self._enters)

    def close(self) -> None:
        """Let go of everything but the log."""
        self._cache, self._now = None, torch.empty(0)
        self._positions.clear()
        self._memory.clear()

    def _begins(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The decoder is about to run: the positions of its tokens, (..., B, T)."""
        names = "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds"
        given = dict(zip(names, args, strict=False)) | kwargs
        tokens = given["input_ids"] if given.get("inputs_embeds") is None else given["inputs_embeds"]
        cache: Cache | None = given.get("past_key_values")
        batch, self._width = tokens.shape[:2]
        seen = 0 if cache is None else cache.get_seq_length()
        positions: Tensor | None = given.get("position_ids")
        if positions is None:
            positions = torch.arange(seen, seen + self._width, device=tokens.device)[None]
        elif positions.ndim == 3 and positions.shape[0] == 4:
            positions = positions[1:]  # as in Stream
        positions = positions.expand(*positions.shape[:-2], batch, self._width)
        if self.method.reads_positions and seen and cache is not None:
            known = self._positions.get(cache)
            if known is None or known.shape[-1] < seen or known.shape[-2] != batch:
                raise RuntimeError(
                    f"past_key_values: {type(self.method).__name__} needs the positions of all tokens: the cache must "
                    f"have been filled inside this `with`, with {batch} rows"
                )
            known = known[..., :seen]
            if positions.ndim < known.ndim:  # the same on all axes
                positions = positions.expand(*known.shape[:-1], self._width)
            elif known.ndim < positions.ndim:
                known = known.expand(*positions.shape[:-1], seen)
            positions = torch.cat([known, positions], -1)
        self._now, self._cache = positions, None

    def _enters(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._cache = kwargs.get("past_key_values")
        if self._cache is not None and self.method.reads_positions:
            self._positions[self._cache] = self._now

    def _ends(self, module: Any, args: Any, output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        layers = () if cache is None else cache.layers
        held = [t for layer in layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))]
        self.log.kv_bytes = sum(t.numel() * t.element_size() for t in held if t is not None)

    # What runs in its place ------------------------------------------------------------------------------------------

    def attention(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor | None:
        """(B, T, H, dv), or None for the model's own."""
        batch, (width, total) = len(q), (q.shape[2], k.shape[2])
        layer = None if self._cache is None else self._cache.layers[module.layer_idx]
        if getattr(layer, "is_compileable", False):
            raise ValueError(
                f"past_key_values: got a {type(layer).__name__}; methods of attention need a cache that holds no room "
                "for tokens to come: leave cache_implementation unset"
            )
        positions = self._held(layer, batch, total, q.device) if self.method.reads_positions else None
        keys, queries = (torch.full((batch,), n, device=q.device) for n in (total, width))
        new = None
        if mask is not None and not bool((real := mask[:, 0, -1].expand(batch, -1)).all()):
            keys, queries = real.sum(1), real[:, total - width :].sum(1)
            old, new = (_packed(part) for part in (real, real[:, total - width :]))
            q, k, v = take_keys(q, new), take_keys(k, old), take_keys(v, old)
            positions = None if positions is None else take(positions, old, -1)
        memory: dict[str, Any] = {}
        if self._cache is not None:
            memory = self._memory.setdefault(self._cache, {}).setdefault(module.layer_idx, {})
        call = AttentionCall(
            q,
            k,
            v,
            keys,
            queries,
            scale,
            module.layer_idx,
            len(self.decoder.layers),
            positions,
            partial(self._turn, module),
            memory,
        )
        out = self.method.attend(call)
        if out is None or new is None:
            return None if out is None else out.transpose(1, 2)
        whole = out.new_zeros(batch, width + 1, *out.shape[1::2])  # the column behind the last takes the padding
        at = torch.where(new < 0, width, new)
        whole[torch.arange(batch, device=q.device)[:, None], at] = out.transpose(1, 2)
        return whole[:, :width]

    def _held(self, layer: Any, batch: int, total: int, device: torch.device) -> Tensor:
        """(..., B, total): the positions of the keys that a layer is given."""
        stream = self._stream()
        if isinstance(layer, ReducedLayer):
            return take(self._now, layer.all_columns(batch, device, total).expand(batch, -1), -1)
        return self._now if stream is None else take(self._now, stream.index, -1)

    def _turn(self, module: Any, x: Tensor, by: Tensor) -> Tensor:
        rotary = self.decoder.rotary_emb
        exact = upcast(x)
        cos, sin = (t / rotary.attention_scaling for t in rotary(exact, by))
        return rotated(exact, module, (cos, sin)).to(x.dtype)


_AT_WORK: WeakKeyDictionary[nn.Module, Attending] = WeakKeyDictionary()
"""Attention modules of models with an ``AttentionMethod`` in them."""


def _packed(real: Tensor) -> Tensor:
    """(B, N) int64: where ``real`` (B, T) bool is True, -1 behind them."""
    at, there = places_of(real)
    return at.masked_fill(~there, -1)


def _attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function that ``transformers`` calls."""
    at_work = _AT_WORK.get(module)
    if at_work is not None:
        scale = kwargs.get("scaling")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        found = at_work.attention(module, q, k, v, attention_mask, scale)
        if found is not None:
            return found.contiguous(), None
    return sdpa_attention_forward(module, q, k, v, attention_mask, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
