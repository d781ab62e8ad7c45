"""Window attention against the dense map, sliced units against masked ones, and what the masks must be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from vistok.core.effort import (
    active_heads,
    attend,
    gated_mlp,
    head_ratio,
    layer_flops,
    local_mask,
    tiles,
    window_attention,
)

sides = st.integers(1, 11)
windows = st.sampled_from([1, 3, 5, 9, 21])


def generator(seed):
    return torch.Generator().manual_seed(seed)


@given(sides, sides, windows)
def test_local_mask(h, w, window):
    mask = local_mask((h, w), window)
    half = (window - 1) // 2
    for i in range(h * w):
        for j in range(h * w):
            near = abs(i // w - j // w) <= half and abs(i % w - j % w) <= half
            assert bool(mask[i, j]) == near


def test_local_mask_is_symmetric_with_whole_windows_inside():
    mask = local_mask((9, 8), 5)
    assert torch.equal(mask, mask.T) and bool(mask.diagonal().all())
    inside = [8 * y + x for y in range(2, 7) for x in range(2, 6)]
    assert mask[inside].sum(1).tolist() == [25] * len(inside)
    assert bool(local_mask((9, 8), 2 * 9 - 1).all()) and not bool(local_mask((9, 8), 2 * 9 - 3).all())


@pytest.mark.parametrize("window", [0, 4, -3])
def test_bad_windows_are_named(window):
    for make in (lambda: local_mask((3, 3), window), lambda: tiles(((3, 3),), window)):
        with pytest.raises(ValueError, match=f"window: got {window}, must be odd"):
            make()


@settings(max_examples=40)
@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=3), windows, st.integers(1, 8))
def test_tiles_hold_each_query_once_and_all_that_it_sees(grids, window, side):
    made, first = tiles(tuple(grids), window, side), 0
    seen = torch.zeros(made.cells + 1, made.cells + 1, dtype=torch.bool)
    for queries, keys, near in zip(made.queries, made.keys, made.near, strict=True):
        for query, row in zip(queries.tolist(), near, strict=True):
            assert not seen[query].any() or query == made.cells
            seen[query, keys[row]] = True
            assert len(set(keys[row].tolist())) == int(row.sum())
    for h, w in grids:
        own = slice(first, first + h * w)
        assert torch.equal(seen[own, own], local_mask((h, w), window))
        first += h * w
    assert made.cells == first
    assert seen[:first].sum() == sum(int(local_mask(grid, window).sum()) for grid in grids)
    assert not seen[first].any()


def dense(q, k, v, allowed, sees=None, visual=None):
    """Attention by the map, weights to visual keys of blind heads zeroed after the softmax."""
    repeated = [x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v)]
    logits = (q @ repeated[0].transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(~allowed[:, None], -torch.inf)
    weights = logits.softmax(-1)
    if sees is not None:
        weights = weights * ~(~sees[:, None, None] & visual[:, None, None])
    return weights @ repeated[1]


@settings(max_examples=40)
@given(
    st.integers(0, 10_000),
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=2),
    windows,
    st.booleans(),
    st.sampled_from([1, 2, 4]),
    st.floats(0.2, 1),
)
def test_window_attention_is_dense_attention_under_the_mask(seed, grids, window, causal, key_heads, share):
    """Pictures of which some tokens are gone, in rows with text before, between and behind their tokens."""
    made, total = generator(seed), sum(h * w for h, w in grids)
    n = max(1, round(share * total))
    g, m = 2, n + 7
    cells = torch.stack([torch.randperm(total, generator=made)[:n].sort().values for _ in range(g)])
    columns = torch.stack([torch.randperm(m, generator=made)[:n].sort().values for _ in range(g)])
    q, k, v = (torch.randn(g, h, length, 8, generator=made).double()
               for h, length in ((4, n), (key_heads, m), (key_heads, m)))  # fmt: skip
    visual = torch.zeros(g, m, dtype=torch.bool).scatter(1, columns, True)
    others = torch.stack([torch.cat([(~row).nonzero()[:, 0], torch.tensor([-1])]) for row in visual])
    sees = torch.tensor([True, False, True, False])

    block = torch.block_diag(*(local_mask(grid, window).float() for grid in grids)).bool()
    allowed = torch.zeros(g, n, m, dtype=torch.bool)
    for row in range(g):
        near = block[cells[row]][:, cells[row]]
        earlier = columns[row][None] <= columns[row][:, None]
        allowed[row][:, columns[row]] = near & earlier if causal else near
        text = ~visual[row]
        allowed[row][:, text] = torch.arange(m)[text][None] < columns[row][:, None]
    plan = tiles(tuple(grids), window, 3)
    for heads in (None, sees):
        found = window_attention(q, k, v, plan, cells, columns, others, causal=causal, sees=heads)
        torch.testing.assert_close(found, dense(q, k, v, allowed, heads, visual))


def test_a_head_that_does_not_see_gives_less_and_not_more_to_the_rest():
    made = generator(0)
    q, k, v = (torch.randn(2, 4, length, 8, generator=made) for length in (3, 9, 9))
    ones = torch.ones_like(v)
    unseen = torch.zeros(2, 4, 9, dtype=torch.bool)
    unseen[:, 1, 2:5] = True
    out = attend(q, k, ones, unseen=unseen)
    torch.testing.assert_close(out[:, [0, 2, 3]], torch.ones(2, 3, 3, 8))
    assert bool((out[:, 1] < 1).all())
    gone = torch.arange(9).ge(2) & torch.arange(9).lt(5)
    expected = dense(
        q, k, v, torch.ones(2, 3, 9, dtype=torch.bool), torch.tensor([1, 0, 1, 1]).bool(), gone.expand(2, 9)
    )
    torch.testing.assert_close(attend(q, k, v, unseen=unseen), expected)


def test_ratio_of_a_head():
    attention = torch.tensor([[[[0.5, 0.25, 0.25], [0.0, 0.5, 0.5]], [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]]])
    visual = torch.tensor([[False, True, False]])
    assert torch.allclose(head_ratio(attention, visual), torch.tensor([[0.75 / 1.25, 0.0]]))
    second = torch.tensor([[False, True]])
    assert torch.allclose(head_ratio(attention, visual, second), torch.tensor([[1.0, 0.0]]))


@given(st.integers(0, 1000), st.floats(0, 1), st.floats(0, 0.99), st.integers(0, 3))
def test_active_heads_are_a_vote(seed, threshold, votes, always):
    ratios = torch.rand(5, 4, 3, generator=generator(seed)).double()
    active = active_heads(ratios, threshold, votes, always)
    for layer in range(4):
        for head in range(3):
            count = sum(float(ratios[s, layer, head]) > threshold for s in range(5))
            assert bool(active[layer, head]) == (layer < always or count / 5 > votes)


@given(st.integers(0, 1000), st.integers(1, 12), st.booleans())
def test_sliced_units_equal_masked_ones(seed, units, bias):
    """The released form: gate and up beyond the cut are set to zero."""
    made = generator(seed)
    x = torch.randn(2, 3, 6, generator=made).double()
    weights = [(torch.randn(*s, generator=made).double(), torch.randn(s[0], generator=made).double() if bias else None)
               for s in ((12, 6), (12, 6), (6, 12))]  # fmt: skip
    (gate, up), down = ([torch.nn.functional.linear(x, *w) for w in weights[:2]], weights[2])
    gate[..., units:] = 0
    up[..., units:] = 0
    expected = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, *down)
    torch.testing.assert_close(gated_mlp(x, *weights, torch.nn.functional.silu, units), expected)


def test_flops_are_those_counted():
    made = generator(0)
    plan = tiles(((10, 12),), 5)
    n, text, width, heads, d, hidden = 120, 7, 32, 4, 8, 48
    x = torch.randn(text + n, width, generator=made)
    qkv, o = torch.randn(width, width + 2 * 16, generator=made), torch.randn(width, width, generator=made)
    mlp = [(torch.randn(*s, generator=made), None) for s in ((hidden, width), (hidden, width), (width, hidden))]
    cells, columns, others = torch.arange(n)[None], text + torch.arange(n)[None], torch.arange(text)[None]
    with FlopCounterMode(display=False) as counter:
        q, k, v = (y.unflatten(1, (-1, d)).transpose(0, 1)[None] for y in (x @ qkv).split([width, 16, 16], 1))
        window_attention(q[:, :3, text:], k[:, [0, 0, 1]], v[:, [0, 0, 1]], plan, cells, columns, others)
        attend(q[:, :, :text], k, v)
        x @ o
        gated_mlp(x[:text], *mlp, torch.nn.functional.silu, hidden)
        gated_mlp(x[text:], *mlp, torch.nn.functional.silu, hidden // 2)
    counted = layer_flops(text + n, text * (text + n), [(plan.pairs(text), 3)], [(text, hidden), (n, hidden // 2)],
                          width, heads, 2, d)  # fmt: skip
    assert counted == counter.get_total_flops()
    assert plan.pairs() < n * n / 1.2
