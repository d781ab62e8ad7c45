"""A KV cache that holds fewer keys than it has seen tokens, without the model or ``generate`` noticing.

``generate`` slices its input by ``cache.get_seq_length()`` and counts positions from it; the attention mask is sized
by ``cache.get_mask_sizes()``. A ``ReducedLayer`` answers the first with the tokens *seen* and the second as a
sliding-window layer would: with the keys it *holds*, offset by the number that are gone. So decoding, beams and a
second turn of a conversation on the same cache count positions right, and every mask that transformers builds has the
right shape for every attention implementation. Only a padding mask still speaks of the tokens seen; ``past_mask`` and
``align`` say it of the keys held.

Outside of a session a reduced cache keeps working where nothing has to be translated (one count for all layers, no
padded row, positions kept); elsewhere the next forward raises RuntimeError instead of answering from wrong keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import (
    BaseQuantizedLayer,
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    QuantizedLayer,
)

from vistok.host.rows import pack, take, take_keys


class ReducedLayer(DynamicLayer):
    """The keys and values of one decoder layer, with the column of the unreduced sequence that each key stands for.

    How they are kept is left to the layer's other base: as they are (DynamicLayer), or quantized (``reduced_class``).
    """

    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self.begin()

    def begin(self) -> None:
        """Nothing has been dropped yet."""
        self.columns: Tensor | None = None
        """(B, P) int64: column of the first P keys in the unreduced sequence, -1 for padding put in to keep the batch
        rectangular. Later keys follow one another."""
        self.dropped = 0
        """Tokens seen minus keys held."""
        self.padded = False
        """Whether some key of some row is padding."""
        self.shift: Tensor | None = None
        """(B,) by how much positions were moved down (position="recompact"), or None."""
        self.stage: tuple[int, ...] = ()
        """Layers of equal ``stage`` hold the same columns."""
        self.uneven = False
        """Whether the layers of the cache hold different columns."""
        self.reordered = False
        """Whether rows were moved, picked or repeated since the first key came (beam search)."""
        self.armed = False
        """True during a forward whose masks and positions a session translates."""

    @property
    def held(self) -> int:
        if isinstance(self, BaseQuantizedLayer):
            return self.cumulative_length
        return 0 if not self.is_initialized or self.keys.numel() == 0 else self.keys.shape[-2]

    @property
    def held_keys(self) -> Tensor:
        """(B, Hk, held, d) the keys, as the model gets them back."""
        if not isinstance(self, BaseQuantizedLayer):
            return self.keys
        keys = self._dequantize(self._quantized_keys)
        if isinstance(self, QuantizedLayer):  # moving rows waits for the next update there
            keys = self._apply_pending_reorder(keys, keys)[0]
        return torch.cat([keys, self.keys], -2) if self.keys.numel() else keys

    @property
    def seen(self) -> int:
        return self.held + self.dropped

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.held + query_length, self.dropped

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.armed and (self.padded or self.uneven or self.shift is not None):
            raise RuntimeError(
                "past_key_values: this cache was reduced inside vistok.apply with padded rows, moved positions or a "
                "count of its own in some layers; go on with it inside a `with vistok.apply(...)` block"
            )
        return super().update(key_states, value_states, *args, **kwargs)

    def all_columns(self, batch: int, device: torch.device, held: int | None = None) -> Tensor:
        """(B, held) column of every key held, or of the first ``held`` of them."""
        held = self.held if held is None else held
        known = torch.empty(batch, 0, dtype=torch.int64, device=device)
        if self.columns is not None:
            known = self.columns[:, :held]  # a forward under way has already said what is to come
        later = torch.arange(known.shape[1], held, device=device) + self.dropped
        return torch.cat([known, later.expand(len(known), -1)], 1)

    def keep_columns(self, survives: Tensor) -> None:
        """Let go of all keys but those of the columns ``survives`` (B, seen) bool."""
        index = self._leave(survives)
        self.keys, self.values = take_keys(self.keys, index), take_keys(self.values, index)

    def _leave(self, survives: Tensor) -> Tensor:
        """(B, left) int64: which of the keys held are left; as if the others were gone already."""
        columns = self.all_columns(len(survives), survives.device)
        index = pack((columns >= 0) & survives.gather(1, columns.clamp(min=0)), None)
        self.dropped += columns.shape[1] - index.shape[1]
        self.columns = take(columns, index).masked_fill(index < 0, -1)
        self.padded = self.padded or bool((index < 0).any())
        return index

    def _move_rows(self, move: Callable[[Tensor], Tensor]) -> None:
        self.reordered = True
        for name in ("columns", "shift"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, move(value))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._move_rows(lambda x: x[beam_idx.to(x.device)])

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._move_rows(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._move_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        known = 0 if self.columns is None else self.columns.shape[1]
        if abs(tokens_to_remove) > self.held - known:
            raise RuntimeError(
                f"crop: got {tokens_to_remove}, but only the {self.held - known} tokens that follow the last reduced "
                "prompt can be taken back"
            )
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.begin()

    def empty(self) -> None:
        """Let go of all keys and values (``reset`` keeps their memory, filled with zeros)."""
        self.reset()
        self.keys = self.values = None
        self.is_initialized = False


class ReadingLayer(ReducedLayer):
    """A decoder layer that has no keys of its own and reads those of an earlier one: says which of them."""

    def __init__(self, source: ReducedLayer) -> None:
        """``source``: the layer whose keys it reads."""
        super().__init__()
        self.source = source

    @property
    def held(self) -> int:
        """Keys that it reads; those of a forward under way count from when the source has them."""
        return self.source.seen - self.dropped

    def keep_columns(self, survives: Tensor) -> None:
        self._leave(survives)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._move_rows(lambda x: x[beam_idx.to(x.device)])

    def batch_select_indices(self, indices: Tensor) -> None:
        self._move_rows(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._move_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        """The source has done it."""


def reduced_class(kind: type[DynamicLayer]) -> type[ReducedLayer]:
    """The ReducedLayer that keeps its keys and values as ``kind`` does."""
    if kind not in _CLASSES:
        _CLASSES[kind] = type(f"Reduced{kind.__name__}", (ReducedLayer, kind), {})
    return _CLASSES[kind]


_CLASSES: dict[type[DynamicLayer], type[ReducedLayer]] = {DynamicLayer: ReducedLayer}


def reduced_layers(cache: Cache | None) -> list[ReducedLayer]:
    """The layers of a cache that an earlier prompt was reduced into; [] for any other."""
    return [layer for layer in (cache.layers if cache is not None else ()) if isinstance(layer, ReducedLayer)]


def held(cache: Cache | None, layer: int) -> int:
    """Keys that a layer of any cache holds."""
    if cache is None or layer >= len(cache.layers):
        return 0
    if isinstance(quantized := cache.layers[layer], BaseQuantizedLayer):
        return quantized.cumulative_length
    keys = getattr(cache.layers[layer], "keys", None)
    return keys.shape[-2] if keys is not None and keys.numel() else 0


def adopt(cache: Cache, num_layers: int, sources: Mapping[int, int] | None = None) -> list[ReducedLayer]:
    """Make every layer of ``cache`` that holds keys a ReducedLayer, in place. ValueError for other kinds of cache.

    ``sources``: for each layer that reads the keys of an earlier one, which; it becomes a ReadingLayer.
    """
    sources = sources or {}
    while len(cache.layers) < num_layers:  # DynamicCache() without a config makes its layers as they are first used
        cache.layers.append(DynamicLayer())
    for index, old in enumerate(cache.layers):
        if isinstance(old, ReducedLayer) or type(old) is LinearAttentionLayer:
            continue
        if index in sources:
            cache.layers[index] = ReadingLayer(cast(ReducedLayer, cache.layers[sources[index]]))
            continue
        # A window that has seen nothing yet may hold all keys instead: its mask then says what it sees.
        fresh_window = type(old) is DynamicSlidingWindowLayer and not old.is_initialized
        if not (type(old) is DynamicLayer or isinstance(old, BaseQuantizedLayer) or fresh_window):
            raise ValueError(
                f"past_key_values: got a {type(old).__name__} for layer {index}; vistok reduces a DynamicCache or a "
                "QuantizedCache without filled sliding windows only: leave cache_implementation unset, or 'quantized'"
            )
        if fresh_window:
            cache.layers[index] = ReducedLayer()
            continue
        old.__class__ = reduced_class(type(old))
        old.begin()
    return reduced_layers(cache)


def past_mask(columns: Tensor, mask: Tensor | None) -> Tensor:
    """(B, held) bool: which keys from earlier calls are not padding, from their ``columns`` (B, held). ``mask``
    (B, seen + new) or None."""
    real = columns >= 0
    return real if mask is None else real & mask.bool().gather(1, columns.clamp(min=0))


def align(past: Tensor, new: Tensor, dropped: int) -> Tensor:
    """The 2-D padding mask over the tokens seen whose last columns are those of the keys held (see the module).

    ``past`` (B, held) and ``new`` (B, coming) bool; (B, dropped + held + coming)."""
    return pad(torch.cat([past, new], 1), (dropped, 0), value=False)
