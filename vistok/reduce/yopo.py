"""YOPO: keep every visual token and compute less for each, by a pattern that is fixed once for a model.

What: visual tokens look at their neighbours in the picture only (and at the text before them), leave out the heads that
hardly attend to pictures, use part of the MLP's hidden units, and are gone in the upper layers. Nothing is chosen for a
picture, so choosing costs nothing. Source: Zhang et al., arXiv 2410.06169, ZhangAIPI/YOPO_MLLM_Pruning. Where: every
decoder layer, for visual tokens; text is computed as ever, but inactive heads do not read visual tokens. The authors
fine-tune LLaVA with the pattern, and use InternVL2 and Qwen2-VL as they are.

All tokens stay up to the layer cut, whatever ``keep``. The pattern is that of the released training script of
LLaVA-1.5-13B: a window of 5 x 5, half of the units, 20 of 40 layers. Which heads are inactive is measured once for a
model (``inactive_heads``); by default none is. A picture in crops has a window in each crop; tokens of different
pictures do not see each other.

Departures: what the released code masks is not computed. From the layer cut on visual tokens are gone, keys and values
too, and text attends to text. The released code zeroes the weights to visual keys after the softmax there, so that they
still take their part of it, and goes on with visual tokens: ``parity="authors"``, which costs more. In inactive heads
text is not made up for the zeroed weights in either, as released. The released code does as much while decoding for the
first row of a batch only; here all rows are alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core.effort import active_heads, half_of, head_ratio
from vistok.host.effort import Effort, LayerEffort
from vistok.host.hosts import host_of

CARD = Card(
    title="Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to See (YOPO)",
    kind="training-free",
    site="attention and MLP of every decoder layer, for visual tokens",
    paper="Zhang et al., 2024, arXiv 2410.06169",
    repository="ZhangAIPI/YOPO_MLLM_Pruning",
    needs=("the layout of the visual tokens", "a gated MLP of plain linear layers"),
    mechanism=("transformation",),
    allocate="all tokens for half of the layers, then none",
    select="nothing: neighbours in a 5 x 5 window, active heads, half of the MLP's units",
    claim="Keeps the dense accuracy (here: 98% of it) with less computation on the same visual tokens, and is faster.",
    departures=("past the layer cut visual tokens are gone, and the text's attention sums to one without them",),
)


@dataclass(frozen=True)
class YOPO(Effort):
    """Neighbours, active heads, part of the units, and a layer cut."""

    window: int = 5
    """Side of the window through which visual tokens see each other; odd."""
    ffn_ratio: float = 2
    """Visual tokens use one in so many of the MLP's hidden units, the first ones."""
    depth: float = 1 / 2
    """Share of the layers after which no visual token is left; 1: they stay."""
    inactive: tuple[tuple[int, ...], ...] = ()
    """Inactive query heads of each layer, as ``inactive_heads`` finds them; (): none."""
    causal: bool = False
    """Whether the window shows only tokens that come before; with the largest window the dense model's attention."""
    parity: Literal["paper", "authors"] = "paper"
    """"authors": past the layer cut weights to visual tokens are zeroed after the softmax, as in the released code."""

    def __post_init__(self) -> None:
        half_of(self.window)
        if not self.ffn_ratio >= 1:
            raise ValueError(f"ffn_ratio: got {self.ffn_ratio}, must be 1 or more")
        if not 0 < self.depth <= 1:
            raise ValueError(f"depth: got {self.depth}, must be in (0, 1]")
        if self.parity not in ("paper", "authors"):
            raise ValueError(f"parity: got {self.parity!r}, must be 'paper' or 'authors'")

    def stop(self, num_layers: int) -> int:
        return num_layers if self.parity == "authors" else self._cut(num_layers)

    def _cut(self, num_layers: int) -> int:
        return math.ceil(self.depth * num_layers - 1e-9)

    def layers(self, num_layers: int, num_heads: int) -> Sequence[LayerEffort]:
        if self.inactive and len(self.inactive) != num_layers:
            raise ValueError(f"inactive: got {len(self.inactive)} layers, the model has {num_layers}")
        if wrong := [head for heads in self.inactive for head in heads if not 0 <= head < num_heads]:
            raise ValueError(f"inactive: got head {wrong[0]}, the model has heads 0..{num_heads - 1}")
        found = []
        for layer in range(num_layers):
            silent = self.inactive[layer] if self.inactive else ()
            blind = silent if layer < self._cut(num_layers) else tuple(range(num_heads))
            found.append(LayerEffort(self.window, self.causal, 1 / self.ffn_ratio, blind, silent))
        return found


@torch.inference_mode()
def inactive_heads(
    model: nn.Module, samples: Iterable[Mapping[str, Any]], threshold: float, votes: float = 0.4, always: int = 2
) -> tuple[tuple[int, ...], ...]:
    """The heads of each layer that hardly attend to pictures, for ``YOPO(inactive=...)``. The authors use 100 samples.

    A head is active if its attention to visual keys, over all queries of a sample, is more than ``threshold`` times
    that to the others in more than a share ``votes`` of the samples; in the first ``always`` layers all are. Thresholds
    of the paper: 0.2, 0.077 and 0.035 (three levels, LLaVA-1.5-13B), 0.11, 0.08 (InternVL2-8B, -4B), 0.07 (Qwen2-VL).
    ``samples``: model inputs with pictures, of any batch size. Runs eager attention, and only here. Raises ValueError
    without samples.
    """
    host = host_of(model)
    config = host.language_model.config
    before, ratios = config._attn_implementation, []
    config._attn_implementation = "eager"
    try:
        for inputs in samples:
            maps = model(**inputs, output_attentions=True, use_cache=False).attentions
            visual, real = inputs["input_ids"] == host.image_token, inputs["attention_mask"].bool()
            ratios.append(torch.stack([head_ratio(attention.float(), visual, real) for attention in maps], 1))
    finally:
        config._attn_implementation = before
    if not ratios:
        raise ValueError("samples: got none, must be model inputs with pictures")
    active = active_heads(torch.cat(ratios), threshold, votes, always)
    return tuple(tuple((~layer).nonzero()[:, 0].tolist()) for layer in active)


def claim(trial: Trial) -> Outcome:
    """The abstract: 88% less computation on LLaVA with maintained performance, after fine-tuning with the pattern.

    Here the model is used as it is; 98% is what "maintained" is taken to mean.
    """
    system = YOPO()
    dense, pruned = trial.accuracy(None), trial.accuracy(system, keep=1.0)
    speedup = trial.ttft_ms(None) / trial.ttft_ms(system, keep=1.0)
    return Outcome(
        "accuracy with all tokens",
        baseline=dense,
        value=pruned,
        holds=pruned >= 0.98 * dense and speedup > 1,
        note=f"first token {speedup:.2f} times sooner; not fine-tuned",
    )
