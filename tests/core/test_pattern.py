"""Patterns against their definitions, written out a query at a time: masks, counts, tiles and layouts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vistok.core.attention import BlockMask, CoarseKV, Dense, GridWindow, Halo, TileOrder, TokenIndex, Window


def neighbours(i, length, kernel, stride, dilation, causal):
    """Keys that query ``i`` sees along an axis, rule by rule as NATTEN has it."""
    group, place = i % dilation, i // dilation
    size = length // dilation + (1 if group < length % dilation else 0)
    base = place // stride * stride
    if causal:
        leader = min(base + stride - 1, size - 1)
        seen = [j for j in range(size) if j <= place and leader - j < kernel]
    else:
        left, right = kernel // 2, kernel // 2 + kernel % 2 - 1
        leader = min(base + stride // 2, size - 1)
        centre = min(max(leader, left), size - 1 - right)
        seen = [j for j in range(size) if centre - left <= j <= centre + right]
    return {j * dilation + group for j in seen}


def in_block(i, length, block, halo):
    start = i // block * block
    return {j for j in range(start - halo, start + block + halo) if 0 <= j < length}


def in_window(i, length, window, shift):
    """As Swin does it: roll, cut into windows, and keep apart what was not beside one another before the roll."""
    whole = math.ceil(length / window) * window
    rolled = [(j + shift) % whole for j in range(whole)]
    at = rolled.index(i) // window * window
    return {j for j in rolled[at : at + window] if j < length and (j < shift) == (i < shift)}


def dense_of(axes):
    """(Nq, Nk) bool of the product of axes; each a list, by query, of the keys that it sees, and how many there are."""
    queries = itertools.product(*(range(len(seen)) for seen, _ in axes))
    rows = []
    for query in queries:
        keys = itertools.product(*(range(n) for _, n in axes))
        rows.append([all(j in seen[i] for i, j, (seen, _) in zip(query, key, axes, strict=True)) for key in keys])
    return torch.tensor(rows)


def covered(pattern, size=None):
    """The mask that the tiles make, (B, H, Nq, Nk), and how often each query stands in a tile."""
    b, h, nq, nk = pattern.dense_shape
    mask, times = torch.zeros(b, h, nq, nk, dtype=torch.bool), torch.zeros(b, h, nq, dtype=torch.int64)
    for tiles in pattern.tiles(size):
        for t in range(len(tiles.queries.start)):
            queries, keys = (runs[torch.tensor([t])][0] for runs in (tiles.queries, tiles.keys))
            assert len(keys.unique()) == len(keys)
            pictures = range(b) if tiles.picture is None else [int(tiles.picture[t])]
            heads = range(h) if tiles.head is None else [int(tiles.head[t])]
            for i, j in itertools.product(pictures, heads):
                seen = torch.ones(len(queries), len(keys), dtype=torch.bool)
                if tiles.allowed is not None:
                    seen = tiles.allowed[0]
                elif tiles.masked:
                    seen = pattern.allows(torch.tensor(i), torch.tensor(j), queries[:, None], keys)
                assert tiles.masked or bool(seen.all())
                times[i, j, queries] += 1
                mask[i, j, queries[:, None], keys] = seen
    return mask, times


def check(pattern, expected, *sizes):
    """Mask, counts and tiles of ``pattern`` against ``expected`` (Nq, Nk) or (B, H, Nq, Nk)."""
    expected = expected.view(pattern.dense_shape)
    assert torch.equal(pattern.to_dense(), expected)
    assert pattern.pairs == pytest.approx(expected.sum().item() / (len(expected) * expected.shape[1]))
    assert pattern.density == pytest.approx(expected.double().mean().item())
    assert pattern.flops(3, 8) == round(4 * pattern.pairs * 3 * 8)
    for size in (None, *sizes):
        mask, times = covered(pattern, size)
        assert torch.equal(mask, expected)
        assert bool((times == expected.any(3)).all())


@st.composite
def axes(draw, most=11):
    length = draw(st.integers(1, most))
    dilation = draw(st.integers(1, length))
    kernel = draw(st.integers(1, length // dilation))
    return length, kernel, draw(st.integers(1, kernel)), dilation, draw(st.booleans())


@given(axes(most=17), st.integers(1, 6))
def test_grid_window_of_one_axis(axis, size):
    length, *_ = axis
    seen = [neighbours(i, *axis) for i in range(length)]
    check(GridWindow((length,), *((value,) for value in axis[1:])), dense_of([(seen, length)]), size)


@given(st.lists(axes(most=5), min_size=2, max_size=3), st.integers(1, 3))
def test_grid_window_is_the_product_of_its_axes(grid, size):
    seen = [([neighbours(i, *axis) for i in range(axis[0])], axis[0]) for axis in grid]
    check(GridWindow(*zip(*grid, strict=True)), dense_of(seen), size)


def test_grid_window_sees_as_many_keys_everywhere_and_a_stride_group_the_same():
    pattern = GridWindow((7, 10), (3, 4), (2, 4), (2, 1))
    mask = pattern.to_dense()[0, 0]
    assert bool((mask.sum(1) == 12).all())
    rows = mask.view(7, 10, 70)
    assert torch.equal(rows[0], rows[2]) and torch.equal(rows[:, 4], rows[:, 7]) and not torch.equal(rows[0], rows[1])


def test_grid_window_of_all_is_dense_and_of_stride_and_kernel_is_blocks():
    assert bool(GridWindow((4, 5), (4, 5)).to_dense().all())
    assert torch.equal(GridWindow((9,), 9, causal=True).to_dense(), Dense(9, 9, causal=True).to_dense())
    assert torch.equal(GridWindow((4, 6), (2, 3), (2, 3)).to_dense(), Window((4, 6), (2, 3)).to_dense())


@given(st.integers(1, 13), st.integers(1, 5), st.integers(0, 3), st.integers(1, 4))
def test_halo(length, block, halo, size):
    seen = [in_block(i, length, block, halo) for i in range(length)]
    check(Halo((length,), block, halo), dense_of([(seen, length)]), size)
    padded = math.ceil(length / block) * block + 2 * halo
    seen = [
        {j + halo for j in range(i // block * block - halo, i // block * block + block + halo)} for i in range(length)
    ]
    check(Halo((length,), block, halo, padded=True), dense_of([(seen, padded)]), size)
    assert Halo((length,), block, halo, padded=True).key_shape == (padded,)


@given(st.integers(1, 13), st.sampled_from([(2, 2), (4, 2), (3, 3), (6, 2)]), st.integers(0, 3), st.integers(1, 4))
def test_halo_with_a_stride(length, block_and_stride, halo, size):
    block, stride = block_and_stride
    seen = [in_block(i, length, block, halo) for i in range(0, length, stride)]
    check(Halo((length,), block, halo, stride=stride), dense_of([(seen, length)]), size)


@given(st.integers(1, 13), st.integers(1, 5), st.data())
def test_window(length, window, data):
    shift = data.draw(st.integers(0, window - 1))
    seen = [in_window(i, length, window, shift) for i in range(length)]
    check(Window((length,), window, shift), dense_of([(seen, length)]), 2)


def test_windows_of_two_axes():
    seen = [([in_window(i, n, w, s) for i in range(n)], n) for n, w, s in ((6, 3, 1), (5, 2, 1))]
    check(Window((6, 5), (3, 2), 1), dense_of(seen), (2, 3))
    seen = [([in_block(i, n, b, r) for i in range(n)], n) for n, b, r in ((6, 3, 1), (5, 2, 0))]
    check(Halo((6, 5), (3, 2), (1, 0)), dense_of(seen), 4)


@given(st.integers(1, 9), st.integers(0, 5), st.booleans())
def test_dense(queries, more, causal):
    keys = queries + more
    check(
        Dense(queries, keys, causal),
        torch.tensor([[not causal or j <= i + more for j in range(keys)] for i in range(queries)]),
        2,
    )


@given(st.data(), st.booleans(), st.booleans())
def test_token_index(data, own, causal):
    """Lists for all queries and lists a query, of different lengths, some of them empty."""
    b, h, queries, more = (data.draw(st.integers(low, 3)) for low in (1, 1, 1, 0))
    keys = queries + more
    lists = st.permutations(range(keys)).flatmap(lambda p: st.integers(0, keys).map(lambda n: p[:n]))
    n = queries if own else 1
    found = [[[data.draw(lists) for _ in range(n)] for _ in range(h)] for _ in range(b)]
    index = torch.tensor([[[row + [-1] * (keys - len(row)) for row in head] for head in picture] for picture in found])
    expected = torch.tensor(
        [
            [
                [
                    [j in head[q if own else 0] and (not causal or j <= q + more) for j in range(keys)]
                    for q in range(queries)
                ]
                for head in picture
            ]
            for picture in found
        ]
    )
    pattern = TokenIndex(index if own else index[:, :, 0], queries, keys, causal)
    assert torch.equal(pattern.to_dense(), expected)
    assert pattern.pairs == pytest.approx(expected.sum().item() / (b * h))
    mask, times = covered(pattern, 2)
    assert torch.equal(mask, expected) and int(times.max()) <= 1


@given(st.data())
def test_block_mask(data):
    b, h, queries, keys, bq, bk = (data.draw(st.integers(1, n)) for n in (2, 2, 9, 9, 4, 4))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    mask = torch.rand(b, h, math.ceil(queries / bq), math.ceil(keys / bk), generator=rng) < 0.5
    expected = mask.repeat_interleave(bq, 2)[:, :, :queries].repeat_interleave(bk, 3)[..., :keys]
    check(BlockMask(mask, queries, keys, (bq, bk)), expected)


def test_block_mask_from_an_index():
    index = torch.tensor([[[[2, 0], [1, 2]]]])
    mask = BlockMask.from_index(index, 5, 9, (3, 4)).mask
    assert mask.tolist() == [[[[True, False, True], [False, True, True]]]]


def test_coarse_levels_stand_side_by_side():
    fine, coarse = GridWindow((6,), 3), TokenIndex(torch.tensor([[[1]], [[0]]]), 6, 2)
    pattern = CoarseKV((fine, coarse), (0.0, math.log(3)))
    expected = torch.cat([fine.to_dense().expand(2, 1, -1, -1), coarse.to_dense()], 3)
    assert pattern.dense_shape == (2, 1, 6, 8) and torch.equal(pattern.to_dense(), expected)
    assert pattern.pairs == 18 + 6
    torch.testing.assert_close(pattern.log_bias(), torch.tensor([0.0] * 6 + [math.log(3)] * 2))


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=3))
def test_tile_order(grid):
    shape, tile, dilation = zip(*grid, strict=True)
    order = TileOrder.of(shape, tile, dilation)
    x = torch.arange(math.prod(shape)).view(1, 1, -1, 1)
    assert torch.equal(order.unpermute(order.permute(x)), x)
    for places in order.order.view(-1, math.prod(tile)):
        real = [divmod_all(p, shape) for p in places.tolist() if p >= 0]
        for axis, (_, t, d) in enumerate(grid):
            along = {where[axis] for where in real}
            assert len({a % d for a in along}) <= 1 and (not along or max(along) - min(along) <= (t - 1) * d)


def divmod_all(place, shape):
    where = []
    for n in reversed(shape):
        place, at = divmod(place, n)
        where.insert(0, at)
    return where


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: GridWindow((4, 4), 5), "kernel: got 5 with dilation 1, must fit into the 4"),
        (lambda: GridWindow((8,), 3, dilation=3), "kernel: got 3 with dilation 3"),
        (lambda: GridWindow((8,), 3, stride=4), "stride: got 4, must be at most the kernel, 3"),
        (lambda: GridWindow((8, 8), (3, 3, 3)), "kernel: got .* one for all, or 2"),
        (lambda: GridWindow((8, 8), 3, causal=(True,)), "causal: got"),
        (lambda: GridWindow((2, 2, 2, 2), 1), "shape: got"),
        (lambda: Window((8,), 4, 4), "shift: got 4"),
        (lambda: Halo((8,), 0, 1), "block: got 0"),
        (lambda: Halo((8,), 3, 1, stride=2), "stride: got 2, must be a divisor of the block, "),
        (lambda: Dense(4, 3, causal=True), "num_queries: got 4"),
        (lambda: TokenIndex(torch.tensor([[[5]]]), 2, 5), "index: got 5..5"),
        (lambda: TokenIndex(torch.tensor([[5]]), 2, 5), "index: got"),
        (lambda: BlockMask(torch.ones(1, 1, 2, 2, dtype=torch.bool), 9, 8, (4, 4)), "mask: got"),
        (lambda: CoarseKV((Dense(2, 2),), ()), "log_weights: got 0 for 1"),
        (lambda: CoarseKV((Dense(2, 2), Dense(3, 2)), (0.0, 0.0)), "levels: got"),
        (lambda: CoarseKV((Dense(2, 2),), (0.0,)).tiles(), "pattern: got CoarseKV"),
    ],
)
def test_what_does_not_fit_is_said(made, message):
    with pytest.raises(ValueError, match=message):
        made()
