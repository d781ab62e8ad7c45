"""Recoverable Compression: filter by vision, recover by text, merge the rest; every count is read off the data.

What: a visual filter throws away what the question needs. (1) Keep the tokens that the class token attends to most;
(2) of the others recover those most similar to the question; (3) of the rest take the most attended ones as centres,
add to each its nearest tokens (by keys and text) weighted by attention, and fold all non-centres into one extra token.
How many: the share of outliers of each score (local outlier factor). Source: Chen et al., arXiv 2409.01179,
banjiuyufen/Recoverable-Compression. Where: encoder output, before the projector; part by part of a cut picture.

With ``counts="keep"`` the data's three counts are scaled to ``keep`` (largest remainder), so that the method can be
compared at equal cost; ``counts="data"`` is the paper's own, whatever ``keep`` says, short of all tokens. Where no
score has outliers, the visual filter takes everything (of the data's counts: one token). The extra token comes only
with a centre, as released.

Text: the paper scores patches by CLIP's two towers. Hosts have no CLIP text tower, so a patch is scored by the mean
cosine of its projected feature to the question's embeddings, over sqrt(width) like the released cosine; override
``text_score`` to give another. As published, the number of centres is a share of the feature WIDTH (the released code
reads the wrong axis; see ``centre_base``), the text scores of kept tokens are set to one minimum before outliers are
counted, and merging weights are not normalised.

Departures: keys of left-over tokens are looked up at their own places; the released code looks them up at their ranks
among the left-over ones: ``parity="authors"``. Merged tokens stand at their centres' places (the extra one at that of
its most attended token), not behind the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core.allocate import split_budget
from vistok.core.outlier import outlier_ratio
from vistok.core.ragged import absorb, fold, positions, top_mask
from vistok.core.score import text_similarity
from vistok.core.tensors import take, unit
from vistok.host.reducer import Evidence, LayerSpec, Reducer, Reduction

CARD = Card(
    title="Recoverable Compression: A Multimodal Vision Token Recovery Mechanism Guided by Text Information",
    kind="training-free",
    site="encoder output, before the projector",
    paper="Chen et al., 2024, arXiv 2409.01179",
    repository="banjiuyufen/Recoverable-Compression",
    mechanism=("attention", "similarity", "query"),
    needs=("class-token attention with all heads as one, and keys, of the last encoder layer", "question embeddings"),
    score="class-token attention, then cosine to the question's embeddings (paper: CLIP's text tower)",
    allocate="shares of outliers (local outlier factor) of each score, scaled to keep",
    select="top-k by attention, top-k of the others by text",
    merge="attention-weighted sums of nearest tokens into the most attended left-over ones, and one extra token",
    claim="At 10% of the tokens, recovery by text beats the visual filter alone.",
    departures=(
        "keys of left-over tokens are looked up at their own places",
        "merged tokens stand at their centres' places, not behind the kept ones",
    ),
)


@dataclass(frozen=True)
class RecoverableCompression(Reducer):
    """Visual filter, text recovery, weighted merging."""

    counts: Literal["keep", "data"] = "keep"
    """"keep": the data's counts scaled to the budget; "data": the paper's own counts."""
    text: bool = True
    """False: the visual filter and its merged tokens alone, without recovery (the paper's ablation)."""
    neighbours: int = 20
    """Neighbours of the outlier factor of both filters."""
    centre_neighbours: int = 10
    """Neighbours of the outlier factor that gives the number of centres."""
    merged_neighbours: int = 32
    """Tokens that each centre takes in."""
    beta: float = 50.0
    """Weight of the text score beside the keys' cosine."""
    centre_base: Literal["width", "selected", "rest"] = "width"
    """What the number of centres is a share of: feature width (as published), selected tokens, or the rest."""
    layer: int = -1
    """Encoder layer whose attention and keys are used."""
    parity: Literal["paper", "authors"] = "paper"
    """"authors": keys looked up at the wrong places as in the released code."""

    space: ClassVar[Literal["projected", "encoder"]] = "encoder"

    def __post_init__(self) -> None:
        known = {
            "counts": ("keep", "data"),
            "centre_base": ("width", "selected", "rest"),
            "parity": ("paper", "authors"),
        }
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, must be one of {', '.join(map(repr, choices))}")
        for name in ("neighbours", "centre_neighbours", "merged_neighbours"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, must be 1 or more")

    @property
    def one_at_a_time(self) -> bool:  # type: ignore[override]
        """True if the counts are the data's."""
        return self.counts == "data"

    @property
    def needs(self) -> Mapping[str, LayerSpec]:
        text: Mapping[str, LayerSpec] = {"text": None} if self.text else {}
        return {"encoder_features": None, "wide_cls_attention": self.layer, "encoder_keys": self.layer, **text}

    def text_score(self, evidence: Evidence) -> Tensor:
        """(B, N) how well each patch answers the question; 0 without ``text``."""
        x = evidence.features
        if not self.text:
            return torch.zeros_like(evidence.wide_cls_attention)
        return text_similarity(x, evidence.text, evidence.text_mask) * x.shape[-1] ** -0.5

    def roles(self, evidence: Evidence, keep: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N) bool each: kept by vision, recovered by text, centre of a merge. ``keep=None``: the data's counts."""
        attention, text, n = evidence.wide_cls_attention, self.text_score(evidence), evidence.num_tokens

        by_vision = (n * outlier_ratio(attention, self.neighbours)).long()
        seen = top_mask(attention, by_vision)
        floored = torch.where(seen, text.amin(1, keepdim=True), text)
        by_text = ((n - by_vision) * outlier_ratio(floored, self.neighbours)).long()
        rest = ~(seen | top_mask(text, by_text, ~seen))
        left = rest.sum(1)
        base = {"width": evidence.encoder_features.shape[-1], "selected": n - left, "rest": left}[self.centre_base]
        centres = (base * outlier_ratio(attention, self.centre_neighbours, rest)).long()
        centres = torch.minimum(centres, left - 1).clamp_min(0)

        merged = centres + (centres > 0)
        by_vision = torch.where(by_vision + by_text + merged == 0, 1, by_vision)
        if keep is not None:
            shares = torch.stack([by_vision, by_text, merged], 1)
            by_vision, by_text, merged = split_budget(shares.double(), keep).unbind(1)
            by_vision = by_vision + (merged == 1)  # an extra token without a centre is not formed
        seen = top_mask(attention, by_vision)
        recovered = top_mask(text, by_text, ~seen)
        return seen, recovered, top_mask(attention, merged - 1, ~(seen | recovered))

    def compress(self, evidence: Evidence, keep: int) -> Reduction:
        seen, recovered, centre = self.roles(evidence, keep if self.counts == "keep" else None)
        rest = ~(seen | recovered)
        x, attention = evidence.encoder_features, evidence.wide_cls_attention

        keys = unit(self._keys(evidence.encoder_keys, rest))
        affinity = torch.bmm(take(keys, positions(centre)[0]), keys.transpose(1, 2))
        affinity = affinity + self.beta * self.text_score(evidence).unsqueeze(1)
        values, owner = absorb(x, centre, rest, affinity, attention, self.merged_neighbours)

        folds = rest & ~centre & centre.any(1, keepdim=True)
        places, real, tokens, source = fold(x, values, ~rest | centre, owner, folds, attention)
        if not bool(real.all()):
            raise ValueError(f"counts: 'data' finds {real.sum(1).tolist()} tokens; give one picture at a time")
        return Reduction(places, tokens.to(x.dtype), source)

    def _keys(self, keys: Tensor, rest: Tensor) -> Tensor:
        """Keys (B, N, Dk) as the merge looks them up: its own for each token, or the released mix-up."""
        return keys if self.parity == "paper" else take(keys, (rest.cumsum(1) - 1).clamp_min(0))


def claim(trial: Trial) -> Outcome:
    """The paper's ablation at about 10% of the tokens: with and without the tokens recovered by text."""
    alone = trial.accuracy(RecoverableCompression(text=False), keep=0.1)
    recovered = trial.accuracy(RecoverableCompression(), keep=0.1)
    return Outcome("accuracy with 10% of the tokens, text over vision alone", alone, recovered, holds=recovered > alone)
