"""Nested dropout: the distributions of lengths, and that cutting is masking of keys."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from vistok.core.drop import cut, draw_lengths, keep_mask, mask_tail

scipy_stats = pytest.importorskip("scipy.stats")


def drawn(n, distribution, count=40_000):
    return draw_lengths(count, n, distribution, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("n", [1, 5, 32])
def test_uniform_is_uniform_on_all_lengths_and_never_nothing(n):
    counts = drawn(n, "uniform").bincount(minlength=n + 1)
    assert counts[0] == 0
    assert n == 1 or scipy_stats.chisquare(counts[1:].numpy()).pvalue > 0.001


@pytest.mark.parametrize(
    ("n", "powers"), [(1, [1]), (32, [1, 2, 4, 8, 16, 32]), (33, [1, 2, 4, 8, 16, 32]), (31, [1, 2, 4, 8, 16])]
)
def test_powers_of_two(n, powers):
    values, counts = drawn(n, "powers-of-two").unique(return_counts=True)
    assert values.tolist() == powers
    assert n == 1 or scipy_stats.chisquare(counts.numpy()).pvalue > 0.001


@pytest.mark.parametrize("n", [1, 12, 16])
def test_uniform_rounded_up_to_a_power(n):
    values, counts = drawn(n, "uniform-to-power").unique(return_counts=True)
    expected = [min(n, 1 << (k - 1).bit_length()) for k in range(1, n + 1)]  # an exact power stays put
    assert values.tolist() == sorted(set(expected))
    share = torch.tensor([expected.count(v) / n for v in values.tolist()], dtype=torch.float64)
    assert n == 1 or scipy_stats.chisquare(counts.numpy(), (share * counts.sum()).numpy()).pvalue > 0.001


def test_one_length_for_the_batch_and_the_same_under_a_seed():
    assert len(set(draw_lengths(50, 1000, per="batch").tolist())) == 1
    assert len(set(draw_lengths(50, 1000).tolist())) > 10
    one, two = (draw_lengths(9, 99, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)


def test_cutting_is_masking_of_keys_and_filling_with_zeros_is_not():
    """To other tokens that attend to [themselves | tokens], as a decoder's mask tokens do."""
    own, tokens, k = torch.randn(2, 1, 3, 8), torch.randn(2, 1, 6, 8), 4
    attend = lambda kv, mask=None: scaled_dot_product_attention(own, kv, kv, mask)  # noqa: E731
    expected = attend(torch.cat([own, cut(tokens[:, 0], k)[:, None]], 2))
    keep = torch.cat([torch.ones(2, 3, dtype=torch.bool), keep_mask(torch.full((2,), k), 6)], 1)[:, None, None]
    torch.testing.assert_close(attend(torch.cat([own, tokens], 2), keep), expected)
    zeros = mask_tail(tokens[:, 0], torch.full((2,), k), torch.zeros(8))[:, None]
    assert not torch.allclose(attend(torch.cat([own, zeros], 2)), expected, atol=1e-3)


def test_the_tail_becomes_the_learned_vector_and_the_input_stays_as_it_was():
    x, token = torch.randn(2, 5, 3), torch.randn(3, requires_grad=True)
    before = x.clone()
    out = mask_tail(x, torch.tensor([2, 5]), token)
    assert torch.equal(x, before) and torch.equal(out[1], x[1])
    assert torch.equal(out[0, :2], x[0, :2]) and torch.equal(out[0, 2:], token.expand(3, 3))
    out.sum().backward()
    assert torch.equal(token.grad, torch.full((3,), 3.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cut(torch.zeros(1, 3), 0), "k: got 0"),
        (lambda: cut(torch.zeros(1, 3), 4), "k: got 4, must be between 1 and the 3 tokens"),
        (lambda: draw_lengths(1, 0), "n: got 0"),
        (lambda: draw_lengths(1, 3, "normal"), "distribution: got 'normal'"),
        (lambda: draw_lengths(1, 3, per="token"), "per: got 'token'"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
