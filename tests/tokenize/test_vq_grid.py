"""vq-grid: the size of the contract's network."""

from __future__ import annotations

SMALL = dict(size="T", image=16, patch=4, codes=32, dim=4, restart_after=3)
