"""A method that works through another one: it asks for what that one asks for, and acts where that one acts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Literal

from torch import Tensor

from vistok.host.reducer import Evidence, LayerNeed, LayerSpec, Reducer, Reduction, Schedule


class Wrapper(Reducer):
    """Base of methods with a hyper-parameter ``method``: the name of another reducer, or a Reducer.

    ``see`` is what the wrapped method is shown; whatever else a wrapper changes it overrides. A ``seed`` of the wrapper
    seeds the wrapped method too.
    """

    method: str | Reducer

    @cached_property
    def base(self) -> Reducer:
        """The wrapped method. Raises UnknownSystem, or ValueError for something else than another reducer."""
        from vistok import catalogue

        if isinstance(self.method, Reducer):
            return self.method
        if catalogue.module_of(self.method) == type(self).__module__ or catalogue.card(self.method).family != "reduce":
            raise ValueError(f"method: got {self.method!r}, must be another reducer")
        base: Reducer = catalogue.create_seeded(self.method, getattr(self, "seed", None))
        return base

    @property
    def needs(self) -> Mapping[str, LayerSpec]:
        return self.base.needs

    @property
    def layer_needs(self) -> Mapping[str, LayerNeed]:
        return self.base.layer_needs

    @property
    def space(self) -> Literal["projected", "encoder"]:  # type: ignore[override]
        return self.base.space

    @property
    def whole_picture(self) -> bool:  # type: ignore[override]
        return self.base.whole_picture

    @property
    def thumbnail(self) -> bool:  # type: ignore[override]
        return self.base.thumbnail

    @property
    def one_at_a_time(self) -> bool:  # type: ignore[override]
        return self.base.one_at_a_time

    @property
    def position(self) -> Literal["keep", "recompact"]:  # type: ignore[override]
        return self.base.position

    @property
    def cache(self) -> Literal["seen", "survivors"]:  # type: ignore[override]
        return self.base.cache

    def see(self, evidence: Evidence) -> Evidence:
        """What the wrapped method is shown of ``evidence``."""
        return evidence

    def schedule(self, num_tokens: int, keep: int, num_layers: int) -> Schedule:
        return self.base.schedule(num_tokens, keep, num_layers)

    def compress(self, evidence: Evidence, keep: int) -> Reduction:
        return self.base.compress(self.see(evidence), keep)

    def at_layer(self, evidence: Evidence, keep: int, layer: int) -> Reduction:
        return self.base.at_layer(self.see(evidence), keep, layer)

    def token_scores(self, evidence: Evidence, layer: int | None = None) -> Tensor | None:
        return self.base.token_scores(self.see(evidence), layer)

    def come_back(self, aside: Tensor, keep: Tensor, states: Tensor) -> Tensor:
        return self.base.come_back(aside, keep, states)
