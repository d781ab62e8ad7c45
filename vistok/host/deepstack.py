"""Qwen3-VL adds planes of encoder features to its visual tokens after the first decoder layers; they go with them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vistok.host.rows import take


class DeepStack:
    """The planes of one prompt, for whichever columns are left."""

    def __init__(self, language_model: Any, visual: Tensor, planes: list[Tensor]) -> None:
        """``visual`` (B, T) bool; each plane (number of visual tokens, D), row by row of the batch."""
        self.language_model, self.visual, self.planes = language_model, visual, planes
        self.number = (visual.flatten().cumsum(0) - 1).view_as(visual)
        self.ours = False

    def _left(self, index: Tensor) -> tuple[Tensor, Tensor]:
        visual = take(self.visual, index) & (index >= 0)
        return visual, take(self.number, index)[visual]

    def inputs(self, index: Tensor, later: bool) -> dict[str, Any]:
        """The language model's arguments for the columns ``index`` (B, T'). ``later``: columns will also be dropped
        between layers, which its own code cannot know; it then gets none and ``add`` does its part."""
        self.ours = later
        if later:
            return {"visual_pos_masks": None, "deepstack_visual_embeds": None}
        visual, rows = self._left(index)
        return {"visual_pos_masks": visual, "deepstack_visual_embeds": [plane[rows] for plane in self.planes]}

    def add(self, layer: int, hidden: Tensor, index: Tensor) -> Tensor | None:
        """``hidden`` after decoder layer ``layer``, with its plane added by the model's own function."""
        if not self.ours or layer >= len(self.planes):
            return None
        visual, rows = self._left(index)
        plane = self.planes[layer][rows.to(self.planes[layer].device)]
        return self.language_model._deepstack_process(hidden, visual, plane)
