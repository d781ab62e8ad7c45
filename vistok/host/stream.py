"""One forward of the language model over fewer tokens than its caller thinks: each layer's masks, positions, cache."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import BaseQuantizedLayer, Cache
from transformers.masking_utils import create_causal_mask

from vistok.core.position import recompact_positions
from vistok.host.cache import ReducedLayer, align, past_mask
from vistok.host.rows import take

Rotary = tuple[Tensor, Tensor]


class Stream:
    """The sequence on its way through the decoder. ``narrow`` drops columns from a layer on, ``widen`` brings some
    back; ``feed`` gives a layer the tensors of its length where they are not those that the language model prepared."""

    def __init__(
        self,
        language_model: Any,
        cache: Cache | None,
        layers: list[ReducedLayer],
        shape: tuple[int, int],
        positions: Tensor | None,
        mask: Tensor | None,
        recompact: bool,
        device: torch.device,
    ) -> None:
        """``shape``: rows and columns (B, T) of this forward; ``positions`` (..., B or 1, T) position ids or None;
        ``mask`` (B, seen + T) the caller's padding mask or None."""
        self.language_model, self.cache, self.layers = language_model, cache, layers
        self.batch, self.width, self.device, self.recompact = *shape, device, recompact
        self.seen = layers[0].seen if layers else 0
        if mask is not None and mask.shape != (self.batch, self.seen + self.width):
            raise ValueError(
                f"attention_mask: got shape {tuple(mask.shape)}, must be {(self.batch, self.seen + self.width)} inside "
                "vistok.apply: rows, and tokens of this call and of the calls that the cache comes from"
            )
        self.mask = mask
        self.valid = None if mask is None else mask[:, -self.width :].bool()
        if positions is None:
            positions = torch.arange(self.seen, self.seen + self.width, device=device)[None]
        elif positions.ndim == 3 and positions.shape[0] == 4:
            positions = positions[1:]  # Qwen's first axis only serves packed sequences, and gaps are no packing
        self.positions = positions.expand(*positions.shape[:-2], self.batch, self.width)
        self.index = torch.arange(self.width, device=device).expand(self.batch, -1)
        self.narrowings = 0
        self.stages: Collection[int] = ()
        """The decoder layers before which columns will be dropped or come back."""
        self._before = [(layer.dropped, layer.stage, layer.shift) for layer in layers]
        self._held = [layer.held for layer in layers]
        self._past: dict[tuple[int, ...], Tensor] = {}
        self._given: tuple[int, tuple[int, ...]] | None = None
        self._local = self.index
        self._now: dict[tuple[int, tuple[int, ...]], dict[str, Any]] = {}

    # What the layers hold ----------------------------------------------------------------------------------------

    @property
    def real(self) -> Tensor | None:
        """(B, T') bool: which tokens of the sequence as it is now are not padding; None if all are."""
        if self.valid is None and not self.narrowings:
            return None
        there = self.index >= 0
        return there if self.valid is None else there & take(self.valid, self.index)

    def past_real(self, layer: int) -> Tensor:
        """(B, held) bool: which keys that ``layer`` holds from earlier calls are not padding."""
        stage = self._before[layer][1]
        if stage not in self._past:
            self._past[stage] = past_mask(self.past_columns(layer), self.mask)
        return self._past[stage]

    def past_columns(self, layer: int) -> Tensor:
        """(B, held): the column of each key that ``layer`` holds from earlier calls."""
        return self.layers[layer].all_columns(self.batch, self.device, self._held[layer])

    def past_keys(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """The keys (B, Hk, P, d) that ``layer`` holds from earlier calls and which of them are real (B, P), if any."""
        if not self.layers or not self._held[layer]:
            return None
        return self.layers[layer].held_keys, self.past_real(layer)

    def narrow(self, index: Tensor, layer: int = 0) -> None:
        """From decoder layer ``layer`` on, only the columns ``index`` (B, T') of the sequence as it is now go on (-1 is
        padding)."""
        gone = index < 0
        self._local = take(self._local, index).masked_fill(gone, -1)
        self._go_on(take(self.index, index).masked_fill(gone, -1), layer)

    def widen(self, index: Tensor, layer: int) -> None:
        """From decoder layer ``layer`` on, the columns ``index`` (B, T') of the prompt go on (-1 is padding), some of
        which had not before. Only where the language model was given the whole prompt."""
        self._local = index
        self._go_on(index, layer)

    def _go_on(self, index: Tensor, layer: int) -> None:
        """From decoder layer ``layer`` on, the sequence is the columns ``index`` (B, T') of the prompt."""
        self.index = index
        self.narrowings += 1
        real = self.real
        new_padding = real is not None and not bool(real.all())
        if layer:
            for kept in self.layers:
                kept.uneven = True
        shifted: dict[tuple[int, ...], Tensor | None] = {}
        columns: dict[tuple[int, ...], Tensor] = {}
        for number in range(layer, len(self.layers)):
            kept = self.layers[number]
            dropped, stage, shift = self._before[number]
            if stage not in columns:
                coming = torch.where(self.index < 0, -1, self.index + self.seen)
                columns[stage] = torch.cat([self.past_columns(number), coming], 1)
                shifted[stage] = self.place(shift)[1]
            kept.columns = columns[stage]
            kept.dropped = dropped + self.width - self.index.shape[1]
            kept.padded = kept.padded or new_padding
            kept.stage = (*stage, self.narrowings)
            kept.shift = shifted[stage]

    def cut(self, first: int) -> None:
        """Once the prompt is read: let go of the keys in decoder layers ``first`` and later that the last layer does
        not hold. Quantized ones stay."""
        last = self.layers[-1]
        columns = last.all_columns(self.batch, self.device)
        survives = torch.zeros(self.batch, last.seen + 1, dtype=torch.bool, device=self.device)
        survives = survives.scatter(1, torch.where(columns < 0, last.seen, columns), True)[:, : last.seen]
        for layer in self.layers[first:-1]:
            if not isinstance(layer, BaseQuantizedLayer):
                layer.keep_columns(survives)
                same = torch.equal(layer.all_columns(self.batch, self.device), columns)
                alike = same and layer.shift is last.shift is None
                layer.stage = last.stage if alike else (*layer.stage, self.narrowings + 1)

    # Positions ----------------------------------------------------------------------------------------------------

    def place(self, shift: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Position ids (..., B, T') of the sequence as it is now, in a layer whose earlier positions were moved down by
        ``shift`` (B,) or None; and by how much later ones are to be moved down."""
        moved = self.positions if shift is None else self.positions - shift[:, None]
        if not self.recompact:
            return take(moved, self.index, -1), shift
        real = self.real
        real = torch.ones_like(self.index, dtype=torch.bool) if real is None else real
        valid = torch.ones_like(moved[..., :1], dtype=torch.bool) if self.valid is None else self.valid
        out = recompact_positions(moved, self.index.clamp(min=0), real)
        high = torch.iinfo(moved.dtype).max
        first = _over_axes(moved.masked_fill(~valid, high), "amin")
        out = out - (_over_axes(out.masked_fill(~real, high), "amin") - first)[:, None]
        last = _over_axes(self.positions.masked_fill(~valid, 0), "amax")
        return out, last - _over_axes(out.masked_fill(~real, 0), "amax")

    # What the language model and its layers are given ---------------------------------------------------------------

    def inputs(self) -> dict[str, Any]:
        """``attention_mask`` and ``position_ids`` for the language model, whose own code serves the layers that hold
        what layer 0 holds."""
        self._given = self._key(0)
        self._local = torch.arange(self.index.shape[1], device=self.device).expand(self.batch, -1)
        return {"attention_mask": self._padding(0), "position_ids": self._positions(0)}

    def feed(self, layer: int, hidden: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of decoder layer ``layer``, made of those ``given`` by the language model."""
        key = self._key(layer)
        if key == self._given:
            # Flash attention reads packed sequences out of position ids, and gaps are no packing.
            return given if not self.narrowings else given | {"position_ids": None}
        if key not in self._now:
            mask = create_causal_mask(
                config=self.language_model.config,
                inputs_embeds=hidden,
                attention_mask=self._padding(layer),
                past_key_values=self.cache,
                layer_idx=self.number(layer),
            )
            if self.recompact or any(shift is not None for _, _, shift in self._before):
                rotary = self.language_model.rotary_emb(hidden, self._positions(layer))
            else:
                rotary = tuple(take(t, self._local) for t in given["position_embeddings"])
            self._now[key] = {"attention_mask": mask, "position_embeddings": rotary, "position_ids": None}
        return given | self._now[key]

    def tail(self, layer: int, hidden: Tensor) -> Tensor | None:
        """What of ``hidden`` (B, T', D) decoder layer ``layer`` and those after it are to compute, None for all: the
        last columns where no other is asked for any more."""
        return None

    def number(self, layer: int) -> int:
        """Which layer of the decoder ``layers[layer]`` is."""
        return layer

    def _key(self, layer: int) -> tuple[int, tuple[int, ...]]:
        return self.narrowings, self.layers[layer].stage if self.layers else ()

    def _positions(self, layer: int) -> Tensor:
        if self.narrowings:
            return self.place(self._before[layer][2] if self.layers else None)[0]
        shift = self.layers[layer].shift if self.layers else None
        return self.positions if shift is None else self.positions - shift[:, None]

    def _padding(self, layer: int) -> Tensor | None:
        """The 2-D mask for a layer, or None where there is no padding."""
        real = self.real
        if not self.layers:
            return real
        kept = self.layers[layer]
        if self.mask is None and not kept.padded:
            return None
        new = torch.ones_like(self.index, dtype=torch.bool) if real is None else real
        return align(self.past_real(layer), new, kept.dropped)


def _over_axes(x: Tensor, how: str) -> Tensor:
    """(B,) smallest or largest of ``x`` (B, T) or (3, B, T) over axes and tokens."""
    x = getattr(x, how)(-1)
    return getattr(x, how)(0) if x.ndim == 2 else x
