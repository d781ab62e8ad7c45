"""Even cuts: of a sequence into parts, of a grid into cells."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vistok.core.allocate import even_sizes
from vistok.core.cells import grid_cells


@given(st.integers(1, 99), st.integers(-1, 120))
def test_even_sizes(n, parts):
    sizes = even_sizes(n, parts)
    assert len(sizes) == min(max(parts, 1), n) and sum(sizes) == n
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_cells_are_rectangles_around_their_anchors(h, w, data):
    count = data.draw(st.integers(1, h * w))
    source, anchor = grid_cells((h, w), count)
    assert source.shape == (h * w,) and anchor.tolist() == sorted(set(anchor.tolist()))
    assert source[anchor].tolist() == list(range(count))
    for cell in range(count):
        places = (source == cell).nonzero()[:, 0]
        rows, columns = (places // w).unique(), (places % w).unique()
        assert len(places) == len(rows) * len(columns)
        assert int(rows[-1] - rows[0]) == len(rows) - 1 and int(columns[-1] - columns[0]) == len(columns) - 1
        assert int(anchor[cell]) // w == int(rows[(len(rows) - 1) // 2])
        assert int(anchor[cell]) % w == int(columns[(len(columns) - 1) // 2])
