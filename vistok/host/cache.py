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

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer


class ReducedLayer(DynamicLayer):
    """The keys and values of one decoder layer, with the column of the unreduced sequence that each key stands for."""

    def __init__(self) -> None:
        super().__init__()
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
        self.armed = False
        """True during a forward whose masks and positions a session translates."""

    @property
    def held(self) -> int:
        return 0 if not self.is_initialized or self.keys.numel() == 0 else self.keys.shape[-2]

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

    def all_columns(self, batch: int, device: torch.device) -> Tensor:
        """(B, held) column of every key held."""
        known = torch.empty(batch, 0, dtype=torch.int64, device=device)
        if self.columns is not None:
            known = self.columns[:, : self.held]  # a forward under way has already said what is to come
        later = torch.arange(known.shape[1], self.held, device=device) + self.dropped
        return torch.cat([known, later.expand(len(known), -1)], 1)

    def _index_rows(self, rows: Tensor) -> None:
        for name in ("columns", "shift"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, value[rows.to(value.device)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._index_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._index_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        for name in ("columns", "shift"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, value.repeat_interleave(repeats, dim=0))

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
        self.columns, self.dropped, self.padded, self.uneven, self.shift, self.stage = None, 0, False, False, None, ()


def reduced_layers(cache: Cache | None) -> list[ReducedLayer]:
    """The layers of a cache that an earlier prompt was reduced into; [] for any other."""
    layers = cache.layers if cache is not None else []
    return layers if layers and isinstance(layers[0], ReducedLayer) else []


def adopt(cache: Cache, num_layers: int) -> list[ReducedLayer]:
    """Make every layer of ``cache`` a ReducedLayer, in place, with its keys. ValueError for other kinds of cache."""
    while len(cache.layers) < num_layers:  # DynamicCache() without a config makes its layers as they are first used
        cache.layers.append(DynamicLayer())
    for index, old in enumerate(cache.layers):
        if isinstance(old, ReducedLayer):
            continue
        # A window that has seen nothing yet may hold all keys instead: its mask then says what it sees.
        fresh_window = type(old) is DynamicSlidingWindowLayer and not old.is_initialized
        if type(old) is not DynamicLayer and not fresh_window:
            raise ValueError(
                f"past_key_values: got a {type(old).__name__} for layer {index}; vistok reduces a DynamicCache without "
                "filled sliding windows only, so leave cache_implementation unset"
            )
        new = ReducedLayer()
        if old.is_initialized:
            new.lazy_initialization(old.keys, old.values)
            new.keys, new.values = old.keys, old.values
        cache.layers[index] = new
    return cache.layers


def past_mask(layer: ReducedLayer, mask: Tensor | None, batch: int, device: torch.device) -> Tensor:
    """(B, held) bool: which keys a layer holds from earlier calls are not padding. ``mask`` (B, seen + new) or None."""
    columns = layer.all_columns(batch, device)
    real = columns >= 0
    return real if mask is None else real & mask.bool().gather(1, columns.clamp(min=0))


def align(past: Tensor, new: Tensor, dropped: int) -> Tensor:
    """The 2-D padding mask over the tokens seen whose last columns are those of the keys held (see the module).

    ``past`` (B, held) and ``new`` (B, coming) bool; (B, dropped + held + coming)."""
    return pad(torch.cat([past, new], 1), (dropped, 0), value=False)
