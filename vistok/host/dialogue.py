"""A conversation whose pictures are chosen from again for every question (``apply(..., reselect=True)``).

All that the language model was given so far is kept on the side, the whole pictures included. When a new turn comes,
its cache is emptied and the conversation is read once more, with the tokens that the method chooses for the new
question; the vision encoder does not run again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from vistok.host.cache import ReducedLayer, reduced_layers
from vistok.host.prompt import Prompt
from vistok.host.vision import VisionRun

_DEEP = ("visual_pos_masks", "deepstack_visual_embeds")


class Dialogue:
    """What a language model was given since a prompt with pictures, on one cache."""

    def __init__(self, prompt: Prompt, run: VisionRun | None, kwargs: dict[str, Any]) -> None:
        """``kwargs``: the language model's arguments for the prompt, nothing reduced."""
        self.prompt, self.run = prompt, run
        self.embeds: Tensor = kwargs["inputs_embeds"]
        self.positions = _positions(kwargs, 0)
        self.deep = {name: kwargs[name] for name in _DEEP if kwargs.get(name) is not None}
        self.cache: Cache | None = kwargs.get("past_key_values")

    def goes_on(self, kwargs: dict[str, Any]) -> bool:
        """Whether a forward without pictures is of this conversation."""
        return self.cache is not None and kwargs.get("past_key_values") is self.cache

    def add(self, kwargs: dict[str, Any], ids: Tensor | None) -> None:
        """Another forward: decoding, or the next turn. RuntimeError where the cache is not what it was."""
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            raise ValueError("reselect: the language model was given ids, must be embeddings")
        layers = reduced_layers(self.cache)
        seen = self.embeds.shape[1]
        if any(layer.seen != seen or layer.reordered for layer in layers) or len(embeds) != len(self.embeds):
            raise RuntimeError(
                "reselect: the cache no longer holds the rows and tokens of the conversation; beam search, several "
                "returned sequences, assisted decoding and cropped caches do not go with reselect=True"
            )
        self.embeds = torch.cat([self.embeds, embeds], 1)
        later = _positions(kwargs, seen)
        self.positions = torch.cat([self.positions, later.expand(*self.positions.shape[:-1], -1)], -1)
        old, new = self.prompt, embeds.shape[1]
        known = None if old.ids is None or ids is None else torch.cat([old.ids, ids[:, -new:]], 1)
        clips = None if old.videos is None else pad(old.videos, (0, new))
        self.prompt = Prompt(pad(old.visual, (0, new)), known, clips)

    def again(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The language model's arguments for the whole conversation, on its cache, which this empties."""
        if self.cache is not None:
            for layer in self.cache.layers:  # those of linear attention hold states, not keys
                layer.empty() if isinstance(layer, ReducedLayer) else layer.reset()
        deep = dict(self.deep)
        if "visual_pos_masks" in deep:
            deep["visual_pos_masks"] = pad(
                deep["visual_pos_masks"], (0, self.embeds.shape[1] - deep["visual_pos_masks"].shape[1])
            )
        return {**kwargs, **deep, "inputs_embeds": self.embeds, "position_ids": self.positions}


def _positions(kwargs: dict[str, Any], seen: int) -> Tensor:
    """(..., B, T) position ids of a forward; where the caller gave none, those that its model counts."""
    batch, width = kwargs["inputs_embeds"].shape[:2]
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(seen, seen + width, device=kwargs["inputs_embeds"].device)[None]
    elif positions.ndim == 3 and positions.shape[0] == 4:
        positions = positions[1:]  # as in Stream
    return positions.expand(*positions.shape[:-2], batch, width)
