"""Which tokens see which, by brute force."""

from __future__ import annotations

import torch

from vistok.core.visibility import block_visibility


def test_blocks_and_segments() -> None:
    block = torch.tensor([[-1, 0, 0, 1, 2, 1, 2], [0, 0, 1, 1, 2, -1, -1]])
    segment = torch.tensor([[-1, 0, 0, 1, 1, 2, 2], [0, 0, 1, 2, 2, -1, -1]])
    plain, packed = block_visibility(block), block_visibility(block, segment)
    for row in range(2):
        for query in range(7):
            for key in range(7):
                q, k = block[row, query], block[row, key]
                sees = q == k or 0 <= k <= q
                mine = segment[row, key] in (0, segment[row, query])
                assert plain[row, query, key] == sees
                assert packed[row, query, key] == (sees and mine)
    assert bool(packed.any(2).all()), "a row of a softmax must not be empty"
