"""What a session counts: pictures, milliseconds, floating-point operations, bytes of the KV cache."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import BaseQuantizedLayer, Cache, LinearAttentionLayer

from vistok.core import flops
from vistok.host.hooks import Hooks
from vistok.host.hosts import Host
from vistok.host.pictures import Group, Picture
from vistok.host.vision import Probe

Mark = float | torch.cuda.Event


class Log:
    """Counts since the last run of the vision encoder; a later turn without a picture adds to it."""

    def __init__(self, host: Host, probe: Probe) -> None:
        self.host, self.probe = host, probe
        self.pictures: list[Picture] = []
        self.kv_bytes = 0
        self.flops: dict[str, int] = {}
        self._spans: dict[str, list[tuple[Mark, Mark]]] = {}
        self._cuda = next(host.model.parameters()).is_cuda
        self._stage = ""
        self._start: Mark | None = None
        self._vision: Mark | None = None
        self._clear()

    def _clear(self) -> None:
        self.flops = {"vision": 0, "prefill": 0, "decode": 0}
        self._spans = {name: [] for name in ("vision", "select", "inside", "prefill", "decode")}

    # Time ------------------------------------------------------------------------------------------------------------

    def _mark(self) -> Mark:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # read later: marking does not make the host wait for the device
        event.record()
        return event

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        start = self._mark()
        yield
        self._spans[name].append((start, self._mark()))

    @property
    def milliseconds(self) -> dict[str, float]:
        """By stage; prefill and decode are the language model's layers, without selection and without the head."""
        if self._cuda:
            torch.cuda.synchronize()
        spent = {name: sum(_between(a, b) for a, b in spans) for name, spans in self._spans.items()}
        inside = spent.pop("inside")
        spent["select"] += inside
        spent["prefill"] -= inside
        return spent

    # Hooks -----------------------------------------------------------------------------------------------------------

    def watch(self, hooks: Hooks) -> None:
        def encodes(module: Any, args: Any, kwargs: Any) -> None:
            if self.probe.new_prompt(self.host.kind):
                self._clear()
                self._vision = self._mark()

        def encoded(module: Any, args: Any, output: Any) -> None:
            if self._vision is not None:  # the projector may be the encoder's last part or come after it
                self._spans["vision"] = [(self._vision, self._mark())]

        def reads(module: Any, args: Any, kwargs: Any) -> None:
            rows = args[0].shape[:-1].numel()
            self.flops[self._stage or "prefill"] += flops.linear(rows, *reversed(module.weight.shape))

        for tower in self.host.towers:
            hooks.before(tower, encodes)
            hooks.after(tower, encoded)
        hooks.after(self.host.projector, encoded)
        hooks.before(self.host.head, reads)

    def leaves_encoder(self) -> None:
        """The encoder is through; what runs of it (the projector) from now on is selection."""
        if self._vision is not None and self.probe.run is not None:
            self.flops["vision"] = sum(self.host.vision_flops(run) - run.saved for run in self.probe.run.all)
        if self.probe.run is not None:
            self.probe.run.read = True
        self._vision = None

    # The language model ----------------------------------------------------------------------------------------------

    def starts(self, stage: str) -> None:
        """The language model is about to run its ``stage``, "prefill" or "decode"."""
        self._stage, self._start = stage, self._mark()

    def enters(self, layer: Any, number: int, hidden: Tensor, kwargs: dict[str, Any], spent: int | None = None) -> None:
        """Decoder layer ``number`` is about to run on ``hidden`` (B, T, D). ``spent``: its floating-point operations,
        where they are not those of a dense layer."""
        if spent is not None:
            self.flops[self._stage] += spent
            return
        batch, width = hidden.shape[:2]
        keys = self.host.layer_keys(number, width, kwargs)
        self.flops[self._stage] += batch * self.host.layer_flops(layer, width, keys)

    def ends(self, cache: Cache | None) -> None:
        if self._start is not None:
            self._spans[self._stage].append((self._start, self._mark()))
        self._start = None
        self.kv_bytes = sum(
            t.numel() * t.element_size()
            for layer in (cache.layers if cache is not None else ())
            for t in _tensors(layer)
            if t is not None
        )

    # Pictures --------------------------------------------------------------------------------------------------------

    def sees(self, pictures: Iterable[Picture]) -> None:
        self.pictures = sorted(pictures, key=lambda p: (p.row, p.index))

    def left_at(self, layer: int, groups: list[Group]) -> None:
        """After the stage before decoder layer ``layer``."""
        left = {
            (place.prompt, place.index): group.positions[i]
            for group in groups
            for i, place in enumerate(group.places)
            if not place.copy
        }
        for picture in self.pictures:
            positions = left[picture.row, picture.index]
            picture.layers[layer] = len(positions)
            picture.layer_keep[layer] = positions


def _tensors(layer: Any) -> list[Tensor | None]:
    """What a layer of a cache holds: keys and values, quantized or not, or the states of linear attention."""
    if isinstance(layer, LinearAttentionLayer):
        return [*layer.conv_states.values(), *layer.recurrent_states.values()]
    quantized = []
    if isinstance(layer, BaseQuantizedLayer):
        quantized = [*stored(layer._quantized_keys), *stored(layer._quantized_values)]
    return [layer.keys, layer.values, *quantized]


def stored(value: Any) -> Iterator[Tensor]:
    """The plain tensors that make up a quantized one, in whichever way its backend keeps it."""
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from stored(part)
    elif isinstance(value, Mapping):
        yield from stored(list(value.values()))
    elif isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        yield from stored([getattr(value, name) for name in value.__tensor_flatten__()[0]])
    elif isinstance(value, Tensor):
        yield value


def _between(start: Mark, end: Mark) -> float:
    if isinstance(start, float) or isinstance(end, float):
        return (end - start) * 1e3  # type: ignore[operator]
    return start.elapsed_time(end)
