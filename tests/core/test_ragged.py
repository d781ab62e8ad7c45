"""Masks with counts of their own a picture, against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vistok.core.ragged import absorb, fold, positions, top_mask


@given(st.integers(0, 2**16), st.integers(1, 9), st.integers(1, 3))
def test_top_mask_is_topk_with_a_count_a_picture(seed, n, b):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (b, n), generator=g).float()  # with ties
    mask = torch.rand(b, n, generator=g) < 0.7
    count = torch.randint(0, n + 1, (b,), generator=g)
    for given_mask in (None, mask):
        chosen = top_mask(scores, count, given_mask)
        for i in range(b):
            free = [j for j in range(n) if given_mask is None or mask[i, j]]
            best = sorted(free, key=lambda j: (-float(scores[i, j]), j))[: int(count[i])]
            assert chosen[i].nonzero()[:, 0].tolist() == sorted(best)


def test_positions_are_padded():
    at, real = positions(torch.tensor([[False, True, True], [True, False, False], [False, False, False]]))
    assert real.tolist() == [[True, True], [True, False], [False, False]]
    assert at[0].tolist() == [1, 2] and at[1, 0] == 0
    assert positions(torch.zeros(2, 3, dtype=torch.bool))[0].shape == (2, 0)


@given(st.integers(0, 2**16), st.integers(2, 10), st.integers(1, 3), st.integers(1, 12))
def test_absorb_against_loops(seed, n, b, neighbours):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(b, n, 5, generator=g, dtype=torch.float64)
    weight = torch.rand(b, n, generator=g, dtype=torch.float64)
    among = torch.rand(b, n, generator=g) < 0.8
    centres = among & (torch.rand(b, n, generator=g) < 0.4)
    full = torch.randint(0, 5, (b, n, n), generator=g).double()  # with ties
    at = positions(centres)[0]
    affinity = full.gather(1, at[:, :, None].expand(-1, -1, n))
    values, owner = absorb(x, centres, among, affinity, weight, neighbours)

    for i in range(b):
        taken = {}
        for j in range(n):
            if not centres[i, j]:
                assert torch.equal(values[i, j], x[i, j])
                continue
            others = [m for m in range(n) if among[i, m] and m != j]
            near = sorted(others, key=lambda m: (-float(full[i, j, m]), m))[:neighbours]
            grown = x[i, j] + sum((weight[i, m] * x[i, m] for m in near), torch.zeros(5, dtype=torch.float64))
            torch.testing.assert_close(values[i, j], grown)
            for m in near:
                taken.setdefault(m, []).append((-float(full[i, j, m]), j))
        assert owner[i].tolist() == [min(taken[m])[1] if m in taken else -1 for m in range(n)]


def test_affinity_of_another_shape_is_named():
    centres = torch.tensor([[True, False]])
    with pytest.raises(ValueError, match="affinity"):
        absorb(torch.zeros(1, 2, 3), centres, centres, torch.zeros(1, 2, 2), torch.ones(1, 2), 1)


@given(st.integers(0, 2**16), st.integers(1, 10), st.integers(1, 3))
def test_fold_against_loops(seed, n, b):
    g = torch.Generator().manual_seed(seed)
    x, values = torch.randn(2, b, n, 5, generator=g, dtype=torch.float64)
    weight = torch.randint(0, 4, (b, n), generator=g).double()  # with ties
    role = torch.randint(0, 3, (b, n), generator=g)  # stays, folds, dropped
    stays, folds = role == 0, role == 1
    owner = torch.full((b, n), -1)
    for i in range(b):
        kept = stays[i].nonzero()[:, 0].tolist()
        for j in (~stays[i]).nonzero()[:, 0].tolist():
            if kept and torch.rand((), generator=g) < 0.3:
                owner[i, j] = kept[j % len(kept)]
    places, real, tokens, source = fold(x, values, stays, owner, folds, weight)
    for i in range(b):
        folding = folds[i].nonzero()[:, 0].tolist()
        extra = max(folding, key=lambda j: (float(weight[i, j]), -j), default=None)
        kept = sorted([*stays[i].nonzero()[:, 0].tolist(), *([] if extra is None else [extra])])
        assert places[i][real[i]].tolist() == kept
        for slot, j in enumerate(kept):
            expected = sum(weight[i, o] * x[i, o] for o in folding) if j == extra else values[i, j]
            torch.testing.assert_close(tokens[i, slot], expected)
        for j in range(n):
            if j in kept:
                assert source[i, j] == kept.index(j)
            elif owner[i, j] >= 0:
                assert source[i, j] == kept.index(int(owner[i, j]))
            else:
                assert source[i, j] == (kept.index(extra) if j in folding else -1)
