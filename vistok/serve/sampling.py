"""How the next token is chosen, for each row of a batch by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from vistok.serve.schema import Sampling


class Draw(LogitsProcessor):
    """Draws the tokens of those rows that have a temperature, and leaves no other token possible there.

    Of the likeliest tokens those can be drawn that together have a probability of ``top_p``. ``generate`` goes on
    choosing the likeliest token, so rows with different sampling share a batch; a row with a ``seed`` has the same
    draws whatever else is in it.
    """

    def __init__(self, rows: Sequence[Sampling], device: torch.device) -> None:
        self._rows = [
            (row, sampling, torch.Generator(device)) for row, sampling in enumerate(rows) if sampling.temperature
        ]
        for _, sampling, generator in self._rows:
            if sampling.seed is None:
                generator.seed()
            else:
                generator.manual_seed(sampling.seed % 2**63)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores`` (B, V) float, logits; those of drawn rows come back as 0 for the token and -inf elsewhere."""
        scores = scores.clone()
        for row, sampling, generator in self._rows:
            logits = scores[row].double()
            chances = torch.softmax((logits - logits.max()) / sampling.temperature, 0)
            ranked, order = chances.sort(descending=True, stable=True)
            ranked[ranked.cumsum(0) - ranked >= sampling.top_p] = 0
            token = order[torch.multinomial(ranked, 1, generator=generator)]
            scores[row] = float("-inf")
            scores[row, token] = 0
        return scores
