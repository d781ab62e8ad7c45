"""ToMe: in every block the tokens that are most alike become one, pair by pair.

What: bipartite soft matching. Between attention and MLP every second token finds the most similar of the others, by the
cosine of the keys' mean over heads; the ``r`` pairs most alike merge into means weighted by size. A merged token is
heard in attention as often as the patches in it (log size is added to its products). Source: Bolya et al., arXiv
2210.09461, facebookresearch/ToMe. Where: every block, off the shelf.

Departures: the bias is one row of an additive mask, so that fused attention stays on (the released code writes the
attention out). Slots lie in raster order of the patches they stand at, not unmerged ones first: neighbours go on to
meet neighbours. Heads that average patches weight them alike unless ``vistok.apply(restore="zeros")`` (the released
patch for MAE weights them by size).
"""

from __future__ import annotations

from dataclasses import dataclass

from vistok.catalogue.card import Card, Outcome, ViTTrial
from vistok.core.merge import soft_matching
from vistok.host.keep import Keep, check_keep
from vistok.host.vit import Stage, TokenState, ViTEvidence, ViTReducer

CARD = Card(
    title="Token Merging: Your ViT But Faster (ToMe)",
    kind="training-free",
    site="between attention and MLP of every encoder block",
    paper="Bolya et al., 2022, arXiv 2210.09461",
    repository="facebookresearch/ToMe",
    mechanism=("similarity",),
    needs=("keys of the block, mean over heads", "an additive mask row for attention in proportion to size"),
    score="cosine of keys to the best match among every second token",
    allocate="r tokens fewer at every block",
    select="the pairs most alike merge",
    merge="mean weighted by size",
    claim="Off the shelf, half of the operations cost at most 0.3 percentage points of accuracy.",
)


@dataclass(frozen=True)
class ToMe(ViTReducer):
    """Bipartite soft matching in every block."""

    r: int = 13
    """Tokens fewer at each block, at most half of them; 13 is the paper's for DeiT-S (196 patches)."""
    inflect: float = 0.0
    """How r changes over the blocks, in -1..1: 0 stays, -1 falls from 2 r to 0 (the paper's decreasing schedule)."""
    keep: Keep | None = None
    """Instead of ``r``: the share of the patches, or their number, that is to be left at the end, by equal steps."""
    proportional: bool = True
    """Whether merged tokens attend in proportion to their size."""

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 0:
            raise ValueError(f"r: got {self.r!r}, must be a number of tokens, 0 or more")
        if not -1 <= self.inflect <= 1:
            raise ValueError(f"inflect: got {self.inflect!r}, must be between -1 and 1")
        if self.keep is not None:
            check_keep(self.keep)

    def count(self, tokens: int, stage: Stage) -> int:
        if self.keep is not None:
            return stage.by_equal_steps(self.keep, tokens)
        first = self.r * (1 - self.inflect)
        step = 2 * (self.r - first) / max(stage.depth - 1, 1)
        return tokens - min(int(first + step * stage.layer), tokens // 2)

    def reduce(self, state: TokenState, evidence: ViTEvidence, count: int) -> TokenState:
        r = state.num_slots - count  # the prefix takes part in the alternation, as in the paper, but in no merge
        even, into = soft_matching(evidence.keys, r, protected=state.prefix)
        return state.merge_pairs(even[:, :r], into)


def claim(trial: ViTTrial) -> Outcome:
    """The abstract: off the shelf, twice the throughput for 0.2 to 0.3% of accuracy.

    Eleven fewer of 144 patches in each of twelve blocks: half of the tokens on average.
    """
    dense = trial.accuracy()
    merged = trial.accuracy(ToMe(r=11))
    return Outcome("accuracy with half of the operations", baseline=dense, value=merged, holds=merged >= dense - 0.003)
