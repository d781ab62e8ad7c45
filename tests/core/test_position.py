"""Positions kept or closed up, on one axis, three axes and grids."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.core.oracle import distinct_rank
from vistok.core import position


def test_order():
    keep = torch.tensor([[5, 0, 3]])
    assert position.order(keep).tolist() == [[0, 3, 5]]
    assert position.order(keep, "author") is keep
    with pytest.raises(ValueError, match="policy"):
        position.order(keep, "similarity")


@given(st.integers(1, 9), st.data())
def test_rest(n: int, data: st.DataObject):
    k = data.draw(st.integers(0, n))
    keep = torch.stack([torch.randperm(n)[:k] for _ in range(3)])
    left = position.rest(keep, n)
    for kept, others in zip(keep.tolist(), left.tolist(), strict=True):
        assert others == [i for i in range(n) if i not in kept]


def test_keep_positions():
    keep = torch.tensor([[0, 3], [1, 2]])
    line = torch.tensor([[0, 1, 2, 3], [7, 8, 9, 10]])
    assert position.keep_positions(line, keep).tolist() == [[0, 3], [8, 9]]
    axes = torch.stack([line, line + 100, line + 200])
    kept = position.keep_positions(axes, keep)
    assert kept.shape == (3, 2, 2) and kept[2].tolist() == [[200, 203], [208, 209]]
    with pytest.raises(ValueError, match="positions"):
        position.keep_positions(line[:1], keep)


@given(st.integers(1, 12), st.sampled_from([None, 1, 3]), st.integers(0, 9), st.integers(0, 2**31), st.booleans())
def test_recompact_positions(t: int, axes: int | None, offset: int, seed: int, padded: bool):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, t) if axes is None else (axes, 2, t)
    ids = torch.randint(0, 8, shape, generator=generator) + offset
    keep = torch.arange(t)[torch.rand(t, generator=generator) < 0.7].expand(2, -1)
    mask = torch.rand(keep.shape, generator=generator) < 0.7 if padded else None
    closed = position.recompact_positions(ids, keep, mask)
    kept = position.keep_positions(ids, keep)
    assert closed.shape == kept.shape and closed.dtype == kept.dtype
    for b in range(2 if keep.shape[1] else 0):
        real = [True] * keep.shape[1] if mask is None else mask[b].tolist()
        values = kept.view(-1, *keep.shape)[:, b][:, real].flatten().tolist()
        if values:
            got = closed.view(-1, *keep.shape)[:, b]
            assert got[:, real].flatten().tolist() == distinct_rank(values)
            assert (got[:, [not r for r in real]] == min(values)).all()


def test_recompact_of_a_picture_in_text():
    """Qwen's three axes: text 0-2, a 2 x 3 picture at 3.., text from 6 on; the picture loses its last column."""
    t = torch.tensor([0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7])
    h = torch.tensor([0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7])
    w = torch.tensor([0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7])
    ids = torch.stack([t, h, w])[:, None]
    closed = position.recompact_positions(ids, torch.tensor([[0, 1, 2, 3, 4, 6, 7, 9, 10]]))
    assert closed[:, 0].tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 3, 4, 4, 5, 6],
        [0, 1, 2, 3, 4, 3, 4, 5, 6],
    ]
    every = torch.arange(11)[None]
    assert torch.equal(position.recompact_positions(ids, every)[:, 0, :9], ids[:, 0, :9])  # nothing dropped, no gap
    assert position.recompact_positions(t[None], torch.tensor([[0, 9, 10]])).tolist() == [[0, 1, 2]]
    # A second turn starts where the cache ends.
    assert position.recompact_positions(t[None] + 40, torch.tensor([[0, 9, 10]])).tolist() == [[40, 41, 42]]


def test_grid_positions():
    keep = torch.tensor([[0, 7, 29], [6, 8, 11]])
    assert position.keep_grid(keep, (5, 6)).tolist() == [[[0, 0], [1, 1], [4, 5]], [[1, 0], [1, 2], [1, 5]]]
    assert position.recompact_grid(keep, (5, 6)).tolist() == [[[0, 0], [1, 1], [2, 2]], [[0, 0], [0, 1], [0, 2]]]
    assert position.recompact_grid(keep[:, :0], (5, 6)).shape == (2, 0, 2)


@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_grid_neighbours(h: int, w: int, data: st.DataObject):
    index = data.draw(st.lists(st.integers(0, h * w - 1), min_size=0, max_size=4))
    got = position.grid_neighbours(torch.tensor([index], dtype=torch.int64), (h, w))
    expected = {
        r * w + c
        for i in index
        for r, c in [(i // w, i % w - 1), (i // w, i % w + 1), (i // w - 1, i % w), (i // w + 1, i % w)]
        if 0 <= r < h and 0 <= c < w
    }
    assert set(got[0].nonzero()[:, 0].tolist()) == expected
    wrapped = position.grid_neighbours(torch.tensor([index], dtype=torch.int64), (h, w), wrap=True)
    clamped = {min(max(i + step, 0), h * w - 1) for i in index for step in (-1, 1, -w, w)}
    assert set(wrapped[0].nonzero()[:, 0].tolist()) == clamped
