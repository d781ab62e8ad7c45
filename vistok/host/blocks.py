"""Decoders whose masks are more than causal: both ways within blocks (a picture, a prefix), and sliding windows.

What a token may see is said of the columns of the unreduced sequence, so one that stays sees of those that stay exactly
what it would see in the dense model: a window ends where it did, however many tokens in it are gone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from vistok.host.rows import take
from vistok.host.stream import Stream


class BlockStream(Stream):
    """A Stream that makes every mask itself, as (B, 1, Q, K)."""

    def __init__(
        self, *args: Any, blocks: Tensor | None, windows: Sequence[int | None], causal: Collection[int] = ()
    ) -> None:
        """``blocks`` (B, T) int64: tokens of one number see one another, -1 is none. ``windows``: for each layer how
        many columns back its tokens see, their own included, or None. ``causal``: the layers in which blocks count
        nothing."""
        super().__init__(*args)
        self.windows, self.causal = windows, causal
        self._made: dict[Any, dict[str, Any]] = {}
        none = torch.full((self.batch, self.width), -1, device=self.device)
        self._blocks = none if blocks is None else blocks.to(self.device)
        if any(windows):
            for kept in self.layers:
                kept.uneven = True  # the model's own windows count keys, of which some are gone

    def inputs(self) -> dict[str, Any]:
        given = super().inputs()
        names = getattr(self.language_model.config, "layer_types", None)
        if names is None:
            return given | {"attention_mask": self._mask(0)}
        return given | {"attention_mask": {name: self._mask(names.index(name)) for name in set(names)}}

    def feed(self, layer: int, hidden: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        stage, names = self._key(layer), getattr(self.language_model.config, "layer_types", None)
        if stage == self._given:
            return given | {"position_ids": None}
        kind = None if names is None else names[layer]
        if (stage, kind) not in self._made:
            rotary = tuple(take(t, self._local) for t in given["position_embeddings"])
            if self.recompact or any(shift is not None for _, _, shift in self._before):
                more = () if kind is None else (kind,)
                rotary = self.language_model.rotary_emb(hidden, self._positions(layer), *more)
            self._made[stage, kind] = {
                "attention_mask": self._mask(layer),
                "position_embeddings": rotary,
                "position_ids": None,
            }
        return given | self._made[stage, kind]

    def _mask(self, layer: int) -> Tensor:
        now = torch.where(self.index < 0, -1, self.index + self.seen)
        mine = take(self._blocks, self.index).masked_fill(self.index < 0, -1)
        real = torch.ones_like(now, dtype=torch.bool) if self.real is None else self.real
        keys, theirs, past = now, mine, 0
        if self.layers:
            held = self.past_columns(layer)
            past = held.shape[1]
            keys, theirs = torch.cat([held, now], 1), torch.cat([torch.full_like(held, -1), mine], 1)
            real = torch.cat([self.past_real(layer), real], 1)
        q, k = now[:, :, None], keys[:, None]
        allowed = k <= q
        if layer not in self.causal:
            allowed |= (theirs[:, None] == mine[:, :, None]) & (mine >= 0)[:, :, None]
        window = self.windows[layer]
        if window is not None:
            allowed &= k > q - window
        allowed &= real[:, None]
        places = torch.arange(now.shape[1], device=self.device)
        allowed[:, places, places + past] = True  # padding sees itself: a row of nothing would give NaN
        if self.language_model.config._attn_implementation != "eager":
            return allowed[:, None]
        dtype = self.language_model.dtype
        return torch.zeros((), dtype=dtype, device=self.device).masked_fill(~allowed[:, None], torch.finfo(dtype).min)
