"""Methods that keep the visual tokens and spend less on each: what a decoder layer computes for them.

Attention runs through an attention function that is registered with ``transformers``; a layer's MLP is shadowed for as
long as a session lasts. Text tokens are computed as ever. Visual tokens see the text before them and, of their own
picture, the tokens in a window around them; they use some of the heads and some of the MLP's hidden units. From some
layer on they may be gone altogether, which is an ordinary stage of the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vistok.core.effort import attend, gated_mlp, layer_flops, tiles, window_attention
from vistok.host.cache import ReducedLayer, held
from vistok.host.hooks import Hooks
from vistok.host.hosts.base import Host, UnsupportedModel
from vistok.host.pictures import Group
from vistok.host.reducer import Evidence, Reducer, Reduction, Schedule
from vistok.host.rows import places, take
from vistok.host.stream import Stream

NAME = "vistok_effort"


@dataclass(frozen=True)
class LayerEffort:
    """What one decoder layer does for visual tokens."""

    window: int
    """Side of the window of the grid in which a picture's tokens see each other; odd."""
    causal: bool = False
    """Whether they see only those of them that come before."""
    units: float = 1.0
    """Share of the MLP's hidden units that they use: the first ones."""
    blind: tuple[int, ...] = ()
    """Query heads whose weights to visual keys count nothing, for all queries."""
    silent: tuple[int, ...] = ()
    """Query heads that give visual queries nothing."""


class Effort(Reducer):
    """Base of such methods; a system is a dataclass of its hyper-parameters that writes ``layers`` and ``stop``.

    All tokens stay up to layer ``stop`` and none after it, whatever ``keep``.
    """

    def layers(self, num_layers: int, num_heads: int) -> Sequence[LayerEffort]:
        """What each of the ``num_layers`` layers does. Raises ValueError for heads that there are not."""
        raise TypeError(f"{type(self).__name__} must define layers()")

    def stop(self, num_layers: int) -> int:
        """The layer from which on no visual token is left; ``num_layers`` for none."""
        return num_layers

    def schedule(self, num_tokens: int, keep: int, num_layers: int) -> Schedule:
        stop = self.stop(num_layers)
        return Schedule(num_tokens, {stop: 0} if stop < num_layers else {})

    def compress(self, evidence: Evidence, keep: int) -> Reduction:
        return self.reduce(evidence, evidence.num_tokens)

    def at_layer(self, evidence: Evidence, keep: int, layer: int) -> Reduction:
        x = evidence.features
        return Reduction.select(x, torch.empty(len(x), 0, dtype=torch.int64, device=x.device))


@dataclass
class _Pictures:
    """Pictures of one layout in the sequence as it is now."""

    rows: Tensor
    """(G,) rows of the batch."""
    columns: Tensor
    """(G, N) columns of the sequence."""
    cells: Tensor
    """(G, N) cells of the picture's grids."""
    grids: tuple[tuple[int, int], ...]
    others: Tensor
    """(G, P) which keys they see that are not visual, -1 is padding."""


@dataclass
class _Block:
    """Where the visual tokens are, for all layers that hold the same columns."""

    past: int
    """Keys of earlier calls."""
    pictures: list[_Pictures]
    visual: Tensor
    """(B, M) bool: keys of visual tokens, those of earlier calls first."""
    text: Tensor
    """(B, Q) columns of the sequence that are not visual tokens', -1 is padding."""
    text_rows: tuple[Tensor, Tensor] = field(init=False)
    visual_rows: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        new = self.visual[:, self.past :]
        self.text_rows, self.visual_rows = (x.nonzero(as_tuple=True) for x in (~new, new))  # type: ignore[assignment]


