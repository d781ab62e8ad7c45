"""Scores against loops, closed forms and linear algebra."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.core import oracle
from vistok.core import score


def attention(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).softmax(-1)


def test_class_token_scores():
    layers = [attention(2, 3, 7) for _ in range(4)]
    mean = score.cls_mean(layers[0])
    for b in range(2):
        for i in range(7):
            assert mean[b, i].item() == pytest.approx(sum(layers[0][b, h, i].item() for h in range(3)) / 3)
    torch.testing.assert_close(score.cls_sum(layers), sum(score.cls_mean(layer) for layer in layers))
    assert torch.equal(score.cls_sum(layers[:1]), mean)
    assert torch.equal(score.cls_mean(layers[0][:, [2, 0, 1]]).argsort(), mean.argsort())
    with pytest.raises(ValueError, match="layers"):
        score.cls_sum([])


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(0, 999))
def test_received_and_last_query_under_a_mask(b: int, h: int, q: int, n: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(b, h, q, n, generator=generator, dtype=torch.float64)
    mask = torch.rand(b, q, generator=generator) < 0.6
    received, last = score.received(rows, mask), score.last_query(rows, mask)
    for p in range(b):
        real = mask[p].nonzero()[:, 0].tolist()
        expected = rows[p][:, real].mean((0, 1)) if real else torch.zeros(n, dtype=torch.float64)
        torch.testing.assert_close(received[p], expected)
        torch.testing.assert_close(last[p], rows[p, :, real[-1] if real else 0].mean(0))
    torch.testing.assert_close(score.received(rows), score.received(rows, torch.ones_like(mask)))
    torch.testing.assert_close(score.last_query(rows), score.last_query(rows, torch.ones_like(mask)))


def test_received_of_a_complete_map_sums_to_one():
    assert torch.allclose(score.received(attention(2, 3, 5, 5)).sum(1), torch.ones(2, dtype=torch.float64))


def test_entropy():
    uniform = torch.full((2, 8), 0.5)
    assert torch.allclose(score.entropy(uniform), torch.full((2,), math.log(8)))
    assert score.entropy(torch.tensor([0.0, 3.0, 0.0])).item() == 0
    assert score.entropy(torch.zeros(4)).item() == 0
    rows = torch.rand(2, 3, 5, dtype=torch.float64)
    shares = [v / sum(rows[1, 2].tolist()) for v in rows[1, 2].tolist()]
    assert score.entropy(rows)[1, 2].item() == pytest.approx(-sum(s * math.log(s) for s in shares))
    assert score.entropy(rows).shape == (2, 3)


def test_key_norm():
    keys = torch.randn(2, 5, 3, dtype=torch.float64)
    assert score.key_norm(keys)[1, 4].item() == pytest.approx(math.sqrt(sum(v * v for v in keys[1, 4].tolist())))
    assert score.key_norm(keys.half()).dtype == torch.float32


@pytest.mark.parametrize("n", [1, 5, 96, 97, 200])
def test_cosine(n):
    x, y = torch.randn(2, n, 6, dtype=torch.float64), torch.randn(2, 4, 6, dtype=torch.float64)
    x[0, 0] = 0
    itself = score.cosine(x)
    assert torch.equal(itself, itself.transpose(1, 2))
    assert torch.equal(itself.diagonal(dim1=1, dim2=2), x.ne(0).any(2).double())
    torch.testing.assert_close(itself, score.cosine(x, x))
    last = oracle.cosine(x[1, n - 1].tolist(), y[1, 3].tolist())
    assert score.cosine(x, y)[1, n - 1, 3].item() == pytest.approx(last)
    assert (score.cosine(x, y)[0, 0] == 0).all()


def test_cosine_has_gradients():
    x = torch.randn(1, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(score.cosine, x)


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_text_similarity(reduce):
    x, text = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(3, 6, 4, dtype=torch.float64)
    mask = torch.rand(3, 6) < 0.5
    mask[0], mask[1] = True, False
    got = score.text_similarity(x, text, mask, reduce)
    for b in range(3):
        for i in range(5):
            each = [oracle.cosine(x[b, i].tolist(), text[b, t].tolist()) for t in mask[b].nonzero()[:, 0].tolist()]
            expected = (sum(each) / len(each) if reduce == "mean" else max(each)) if each else 0
            assert got[b, i].item() == pytest.approx(expected)
    assert (score.text_similarity(x, text[:, :0], reduce=reduce) == 0).all()
    torch.testing.assert_close(score.text_similarity(3 * x, text)[0], score.text_similarity(x, text, mask)[0])
    with pytest.raises(ValueError, match="reduce"):
        score.text_similarity(x, text, reduce="sum")


@given(st.integers(1, 6), st.integers(0, 5), st.sampled_from([0.0, 0.5, 0.85, 1.0]), st.booleans(), st.integers(0, 99))
def test_pagerank(n: int, iterations: int, damping: float, weighted: bool, seed: int):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(2, 3, n, n, generator=generator, dtype=torch.float64).softmax(-1)
    weights = torch.rand(2, 3, n, generator=generator, dtype=torch.float64) + 0.1 if weighted else None
    rank = score.pagerank(maps, iterations, damping, weights)
    for b in range(2):
        for h in range(3):
            w = (weights[b, h] / weights[b, h].sum()).tolist() if weighted else [1 / n] * n
            p = list(w)
            for _ in range(iterations):
                p = [
                    damping * sum(p[i] * maps[b, h, i, j].item() for i in range(n)) + (1 - damping) * w[j]
                    for j in range(n)
                ]
            assert rank[b, h].tolist() == pytest.approx(p)
    assert torch.allclose(rank.sum(-1), torch.ones(2, 3, dtype=torch.float64))


def test_pagerank_limits():
    maps = attention(2, 6, 6)
    torch.testing.assert_close(score.pagerank(maps, 1), score.received(maps[:, None]))
    torch.testing.assert_close(score.pagerank(torch.eye(5)[None], 9), torch.full((1, 5), 0.2))
    values, vectors = torch.linalg.eig(maps.transpose(1, 2))  # left eigenvector of eigenvalue 1
    perron = vectors.gather(2, values.real.argmax(1)[:, None, None].expand(-1, 6, 1))[..., 0].real
    torch.testing.assert_close(score.pagerank(maps, 200), perron / perron.sum(1, keepdim=True))
    star = torch.zeros(1, 5, 5)
    star[0, :, 2] = 1
    assert score.pagerank(star, 4, 0.85).argmax().item() == 2
    for wrong, named in [((-1, 1.0), "iterations"), ((1, 1.5), "damping")]:
        with pytest.raises(ValueError, match=named):
            score.pagerank(maps, *wrong)


def test_reconstruction_error_is_the_distance_to_the_span():
    x = torch.randn(3, 20, 8, dtype=torch.float64)
    basis = x[:, 4:8]
    error = score.reconstruction_error(x, basis, 1e-12)
    for b in range(3):
        solution = torch.linalg.lstsq(basis[b].T, x[b].T).solution
        torch.testing.assert_close(error[b], (x[b] - solution.T @ basis[b]).norm(dim=1), atol=1e-6, rtol=1e-6)
    assert (error[:, 4:8] < 1e-5).all()
    mixed = torch.randn(3, 2, 4, dtype=torch.float64) @ basis
    assert (score.reconstruction_error(mixed, basis) < 1e-4).all()


def test_reconstruction_error_with_ridge():
    x, basis = torch.randn(1, 9, 5, dtype=torch.float64), torch.randn(1, 3, 5, dtype=torch.float64)
    s = basis[0]
    w = x[0] @ s.T @ torch.linalg.inv(s @ s.T + 0.7 * torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(score.reconstruction_error(x, basis, 0.7)[0], (x[0] - w @ s).norm(dim=1))
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    torch.testing.assert_close(score.reconstruction_error(x @ turn, basis @ turn), score.reconstruction_error(x, basis))
    with pytest.raises(ValueError, match="ridge"):
        score.reconstruction_error(x, basis, 0)


def test_reconstruction_error_with_equal_basis_tokens():
    """In single precision, features of length 30, every basis token twice: the system is nearly singular."""
    x = torch.randn(2, 50, 64) * 4
    basis = x[:, :5]
    twice = torch.cat([basis, basis], 1)
    torch.testing.assert_close(
        score.reconstruction_error(x, twice), score.reconstruction_error(x, basis), atol=1e-2, rtol=1e-3
    )
