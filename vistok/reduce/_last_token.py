"""What pruners inside the language model share that rank visual tokens by the prompt's last token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from vistok.core.score import last_query
from vistok.core.select import topk
from vistok.host.reducer import Evidence, LayerNeed, Reducer, Reduction


class LastTokenRanking(Reducer):
    """Top-k by the attention of the prompt's last token, mean over heads; a system says when (``schedule``).

    The tokens of a picture that was cut are ranked together.
    """

    whole_picture: ClassVar[bool] = True

    @property
    def layer_needs(self) -> Mapping[str, LayerNeed]:
        return {"llm_attention": "last"}

    def token_scores(self, evidence: Evidence, layer: int | None = None) -> Tensor:
        return last_query(evidence.llm_attention)

    def select(self, evidence: Evidence, keep: int) -> Tensor:
        return topk(self.token_scores(evidence), keep)

    def at_layer(self, evidence: Evidence, keep: int, layer: int) -> Reduction:
        return Reduction.select(evidence.features, self.select(evidence, keep))
