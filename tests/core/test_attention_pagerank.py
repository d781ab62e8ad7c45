"""PageRank of causal attention in blocks against a walk along the whole map, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.core.test_attention import Largest
from vistok.core.attention import attention_pagerank


def walk(q: Tensor, k: Tensor, temperature: float, iterations: int, scale: float) -> list[float]:
    """One head of one picture without padding: (M, d) queries and keys."""
    m = len(q)
    rows = []
    for i in range(m):
        weights = [math.exp(float(q[i] @ k[j]) * scale / temperature) for j in range(i + 1)]
        rows.append([w / sum(weights) for w in weights])
    rank = [1 / m] * m
    for _ in range(iterations):
        rank = [sum(rank[i] * rows[i][j] for i in range(j, m)) for j in range(m)]
    return rank


@given(
    st.sampled_from([(1, 1), (4, 2), (3, 3)]),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(0, 4),
    st.sampled_from([0.1, 0.5, 1.0]),
    st.booleans(),
    st.integers(0, 999),
)
def test_against_the_whole_map(
    heads: tuple[int, int], m: int, block: int, iterations: int, temperature: float, padded: bool, seed: int
):
    generator = torch.Generator().manual_seed(seed)
    h, hk = heads
    q = torch.randn(2, h, m, 4, generator=generator, dtype=torch.float64)
    k = torch.randn(2, hk, m, 4, generator=generator, dtype=torch.float64)
    real = torch.rand(2, m, generator=generator) < 0.7 if padded else torch.ones(2, m, dtype=torch.bool)
    real[:, seed % m] = True
    scale = 0.3 if seed % 2 else None
    got = attention_pagerank(q, k, temperature, iterations, scale, block, mask=real if padded else None)
    assert got.shape == (2, h, m) and not got[~real[:, None].expand_as(got)].any()
    torch.testing.assert_close(got.sum(2), torch.ones(2, h, dtype=torch.float64))
    for b in range(2):
        for head in range(h):
            at = real[b].nonzero()[:, 0]
            keys = k[b, head * hk // h, at]
            want = walk(q[b, head, at], keys, temperature, iterations, 0.3 if seed % 2 else 0.5)
            torch.testing.assert_close(got[b, head, at], torch.tensor(want, dtype=torch.float64))


def test_tokens_that_see_only_themselves_keep_their_share():
    """Logits so sharp that each row is one-hot on its own key: the uniform start stays."""
    basis = 100 * torch.eye(8)[None, None]
    torch.testing.assert_close(attention_pagerank(basis, basis, 0.1, 5), torch.full((1, 1, 8), 1 / 8))


def test_causal_attention_moves_mass_to_early_tokens():
    rank = attention_pagerank(torch.zeros(1, 2, 30, 4), torch.zeros(1, 1, 30, 4), 1.0, 5)
    assert bool((rank.diff(dim=2) < 0).all())


def test_padding_changes_nothing_on_either_side():
    q, k = torch.randn(1, 2, 12, 4), torch.randn(1, 2, 12, 4)
    want = attention_pagerank(q, k, 0.1, 5)
    for before, after in ((3, 0), (0, 4), (2, 2)):
        padded = [torch.cat([torch.randn(1, 2, before, 4), x, torch.randn(1, 2, after, 4)], 2) for x in (q, k)]
        real = torch.tensor([[False] * before + [True] * 12 + [False] * after])
        got = attention_pagerank(*padded, 0.1, 5, mask=real, block=5)
        torch.testing.assert_close(got[:, :, before : before + 12], want)
        assert not got[:, :, ~real[0]].any()


def test_half_precision_is_computed_in_single():
    q, k = torch.randn(1, 2, 20, 4).bfloat16(), torch.randn(1, 1, 20, 4).bfloat16()
    got = attention_pagerank(q, k, 0.1, 3)
    assert got.dtype == torch.float32
    assert torch.equal(got, attention_pagerank(q.float(), k.float(), 0.1, 3))


def test_memory_is_a_block():
    q, k = torch.randn(1, 4, 600, 8), torch.randn(1, 4, 600, 8)
    with Largest() as seen:
        attention_pagerank(q, k, 0.1, 2, block=16)
    assert seen.entries <= 2 * 4 * 16 * 600


def test_errors():
    q = torch.randn(1, 2, 4, 2)
    with pytest.raises(ValueError, match="temperature: got 0, must be greater than 0"):
        attention_pagerank(q, q, 0, 5)
    with pytest.raises(ValueError, match="iterations: got -1"):
        attention_pagerank(q, q, 1.0, -1)
    with pytest.raises(ValueError, match="block: got 0"):
        attention_pagerank(q, q, 1.0, 1, block=0)
    with pytest.raises(ValueError, match="k: got 3 tokens, must be the 4 of q"):
        attention_pagerank(q, q[:, :, :3], 1.0, 1)


@given(st.integers(2, 9), st.integers(1, 5), st.booleans(), st.integers(0, 999))
def test_tokens_that_see_what_they_are_allowed_to(m: int, block: int, padded: bool, seed: int):
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 2, 3, m, 4, generator=generator, dtype=torch.float64)
    allowed = torch.rand(2, m, m, generator=generator) < 0.5
    allowed[:, range(m), range(m)] = True
    real = torch.rand(2, m, generator=generator) < 0.7 if padded else torch.ones(2, m, dtype=torch.bool)
    real[:, seed % m] = True
    got = attention_pagerank(q, k, 0.5, 3, 0.3, block, mask=real if padded else None, allowed=allowed)
    logits = (q @ k.transpose(2, 3) * 0.3 / 0.5).masked_fill(~(allowed & real[:, None])[:, None], -math.inf)
    weights = logits.softmax(-1).masked_fill(~real[:, None, :, None], 0)
    rank = (real / real.sum(1, keepdim=True)).double()[:, None].expand(2, 3, m)
    for _ in range(3):
        rank = (rank[:, :, None] @ weights)[:, :, 0]
    torch.testing.assert_close(got, rank)
