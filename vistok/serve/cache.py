"""What the vision encoder made of the pictures that were asked about lately.

    cache = FeatureCache(model, max_bytes=2**30)
    Runner(model, processor, around=cache.around)

A second question on a picture does not run the encoder again: not in a conversation, not for another client, and not
with another method that asks for the same evidence. What is kept per picture is its tokens for the language model, and
the evidence that methods asked for (``vistok.host.reuse``); what was used least lately goes when there is no room.

Pictures are known by the hash of their pixels. So a client can tell by the time of its answer whether somebody has
lately sent the very same picture; where that must not be, set ``max_bytes`` to 0.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from vistok.host.reuse import Encoded, Field, reuse
from vistok.serve.runner import Ask


@dataclass(frozen=True)
class CacheStats:
    """What a cache did since it was made, and what it holds."""

    hits: int
    """Pictures of batches that were not encoded; one that comes twice in a batch counts once."""
    misses: int
    """Those that were, also for want of evidence that the method asked for."""
    evictions: int
    """Pictures that had to make room."""
    entries: int
    bytes: int


class FeatureCache:
    """A cache for ``model`` of at most ``max_bytes`` (0: nothing is kept), on the model's own device.

    A picture that alone has more is not kept. One thread runs batches; ``stats`` may be asked from any. Raises
    ValueError for ``max_bytes`` below 0.
    """

    def __init__(self, model: nn.Module, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes: got {max_bytes}, must be at least 0")
        self._model, self._max_bytes = model, max_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, Encoded] = OrderedDict()
        self._bytes = self._hits = self._misses = self._evictions = 0

    def around(self, asks: Sequence[Ask], inputs: Mapping[str, Tensor]) -> AbstractContextManager[Any]:
        """For ``Runner``: the pictures of ``asks`` are looked up, and those encoded that are not there."""
        digests = [[shown.digest for shown in ask.pictures] for ask in asks]
        if not self._max_bytes or not all(digests):
            return nullcontext()
        return reuse(self._model, digests, inputs["input_ids"], self)

    def stats(self) -> CacheStats:
        """The present figures."""
        with self._lock:
            return CacheStats(self._hits, self._misses, self._evictions, len(self._entries), self._bytes)

    # What ``reuse`` asks for -------------------------------------------------------------------------------------

    def get(self, key: Hashable, fields: Collection[Field]) -> Encoded | None:
        """See ``vistok.host.reuse.Store``."""
        with self._lock:
            found = self._entries.get(key)
            if found is None or not found.fields.keys() >= set(fields):
                self._misses += 1
                return None
            self._hits += 1
            self._entries.move_to_end(key)
            return found

    def put(self, key: Hashable, encoded: Encoded) -> None:
        """See ``vistok.host.reuse.Store``; evidence that other methods have asked for stays, if there is room."""
        with self._lock:
            before = self._entries.pop(key, None)
            if before is not None:
                self._bytes -= before.nbytes
                both = replace(encoded, fields={**before.fields, **encoded.fields})
                encoded = both if both.nbytes <= self._max_bytes else encoded
            if encoded.nbytes > self._max_bytes:
                return
            while self._bytes + encoded.nbytes > self._max_bytes:
                _, gone = self._entries.popitem(last=False)
                self._bytes -= gone.nbytes
                self._evictions += 1
            self._entries[key] = encoded
            self._bytes += encoded.nbytes


__all__ = ["CacheStats", "FeatureCache"]
