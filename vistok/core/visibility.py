"""Which tokens see which, where attention is neither causal nor full."""

from __future__ import annotations

from torch import Tensor


def block_visibility(block: Tensor, segment: Tensor | None = None) -> Tensor:
    """(B, L, L) bool, True where a query (row) sees a key (column): its own block in both directions, and all before.

    ``block`` (B, L) int64: 0, 1, ... in the order in which they are read, -1 for padding, which sees padding only (so
    that no row of a softmax is empty) and is seen by nothing else. ``segment`` (B, L) int64: tokens of different
    segments do not see each other, but all see those of segment 0.
    """
    query, key = block[:, :, None], block[:, None, :]
    sees = ((key >= 0) & (key <= query)) | (key == query)
    if segment is None:
        return sees
    return sees & ((segment[:, :, None] == segment[:, None, :]) | (segment == 0)[:, None, :])
