"""Rounds of bipartite matching against loops over one picture's tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vistok.core.merge import soft_matching_rounds


def by_loop(x: list[Tensor], keep: int) -> list[tuple[int, Tensor, set[int]]]:
    """Slots in the author's order: the token each stands at, its value, the tokens in it."""
    slots = [(i, value, {i}) for i, value in enumerate(x)]
    while len(slots) > keep:
        r = min(len(slots) // 2, len(slots) - keep)
        even, odd = slots[::2], slots[1::2]
        best = []
        for place, (_, value, _) in enumerate(even):
            near = [float(torch.cosine_similarity(value, other, 0)) for _, other, _ in odd]
            into = max(range(len(odd)), key=lambda j, near=near: (near[j], -j))
            best.append((-near[into], place, into))
        best.sort()
        groups: list[list[int]] = [[] for _ in odd]
        for _, place, into in best[:r]:
            groups[into].append(place)
        slots = [even[place] for _, place, _ in best[r:]]
        for (anchor, value, members), group in zip(odd, groups, strict=True):
            together = torch.stack([value, *(even[place][1] for place in group)])
            slots.append((anchor, together.mean(0), members.union(*(even[place][2] for place in group))))
    return slots


@given(st.integers(1, 17), st.integers(1, 17), st.integers(0, 9999))
def test_against_a_loop(n: int, keep: int, seed: int):
    keep = min(keep, n)
    x = torch.randn(2, n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    anchor, tokens, source = soft_matching_rounds(x, keep, "author")
    raster = soft_matching_rounds(x, keep)
    for picture in range(2):
        slots = by_loop(list(x[picture]), keep)
        assert anchor[picture].tolist() == [at for at, _, _ in slots]
        torch.testing.assert_close(tokens[picture], torch.stack([value for _, value, _ in slots]))
        for slot, (_, _, members) in enumerate(slots):
            assert set((source[picture] == slot).nonzero()[:, 0].tolist()) == members
        slots.sort(key=lambda slot: slot[0])
        assert raster[0][picture].tolist() == [at for at, _, _ in slots]
        torch.testing.assert_close(raster[1][picture], torch.stack([value for _, value, _ in slots]))
        for slot, (at, _, members) in enumerate(slots):
            assert set((raster[2][picture] == slot).nonzero()[:, 0].tolist()) == members and at in members


def test_nothing_to_merge_is_the_identity():
    x = torch.randn(2, 7, 3).bfloat16()
    for order in ("raster", "author"):
        anchor, tokens, source = soft_matching_rounds(x, 7, order)
        assert torch.equal(tokens, x)
        assert torch.equal(anchor, torch.arange(7).expand(2, 7)) and torch.equal(source, anchor)


def test_equal_tokens_stay_equal():
    x = torch.randn(1, 1, 5).expand(2, 23, 5)
    torch.testing.assert_close(soft_matching_rounds(x, 3)[1], x[:, :3])


def test_half_precision_is_rounded_once():
    x = torch.randn(1, 32, 6).half()
    anchor, tokens, source = soft_matching_rounds(x, 5)
    single = soft_matching_rounds(x.float(), 5)
    assert torch.equal(anchor, single[0]) and torch.equal(source, single[2])
    assert torch.equal(tokens, single[1].half())


def test_errors():
    x = torch.randn(1, 4, 2)
    for keep in (0, 5):
        with pytest.raises(ValueError, match=f"keep: got {keep}, must be between 1 and the 4 tokens"):
            soft_matching_rounds(x, keep)
    with pytest.raises(ValueError, match="order: got 'similarity'"):
        soft_matching_rounds(x, 2, "similarity")
