"""Methods for vision transformers inside the vision encoder of a vision-language model: "pitome@encoder".

The encoder's blocks run on fewer tokens. What it leaves gets a row for every patch again, so that selection of layers,
projector and pooling find what they know. Before the language model one token of each slot that left the encoder goes
on, the one at whose place the slot stands: ``Standing``, a reducer as any other, and the first of the session.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vistok.core.tensors import take
from vistok.host.hooks import Hooks
from vistok.host.hosts import Host, UnsupportedModel
from vistok.host.pictures import Place
from vistok.host.reducer import LayerSpec, Reducer, Reduction
from vistok.host.vision import Probe
from vistok.host.vit.engine import TracedHooks, ViTEngine
from vistok.host.vit.models import vit_of
from vistok.host.vit.reducer import ViTReducer
from vistok.host.vit.state import TokenState

SUFFIX = "@encoder"


@dataclass(frozen=True)
class Standing(Reducer):
    """One token for each slot that left the encoder. Where the model makes one token of several patches, a token goes
    if none of its patches has a slot standing at its place."""

    whole_picture = True

    @property
    def needs(self) -> Mapping[str, LayerSpec]:
        return {"anchor": None}

    def compress(self, evidence: Any, keep: int) -> Reduction:
        anchor: Tensor = evidence.anchor
        stands = anchor == torch.arange(anchor.shape[1], device=anchor.device)
        index = stands.nonzero()[:, 1].view(len(anchor), keep)
        slot = (stands.cumsum(1) - 1).gather(1, anchor.clamp_min(0))
        return Reduction(index, take(evidence.features, index), torch.where(anchor < 0, -1, slot))


def in_encoder(method: Any) -> bool:
    """Whether a method given to ``apply`` is to act inside the vision encoder."""
    return method.endswith(SUFFIX) if isinstance(method, str) else isinstance(method, ViTReducer)


class EncoderSide:
    """``methods`` in the vision encoder of ``host``; ``probe`` is told which patches stand for which."""

    def __init__(self, host: Host, methods: Sequence[ViTReducer], probe: Probe) -> None:
        if len(host.towers) > 1:
            raise UnsupportedModel(
                f"{host.name}: methods inside the encoder are not supported where videos have an encoder of their own"
            )
        self.host, self.probe = host, probe
        self.engine = ViTEngine(vit_of(host.tower), methods, False)

    @property
    def tokens(self) -> list[int]:
        """Tokens of a picture (a crop, a frame) that left each block, prefix tokens not counted."""
        return [state.num_slots for state in self.engine.log.states[1:]]

    def install(self, hooks: Hooks) -> None:
        traced = TracedHooks()
        hooks.undo(traced.remove)
        self.engine.install(traced)
        traced.after(self.host.tower, self._leaves)
        self.probe.states = self._left

    def close(self) -> None:
        self.engine.close()
        self.probe.states = None

    def standing(self, place: Place) -> int:
        """Tokens of a picture that ``Standing`` leaves."""
        found = self.probe.evidence({"anchor": None}, place.layout, torch.tensor([place.first_patch]))["anchor"]
        return int((found[0] == torch.arange(found.shape[1], device=found.device)).sum())

    def _left(self) -> Mapping[int, TokenState]:
        """What has left each block so far in the run that is under way."""
        run = self.engine.log.run
        return {} if run is None else run.left

    def _leaves(self, module: Any, args: Any, output: Any) -> Any:
        states, run = self.engine.log.states, self.probe.run
        if run is not None:
            run.anchor = _standing_for(states[self.host.feature_layer])
            run.saved += self.engine.log.saved
        whole: dict[str, Any] = {"last_hidden_state": _whole(states[-1], output.last_hidden_state)}
        if output.get("hidden_states") is not None:
            pairs = zip(states, output.hidden_states, strict=True)
            whole["hidden_states"] = tuple(None if x is None else _whole(state, x) for state, x in pairs)
        return type(output)(**{**output, **whole})


def _whole(state: TokenState, x: Tensor) -> Tensor:
    """``x`` (U, P + K, C) with a row for every patch: its slot's, of a dropped one the nearest slot's."""
    return x if state.untouched else state.restored(x, "nearest")


def _standing_for(state: TokenState) -> Tensor:
    """(U * N,) int64, flat over the patches of all units: the patch at whose place each one's slot stands, -1 where it
    was dropped. ValueError for a slot that stands nowhere."""
    if bool((state.anchor < 0).any()):
        raise ValueError(
            "method: leaves tokens that stand for no patch, which have no place in a prompt; such methods are for "
            "vision transformers alone"
        )
    at = state.flat_anchor.gather(1, state.source.clamp_min(0))
    return torch.where(state.source < 0, -1, at).flatten()
