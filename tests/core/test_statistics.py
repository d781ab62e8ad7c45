"""Corpus statistics on languages whose truth is known."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.spatial import procrustes

from vistok.core.statistics import (
    benford,
    compression_rate,
    conditional_entropy,
    cooccurrence_embeddings,
    heaps_curve,
    heaps_fit,
    huffman_bits,
    ngram_counts,
    ngram_perplexity,
    ngrams,
    part_purity,
    procrustes_distance,
    purity,
    token_entropy,
    zipf_fit,
    zipf_regression,
)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def drawn(p, n, rng):
    return torch.multinomial(p, n, replacement=True, generator=rng)


def law(exponent, size, offset=0.0):
    p = (torch.arange(1, size + 1).double() + offset) ** -exponent
    return p / p.sum()


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.7])
def test_zipf_gives_its_exponent_back(exponent, rng):
    counts = torch.bincount(drawn(law(exponent, 300), 200_000, rng), minlength=300)
    assert zipf_fit(counts).exponent == pytest.approx(exponent, abs=0.02)
    exact = (law(exponent, 300) * 1e9).round()
    assert zipf_fit(exact).exponent == pytest.approx(exponent, abs=1e-4)
    assert zipf_regression(exact) == pytest.approx(exponent, abs=1e-3)


def test_zipf_mandelbrot_gives_both_back(rng):
    found = zipf_fit((law(1.3, 500, 4.0) * 1e9).round(), offset=True)
    assert found.exponent == pytest.approx(1.3, abs=0.01) and found.offset == pytest.approx(4.0, abs=0.1)


def test_even_ids_have_exponent_nought_and_all_the_bits(rng):
    assert zipf_fit(torch.full((64,), 10)).exponent == pytest.approx(0, abs=1e-6)
    assert zipf_regression(torch.full((64,), 10)) == pytest.approx(0, abs=1e-12)
    ids = [torch.randint(64, (100_000,), generator=rng)]
    assert zipf_fit(torch.bincount(ids[0])).exponent < 0.03
    assert token_entropy(ids) == pytest.approx(6, abs=1e-3)
    assert abs(compression_rate(ids, 64)) < 0.01
    with pytest.raises(ValueError, match="counts: got none"):
        zipf_fit(torch.zeros(3))


def test_ngrams_do_not_reach_over_sentences():
    ids = [torch.tensor([1, 2, 1, 2]), torch.tensor([2]), torch.tensor([2, 1])]
    assert ngrams(ids, 2).tolist() == [[1, 2], [2, 1], [1, 2], [2, 1]]
    assert ngram_counts(ids, 1).tolist() == [4, 3] and ngram_counts(ids, 2).tolist() == [2, 2]
    for n in (0, 5):
        with pytest.raises(ValueError, match=f"n: got {n}"):
            ngrams(ids, n)


def test_heaps(rng):
    assert heaps_fit(heaps_curve([torch.arange(1000)]))[1] == pytest.approx(1)
    k, b = heaps_fit(heaps_curve([torch.full((1000,), 7)]))
    assert (k, b) == (pytest.approx(1), pytest.approx(0))
    ids = [torch.randint(50, (30,), generator=rng) for _ in range(4)]
    seen, curve = set(), []
    for one in torch.cat(ids).tolist():
        seen.add(one)
        curve.append(len(seen))
    assert heaps_curve(ids).tolist() == curve
    # Tokens by a Zipf law of exponent s > 1 grow as n ** (1 / s).
    ids = [drawn(law(1.6, 400_000), 60_000, rng)]
    assert heaps_fit(heaps_curve(ids))[1] == pytest.approx(1 / 1.6, abs=0.05)


def test_entropies_of_a_markov_chain(rng):
    table = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.5, 0.5], [0.3, 0.0, 0.7]], dtype=torch.float64)
    state, chain = 0, []
    for u in torch.rand(60_000, generator=rng).tolist():
        state = int((u > table[state].cumsum(0)).sum())
        chain.append(min(state, 2))
    ids = [torch.tensor(chain)]
    share = torch.bincount(ids[0]).double() / len(chain)
    expected = float(-(share[:, None] * torch.special.xlogy(table, table)).sum() / math.log(2))
    assert conditional_entropy(ids, 1) == pytest.approx(token_entropy(ids))
    assert conditional_entropy(ids, 2) == pytest.approx(expected, abs=0.01)
    assert conditional_entropy(ids, 3) == pytest.approx(expected, abs=0.01)
    half = [ids[0][:30_000]], [ids[0][30_000:]]
    assert ngram_perplexity(*half, 2, 3) == pytest.approx(2**expected, rel=0.02)
    assert ngram_perplexity(*half, 1, 3) == pytest.approx(2 ** token_entropy(ids), rel=0.02)


def test_a_model_of_ngrams_sums_to_one():
    train = [torch.tensor([0, 1, 2, 0, 1]), torch.tensor([2, 2])]
    for context in ([], [0], [1, 2], [3, 3]):
        total = 0.0
        for following in range(5):
            whole = ngram_perplexity(train, [torch.tensor([*context, following])], 3, 5)
            start = ngram_perplexity(train, [torch.tensor(context)], 3, 5) if context else 1.0
            total += whole ** -(len(context) + 1) / start ** -len(context)
        assert total == pytest.approx(1)
    with pytest.raises(ValueError, match="test: got no tokens"):
        ngram_perplexity(train, [], 2, 5)


def test_huffman(rng):
    for counts in ([1, 1], [5, 1, 1], [8, 4, 2, 1, 1], torch.randint(1, 1000, (77,), generator=rng).tolist()):
        share = np.array(counts) / sum(counts)
        entropy = float(-(share * np.log2(share)).sum())
        assert entropy - 1e-9 <= huffman_bits(torch.tensor(counts)) < entropy + 1
    assert huffman_bits(torch.tensor([8, 4, 2, 1, 1])) == 30 / 16
    assert huffman_bits(torch.tensor([9, 0])) == 1
    assert compression_rate([torch.tensor([0, 0, 0, 1])], 256) == 1 - 1 / 8


def test_benford():
    powers = torch.tensor([2**i for i in range(1, 62)])
    share, distance = benford(powers)
    assert float(share.sum()) == pytest.approx(1) and distance < 0.1
    expected = Counter(str(2**i)[0] for i in range(1, 62))
    assert [round(float(s) * 61) for s in share] == [expected[str(d)] for d in range(1, 10)]
    assert benford(torch.arange(1, 10))[1] == pytest.approx(
        sum(abs(1 / 9 - math.log10(1 + 1 / d)) for d in range(1, 10)) / 2
    )


def test_purity():
    ids = torch.tensor([0, 0, 0, 1, 1, 2])
    assert purity(ids, torch.tensor([3, 3, 4, 5, 5, -1])) == 4 / 5
    assert purity(ids, ids) == 1 and purity(torch.zeros(4, dtype=torch.int64), torch.arange(4)) == 1 / 4
    mask = torch.tensor([[0, 0, 1, 1], [0, 5, 1, 1], [2, 2, 3, 3], [2, 2, 3, 0]])
    assert part_purity([torch.tensor([[4, 4], [7, 8]])], [mask]) == 3 / 4
    with pytest.raises(ValueError, match="masks: got 3 x 4, must be a multiple"):
        part_purity([torch.zeros(2, 2, dtype=torch.int64)], [torch.zeros(3, 4, dtype=torch.int64)])
    with pytest.raises(ValueError, match="labels: got -1 throughout"):
        purity(ids, torch.full((6,), -1))


def test_procrustes(rng):
    a = torch.randn(20, 5, generator=rng, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=rng, dtype=torch.float64))[0]
    b = torch.randn(20, 5, generator=rng, dtype=torch.float64)
    assert procrustes_distance(a, 3 * a @ turn + 7) == pytest.approx(0, abs=1e-12)
    found = procrustes_distance(a, b)
    assert found == pytest.approx(procrustes(a.numpy(), b.numpy())[2])
    assert found == pytest.approx(procrustes_distance(a @ turn, -2 * b)) == pytest.approx(procrustes_distance(b, a))
    assert procrustes_distance(a, a[:, :3]) > 0.05
    assert procrustes_distance(a, torch.cat([a, torch.zeros(20, 2)], 1)) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="rows that are all equal"):
        procrustes_distance(a, torch.ones(20, 2))


def test_ids_that_stand_alike_lie_alike(rng):
    """Of a language where 0 and 1 stand in the same places, as do 2 and 3."""
    ids = []
    for _ in range(400):
        one, two = torch.randint(2, (2,), generator=rng).tolist()
        ids.append(torch.tensor([one, 4, 5, 2 + two, 6, 7]))
    x = cooccurrence_embeddings(ids, 8, 4, window=1)
    assert x.shape == (8, 4)
    away = torch.cdist(x, x)
    assert away[0, 1] < 0.2 * away[0, 2] and away[2, 3] < 0.2 * away[0, 2]
