"""What a method chose by: the score of every token it chose among, written down while the model runs.

    watched = Watched(vistok.create("fastervlm"))
    with vistok.apply(model, watched, keep=0.25):
        model.generate(**inputs)
    watched.seen[0].scores          # (B, N) what its tokens scored, or None: it gives them no score

Nothing is written down, and nothing computed, for a method that is not wrapped.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vistok.core.tensors import ranking
from vistok.host.effort import Effort
from vistok.host.recipe import Recipe
from vistok.host.reducer import Evidence, Reducer, Reduction
from vistok.host.wrapper import Wrapper


@dataclass(frozen=True)
class Choice:
    """One stage of a method, on the pictures of one layout (or on one part of a picture that was cut)."""

    layer: int | None
    """The decoder layer before which it was, None: before the language model."""
    index: Tensor
    """(B, N) int64: which of the picture's tokens were there to choose from."""
    scores: Tensor | None
    """(B, N) float, larger is better; None where the method gives its tokens no score."""
    order: Tensor | None
    """(B, K) int64: which of the picture's tokens were picked, in the order in which a greedy method took them; None
    for others."""
    into: Tensor
    """(B, N) int64: at the place of which of the picture's tokens each went on (its own, or that of the slot that it
    was merged into), -1 where it was dropped."""

    @property
    def ranks(self) -> Tensor | None:
        """(B, N) int64, 1 for the highest score, ties to the lower index; None without scores."""
        if self.scores is None:
            return None
        order = ranking(self.scores)
        places = torch.arange(1, order.shape[1] + 1, device=order.device).expand_as(order)
        return torch.empty_like(order).scatter(1, order, places)


@dataclass(frozen=True)
class Watched(Wrapper):
    """A method as it is; ``seen`` is what it chose by since it was made, stage by stage. ValueError for an ``Effort``,
    which chooses nothing."""

    method: Reducer
    seen: list[Choice] = field(default_factory=list, compare=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.method, Effort):
            raise ValueError(f"method: got {self.method!r}, which keeps all tokens and chooses none")

    def compress(self, evidence: Evidence, keep: int) -> Reduction:
        order = None
        if isinstance(self.base, Recipe) and self.base.greedy:
            order = _index(evidence).gather(1, self.base.select(self.see(evidence), keep))
        return self._note(evidence, None, order, super().compress(evidence, keep))

    def at_layer(self, evidence: Evidence, keep: int, layer: int) -> Reduction:
        return self._note(evidence, layer, None, super().at_layer(evidence, keep, layer))

    def _note(self, evidence: Evidence, layer: int | None, order: Tensor | None, made: Reduction) -> Reduction:
        scores, index = self.token_scores(evidence, layer), _index(evidence)
        places = torch.cat([index.gather(1, made.keep), index.new_full((len(index), 1), -1)], 1)  # -1 reads the last
        into = places.gather(1, torch.where(made.source < 0, made.keep.shape[1], made.source))
        scores, order = (None if x is None else x.detach().cpu() for x in (scores, order))
        self.seen.append(Choice(layer, index.cpu(), scores, order, into.cpu()))
        return made


def _index(evidence: Evidence) -> Tensor:
    x = evidence.features
    return torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]) if evidence.index is None else evidence.index
