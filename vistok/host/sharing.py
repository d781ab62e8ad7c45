"""Decoders whose last layers keep no keys and values but read those of an earlier layer of their kind.

A token that is dropped before such a layer is gone for it, as for any other: the layer is handed the keys of the tokens
that are left, gathered from those of the layer that made them, in the prefill and for every token of the answer. That
layer itself still attends to all that it saw, so its keys stay, and a stage after it saves no memory of the cache. The
keys were turned by the positions which that layer had, and so are the queries that meet them: where positions close up
("recompact"), they do so for the layers that make keys.

What nobody reads need not be computed: from the first of these layers on that no stage follows, only the columns go on
whose logits are wanted (in ``generate`` the last one), as the model's own code has it where nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

from torch import Tensor

from vistok.host.blocks import BlockStream
from vistok.host.rows import places, take, take_keys


class SharingStream(BlockStream):
    """A BlockStream of layers that read the keys of ``sources``, and of which each may have an input of its own for
    every token."""

    def __init__(
        self, *args: Any, sources: Mapping[int, int], own: Tensor | None = None, wanted: int = 0, **how: Any
    ) -> None:
        """``sources``: for each layer that reads the keys of an earlier one, which; ``own`` (B, T, layers, P): the
        tokens' own inputs of the layers, or None; ``wanted``: of how many columns, the last, logits are wanted, 0 for
        all. ``how``: as for BlockStream."""
        super().__init__(*args, **how)
        self.sources, self.own, self.wanted = sources, own, wanted
        self._last = 0
        self._stored: dict[int, tuple[Any, Tensor, tuple[Tensor, Tensor]]] = {}
        self._gathered: dict[Any, tuple[Tensor, Tensor]] = {}
        self._reads: dict[int, Tensor] = {}

    def inputs(self) -> dict[str, Any]:
        given = super().inputs()
        if self.own is not None and self.narrowings:
            given["per_layer_inputs"] = take(self.own, self.index)
        alike = all(layer.stage == self.layers[0].stage for layer in self.layers)
        if self.sources and self.wanted and (self.stages or not alike):
            given["logits_to_keep"] = 0  # which columns those are is then for ``tail``
        else:
            self.wanted = 0
        return given

    def feed(self, layer: int, hidden: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        fed = super().feed(layer, hidden, given)
        narrowed = self._given is None or self._given[0] != self.narrowings
        if narrowed and fed.get("per_layer_input") is not None:
            fed["per_layer_input"] = take(fed["per_layer_input"], self._local)
        if layer in self.sources.values():
            self._stored[layer] = self._key(layer), self.index, fed["position_embeddings"]
        if layer in self.sources:
            fed |= self._read(layer, fed["shared_kv_states"])
        if self._last:
            part = slice(-self._last, None)
            fed["attention_mask"] = fed["attention_mask"][:, :, part]
            fed["position_embeddings"] = tuple(t[:, part] for t in fed["position_embeddings"])
            if fed.get("per_layer_input") is not None:
                fed["per_layer_input"] = fed["per_layer_input"][:, part]
        return fed

    def tail(self, layer: int, hidden: Tensor) -> Tensor | None:
        fewer = 0 < self.wanted < hidden.shape[1]
        if not fewer or self._last or layer not in self.sources or any(stage > layer for stage in self.stages):
            return None
        self._last = self.wanted
        return hidden[:, -self._last :]

    def past_keys(self, layer: int) -> tuple[Tensor, Tensor] | None:
        if layer not in self.sources:
            return super().past_keys(layer)
        if not self.layers or not self._held[layer]:
            return None
        return self._reads[layer][:, :, : self._held[layer]], self.past_real(layer)

    def _read(self, layer: int, shared: Any) -> dict[str, Any]:
        """What ``layer`` is given of the layer whose keys it reads: nothing new where both hold the same columns."""
        source = self.sources[layer]
        kind = self.language_model.config.layer_types[layer]
        stage, index, rotary = self._stored[source]
        key = self._key(layer)
        if key == stage:
            self._reads[layer] = shared[kind][0]
            return {}
        if (key, kind) not in self._gathered:
            theirs, mine = index, self.index
            if self.layers:
                theirs, mine = (self.layers[n].all_columns(self.batch, self.device) for n in (source, layer))
            at = _where(mine, theirs, self.seen + self.width)
            keys, values = shared[kind]
            self._gathered[key, kind] = take_keys(keys, at), take_keys(values, at)
        shared = copy(shared)
        shared[kind] = self._gathered[key, kind]
        self._reads[layer] = shared[kind][0]
        at = _where(self.index, index, self.width)
        return {"shared_kv_states": shared, "position_embeddings": tuple(take(t, at) for t in rotary)}


def _where(mine: Tensor, theirs: Tensor, width: int) -> Tensor:
    """(B, M) int64: where in ``theirs`` (B, N), columns of ``width`` or -1, each of ``mine`` (B, M) is; -1 for none."""
    return places(theirs, width).gather(1, mine.clamp(min=0)).masked_fill(mine < 0, -1)