class Spending:
    """An ``Effort`` at work in one model."""

    def __init__(self, host: Host, effort: Effort) -> None:
        self.host = host
        config = host.language_model.config
        self.heads: int = config.num_attention_heads
        self.layers = effort.layers(len(host.layers), self.heads)
        self.block: _Block | None = None
        """Set while a layer runs that treats visual tokens differently."""
        self._number, self._width = 0, 0
        self._groups: Sequence[Group] = ()
        self._blocks: dict[Any, _Block] = {}
        self._visual = torch.empty(0, 0, dtype=torch.bool)
        for layer in host.layers if any(effort.units < 1 for effort in self.layers) else ():
            parts = [getattr(layer.mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
            if not all(type(part) is nn.Linear for part in parts) or not hasattr(layer.mlp, "act_fn"):
                raise UnsupportedModel(
                    f"{host.name}: {type(effort).__name__} takes a part of the hidden units of each layer's MLP, which "
                    "must be a gated one of three plain linear layers"
                )

    # Coming and going ------------------------------------------------------------------------------------------------

    def install(self, hooks: Hooks) -> None:
        """Until ``hooks.remove()``."""
        config = self.host.language_model.config
        hooks.undo(partial(setattr, config, "_attn_implementation", config._attn_implementation))
        config._attn_implementation = NAME
        layer: Any
        for layer in self.host.layers:
            _AT_WORK[layer.self_attn] = self
            hooks.undo(partial(_AT_WORK.pop, layer.self_attn, None))
            hooks.shadow(layer.mlp, "forward", self._shadow_of(layer.mlp))

    def begins(self, groups: Sequence[Group], width: int) -> None:
        """The language model is about to run on ``width`` columns, of which ``groups`` are visual."""
        self._groups, self._width, self._blocks, self.block = groups, width, {}, None

    def enters(self, number: int, hidden: Tensor, given: Mapping[str, Any], stream: Stream | None) -> int | None:
        """Decoder layer ``number`` is about to run on ``hidden`` (B, T, D) with the arguments ``given``: the
        floating-point operations that it will take, or None where it does as it always does."""
        effort, self._number, self.block = self.layers[number], number, None
        cache: Cache | None = given.get("past_key_values")
        if number == 0:
            self._visual = self._see(cache, hidden)
        groups = [group for group in self._groups if group.count]
        if not groups and not effort.blind:
            return None
        past = held(cache, number)
        kept = cache.layers[number] if cache is not None and past else None
        key = (past, hidden.shape[1], getattr(kept, "stage", ()))
        if key not in self._blocks:
            self._blocks[key] = self._place(hidden, given.get("attention_mask"), past, kept, stream, groups)
        if groups or bool(self._blocks[key].visual.any()):
            self.block = self._blocks[key]
        return None if self.block is None else self._flops(effort, self.block, hidden)

    def _see(self, cache: Cache | None, hidden: Tensor) -> Tensor:
        """(B, seen + width) bool: which columns of the conversation are visual tokens'."""
        seen = 0 if cache is None else cache.get_seq_length()
        visual = torch.zeros(len(hidden), seen + self._width, dtype=torch.bool, device=hidden.device)
        if cache is not None and cache in _VISUAL:
            known = _VISUAL[cache]
            if len(known) != len(hidden):
                raise RuntimeError(f"past_key_values: got {len(hidden)} rows, the cache was filled with {len(known)}")
            visual[:, : known.shape[1]] = known[:, :seen]
        for group in self._groups:
            visual[group.rows[:, None], seen + group.columns] = True
        if cache is not None and self._groups:
            _VISUAL[cache] = visual
        return visual

    def _place(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        past: int,
        kept: Any,
        stream: Stream | None,
        groups: Sequence[Group],
    ) -> _Block:
        batch, width = hidden.shape[:2]
        visual = torch.zeros(batch, past + width, dtype=torch.bool, device=hidden.device)
        if kept is not None:
            columns = torch.arange(past, device=hidden.device).expand(batch, -1)
            if isinstance(kept, ReducedLayer):
                columns = kept.all_columns(batch, hidden.device)[:, :past].expand(batch, -1)
            visual[:, :past] = take(self._visual, columns)
        now = [group.columns for group in groups]
        if stream is not None:
            where = places(stream.index, stream.width)
            now = [where[group.rows].gather(1, columns) for group, columns in zip(groups, now, strict=True)]
        for group, columns in zip(groups, now, strict=True):
            visual[group.rows[:, None], past + columns] = True
        pictures = []
        for group, columns in zip(groups, now, strict=True):
            last = columns.amax(1)
            seen = _allowed(mask, group.rows, last[:, None], past, visual.shape[1])[:, 0]
            others = _indices(seen & ~visual[group.rows])
            grids = tuple(part.grid for part in group.layout.parts)
            pictures.append(_Pictures(group.rows, columns, group.positions, grids, others))
        return _Block(past, pictures, visual, _indices(~visual[:, past:]))

    # What runs in their place ----------------------------------------------------------------------------------------

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """(B, T, H, d): the attention of ``q`` (B, H, T, d) in the layer that was entered last."""
        effort, block = self.layers[self._number], self.block
        if block is None:
            raise RuntimeError("vistok: attention outside of the language model's forward")
        batch, heads, width, _ = q.shape
        sees = _without(effort.blind, heads, q.device) if effort.blind else None
        rows = torch.arange(batch, device=q.device)
        out = q.new_zeros(batch, width + 1, heads, q.shape[-1])  # the column -1 is the one behind the last

        at = block.text.clamp(min=0)
        text = q.transpose(1, 2)[rows[:, None], at].transpose(1, 2)
        allowed = _allowed(mask, rows, at, block.past, k.shape[2])[:, None]
        unseen = None if sees is None else ~sees[:, None] & block.visual[:, None]
        out[rows[:, None], block.text] = attend(text, k, v, allowed, scale, unseen).transpose(1, 2)

        chosen = _without(effort.silent, heads, q.device).nonzero()[:, 0]
        for one in block.pictures if len(chosen) else ():
            row, column = one.rows[:, None, None], one.columns[:, :, None]
            found = window_attention(
                q.transpose(1, 2)[row, column, chosen].transpose(1, 2),
                k,
                v,
                tiles(one.grids, effort.window).to(q.device),
                one.cells,
                block.past + one.columns,
                one.others,
                rows=one.rows,
                key_heads=chosen // (heads // k.shape[1]),
                scale=scale,
                causal=effort.causal,
                sees=None if sees is None else sees[chosen],
            )
            out[row, column, chosen] = found.transpose(1, 2)
        return out[:, :width]

    def _shadow_of(self, mlp: Any) -> Callable[[Tensor], Tensor]:
        forward = mlp.forward

        def shadow(x: Tensor) -> Tensor:
            block, effort = self.block, self.layers[self._number]
            if block is None or not block.pictures or effort.units == 1:
                return forward(x)
            out, units = torch.empty_like(x), self._units(effort)
            out[block.text_rows] = forward(x[block.text_rows])
            gate, up, down = ((part.weight, part.bias) for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
            out[block.visual_rows] = gated_mlp(x[block.visual_rows], gate, up, down, mlp.act_fn, units)
            return out

        return shadow

    def _units(self, effort: LayerEffort) -> int:
        return int(self.host.language_model.config.intermediate_size * effort.units)

    def _flops(self, effort: LayerEffort, block: _Block, hidden: Tensor) -> int:
        config = self.host.language_model.config
        layer: Any = self.host.layers[self._number]
        speak = self.heads - len(effort.silent)
        windows = [
            (len(one.rows) * tiles(one.grids, effort.window).pairs(one.others.shape[1]), speak)
            for one in block.pictures
        ]
        units = [
            (len(block.text_rows[0]), config.intermediate_size),
            (len(block.visual_rows[0]), self._units(effort)),
        ]
        return layer_flops(
            hidden.shape[0] * hidden.shape[1],
            block.text.numel() * block.visual.shape[1],
            windows,
            units,
            config.hidden_size,
            self.heads,
            config.num_key_value_heads,
            layer.self_attn.head_dim,
        )


_AT_WORK: WeakKeyDictionary[nn.Module, Spending] = WeakKeyDictionary()
"""Attention modules of models with an ``Effort`` in them."""
_VISUAL: WeakKeyDictionary[Cache, Tensor] = WeakKeyDictionary()
"""Which columns (B, seen) of the conversation in a cache are visual tokens'."""


def _allowed(mask: Tensor | None, rows: Tensor, at: Tensor, past: int, keys: int) -> Tensor:
    """(R, Q, keys) bool: what the queries at columns ``at`` (R, Q) of ``rows`` (R,) may see under ``mask``
    (B, 1, T, keys) bool, or where it is None, which means all that come before."""
    if mask is None:
        return torch.arange(keys, device=at.device) <= past + at[..., None]
    return mask[:, 0][rows[:, None] if len(mask) > 1 else 0, at]


def _indices(chosen: Tensor) -> Tensor:
    """(B, K) int64: where each row of ``chosen`` (B, N) bool is True, ascending; -1 behind them."""
    count = chosen.sum(1, keepdim=True)
    order = (~chosen).int().sort(dim=1, stable=True).indices[:, : int(count.max())]
    return order.masked_fill(torch.arange(order.shape[1], device=order.device) >= count, -1)


def _without(gone: Sequence[int], heads: int, device: torch.device) -> Tensor:
    """(H,) bool: False for the heads ``gone``."""
    return torch.tensor([head not in gone for head in range(heads)], device=device)


def _attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function that ``transformers`` calls."""
    spending = _AT_WORK.get(module)
    if spending is None or spending.block is None:
        return sdpa_attention_forward(module, q, k, v, attention_mask, **kwargs)
    return spending.attention(q, k, v, attention_mask, kwargs.get("scaling")), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
