"""The map from patches to tokens, by itself: against lists of patches kept by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vistok.core.merge import size_weighted_mean
from vistok.host.vit import TokenState

PREFIX, GRID = 2, (3, 4)


def start(b: int = 2, seed: int = 0) -> TokenState:
    x = torch.randn(b, PREFIX + 12, 5, generator=torch.Generator().manual_seed(seed))
    return TokenState.start(x, PREFIX, GRID)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 11), st.integers(0, 99)), min_size=1, max_size=5))
def test_any_chain_of_keeping_and_merging(steps):
    """Members of each slot, followed by hand through random choices, are what source, size and anchor say."""
    first = state = start()
    members = [[[patch] for patch in range(12)] for _ in range(2)]
    for merge, wanted, seed in steps:
        g = torch.Generator().manual_seed(seed)
        k = min(wanted, state.num_slots)
        index = torch.stack([torch.randperm(state.num_slots, generator=g)[:k] for _ in range(2)])
        if merge:
            into = torch.randint(0, k, (2, state.num_slots), generator=g).scatter(
                1, index, torch.arange(k).expand(2, k)
            )
            into[:, 0] = torch.where((index == 0).any(1), into[:, 0], -1)  # one is dropped, unless it is an anchor
            merged = size_weighted_mean(state.slots, into, k, state.size)
            state = state.regroup(merged.tokens, into, index)
            members = [
                [[p for slot, m in enumerate(row) if int(into[i, slot]) == new for p in m] for new in range(k)]
                for i, row in enumerate(members)
            ]
        else:
            state = state.keep(index, "author")
            members = [[row[int(j)] for j in index[i]] for i, row in enumerate(members)]
    assert torch.equal(state.x[:, :PREFIX], first.x[:, :PREFIX]) and state.merged == any(m for m, _, _ in steps)
    for i, row in enumerate(members):
        assert state.size[i].tolist() == [len(m) for m in row]
        assert state.source[i].tolist() == [next((s for s, m in enumerate(row) if p in m), -1) for p in range(12)]
        for slot, group in enumerate(row):
            assert int(state.anchor[i, slot]) in group
            torch.testing.assert_close(state.slots[i, slot], first.slots[i, group].mean(0))


def test_keep_lists_in_raster_or_in_the_given_order():
    index = torch.tensor([[7, 1, 4], [0, 11, 5]])
    state = start()
    assert state.keep(index).anchor.tolist() == [[1, 4, 7], [0, 5, 11]]
    assert torch.equal(state.keep(index, "author").anchor, index)
    assert torch.equal(state.keep(index).slots[0], state.slots[0, [1, 4, 7]])


def test_unmerge_gives_each_patch_its_slot():
    state = start().keep(torch.tensor([[1, 10], [0, 11]]))
    values = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    zeros = state.unmerge(values)[..., 0]
    assert zeros[0].tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0]
    # patch 4 (row 1, column 0) is as far from 1 (row 0, column 1) as anything: 2 against 5; patch 8 is 5 against 4
    assert state.unmerge(values, "nearest")[0, :, 0].view(GRID).tolist() == [[1, 1, 1, 1], [1, 1, 2, 2], [2, 2, 2, 2]]
    assert state.restored().shape == state.restored(fill="nearest").shape == (2, PREFIX + 12, 5)
    with pytest.raises(ValueError, match=r"^fill: got 'mean'"):
        state.unmerge(values, "mean")


def test_key_bias_is_the_log_of_the_size_and_absent_while_nothing_has_merged():
    state = start()
    assert (
        state.key_bias(torch.float32) is None and state.keep(torch.tensor([[1], [2]])).key_bias(torch.float32) is None
    )
    into = torch.tensor([[0] * 9 + [1] * 3, [1] * 4 + [-1] * 8])
    values, anchor = torch.zeros(2, 3, 5), torch.tensor([[0, 9, -1], [-1, 0, -1]])
    bias = state.regroup(values, into, anchor).key_bias(torch.bfloat16)
    assert bias is not None and bias.shape == (2, 1, 1, PREFIX + 3) and bias.dtype == torch.bfloat16
    expected = torch.tensor([[1.0, 1, 9, 3, 1], [1, 1, 1, 4, 1]]).log().bfloat16()
    assert torch.equal(bias[:, 0, 0], expected)


def test_a_grid_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"^grid: got 3 x 5, but the first block was given 12 patch tokens"):
        TokenState.start(torch.zeros(1, 14, 5), PREFIX, (3, 5))
