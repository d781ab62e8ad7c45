"""PruMerge: keep the tokens whose class-token attention stands out, and fold the others into them by key similarity.

What: the class token attends to few patches. Those stay; each takes in the ``neighbours`` tokens whose keys are most
like its own (kept ones too, with the values that they had before), weighted by their attention, and one extra token is
the attention-weighted sum of all that was not kept. How many stand out: in the paper those above the third quartile of
the attention plus 1.5 times the quartiles' distance. PruMerge+ adds tokens at a uniform stride, three for each that
stands out. Source: Shang et al., arXiv 2403.15388, 42Shawn/LLaVA-PruMerge. Where: encoder output, before the projector;
part by part of a cut picture.

As released, attention is one row for all heads (queries and keys unsplit), weights are not normalised, and a kept token
has weight 1. With ``counts="keep"`` exactly ``keep`` tokens stay, the extra one among them (it needs a second token
beside it), by the same ranking: the comparison at equal cost. ``counts="data"`` is the paper's count, whatever ``keep``
says, short of all tokens. Without a class token: received attention.

Departures: tokens stand at their places, the extra one at that of its most attended token; the released code orders
them by attention and puts the extra one last. Outliers are counted picture by picture, not over the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core.ragged import absorb, fold, positions, top_mask
from vistok.core.tensors import take, unit, upcast
from vistok.host.reducer import Evidence, LayerSpec, Reducer, Reduction

CARD = Card(
    title="LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models",
    kind="training-free",
    site="encoder output, before the projector",
    paper="Shang et al., 2024, arXiv 2403.15388",
    repository="42Shawn/LLaVA-PruMerge",
    mechanism=("attention", "similarity"),
    needs=(
        "class-token attention with all heads as one, and keys, of the last encoder layer "
        "(received attention where there is no class token)",
    ),
    score="class-token attention with all heads as one",
    allocate="keep, or the tokens above the third quartile by 1.5 times the quartiles' distance",
    select="top-k by attention; PruMerge+: one in four, the others at a uniform stride",
    merge="attention-weighted sums of the 32 nearest tokens by keys, and one extra token of all the rest",
    claim="Keeps 95% of the dense accuracy with a fourteenth of the visual tokens.",
)


@dataclass(frozen=True)
class PruMerge(Reducer):
    """Attention outliers grown by their neighbours, and one extra token."""

    counts: Literal["keep", "data"] = "keep"
    """"keep": exactly ``keep`` tokens; "data": as many as stand out, and the extra one."""
    plus: bool = False
    """True: PruMerge+, with three tokens at a uniform stride for each that stands out."""
    neighbours: int = 32
    """Tokens that each kept token takes in."""
    layer: int = -1
    """Encoder layer whose attention and keys are used."""

    space: ClassVar[Literal["projected", "encoder"]] = "encoder"

    def __post_init__(self) -> None:
        if self.counts not in ("keep", "data"):
            raise ValueError(f"counts: got {self.counts!r}, must be 'keep' or 'data'")
        if self.neighbours < 0:
            raise ValueError(f"neighbours: got {self.neighbours}, must be 0 or more")

    @property
    def one_at_a_time(self) -> bool:  # type: ignore[override]
        """True if the picture says how many tokens stay."""
        return self.counts == "data"

    @property
    def needs(self) -> Mapping[str, LayerSpec]:
        return {"encoder_features": None, "wide_cls_attention": self.layer, "encoder_keys": self.layer}

    def kept(self, attention: Tensor, keep: int) -> Tensor:
        """(B, N) bool: the tokens that stay by themselves, the extra one not counted, by ``attention`` (B, N)."""
        n = attention.shape[1]
        place = torch.arange(n, device=attention.device)
        if self.counts == "data":
            count = outliers(attention)
            best = top_mask(attention, count)
            stride = (n / count.clamp_min(1)).long() // 3
            spaced = (place % stride.clamp_min(1)[:, None] == 0) & (count > 0)[:, None] & (place < n - 1)
            return best | spaced if self.plus else best
        count = torch.full_like(attention[:, 0], max(keep - 1, 1), dtype=torch.int64)
        if not self.plus:
            return top_mask(attention, count)
        best = top_mask(attention, -(-count // 4))
        more, left = count - best.sum(1), n - best.sum(1)
        rank = (~best).cumsum(1) - 1  # among those that are left
        step = (rank * more[:, None] // left[:, None], (rank - 1) * more[:, None] // left[:, None])
        return best | (~best & (step[0] > step[1]))

    def token_scores(self, evidence: Evidence, layer: int | None = None) -> Tensor:
        return upcast(evidence.wide_cls_attention)

    def compress(self, evidence: Evidence, keep: int) -> Reduction:
        x, attention = evidence.encoder_features, self.token_scores(evidence)
        kept = self.kept(attention, keep)
        keys = unit(evidence.encoder_keys)
        affinity = torch.bmm(take(keys, positions(kept)[0]), keys.transpose(1, 2))
        values, owner = absorb(x, kept, torch.ones_like(kept), affinity, attention, self.neighbours)

        folds = ~kept if self.counts == "data" or keep > 1 else torch.zeros_like(kept)
        places, real, tokens, source = fold(x, values, kept, owner, folds, attention)
        if not bool(real.all()):
            raise ValueError(f"counts: 'data' finds {real.sum(1).tolist()} tokens; give one picture at a time")
        return Reduction(places, tokens.to(x.dtype), source)


def outliers(values: Tensor) -> Tensor:
    """(B,) int64: how many of ``values`` (B, N) lie above the third quartile by 1.5 times the quartiles' distance."""
    values = upcast(values)
    first, third = values.quantile(values.new_tensor([0.25, 0.75]), dim=1)
    return (values > (third + 1.5 * (third - first))[:, None]).sum(1)


def claim(trial: Trial) -> Outcome:
    """The abstract: tokens compressed 14 times on average at comparable performance; comparable: 95% of dense."""
    dense = trial.accuracy(None)
    pruned = trial.accuracy(PruMerge(), keep=1 / 14)
    return Outcome("accuracy with 1/14 of the tokens", baseline=dense, value=pruned, holds=pruned >= 0.95 * dense)
