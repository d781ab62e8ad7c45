"""HoloV against plain loops over chunks, and what its sheet says must hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vistok.host.reducer import Evidence
from vistok.reduce import holov
from vistok.reduce.holov import HoloV


def evidence(seed=0, b=2, n=48, d=8, heads=2):
    g = torch.Generator().manual_seed(seed)
    attention = torch.rand(b, heads, n, generator=g, dtype=torch.float64).pow(3)
    return Evidence(features=torch.randn(b, n, d, generator=g, dtype=torch.float64), cls_attention=attention / (2 * n))


def plain_scores(x, a, sizes, beta, parity="paper"):
    """Mean token score of each chunk of one picture, as the paper's formulas read."""
    out, start = [], 0
    for n in sizes:
        tokens, attention = x[start : start + n], [float(v) for v in a[start : start + n]]
        start += n
        if n == 1:
            out.append(attention[0] * (1 if parity == "authors" else 1000))
            continue
        variance = []
        for i in range(n):
            row = [0.0 if j == i else float(torch.cosine_similarity(tokens[i], tokens[j], 0)) for j in range(n)]
            mean = sum(row) / (n - 1)
            variance.append(sum((s - mean) ** 2 for s in row) / (n - 1))
        big = [1000 * v for v in attention]
        scale = (sum(big) / n) / (sum(variance) / n + 1e-6)
        out.append(sum(v + beta * w * scale for v, w in zip(big, variance, strict=True)) / n)
    return out


@settings(max_examples=30)
@given(st.integers(0, 999), st.integers(2, 30), st.integers(1, 30), st.sampled_from(["paper", "authors"]))
def test_chunk_scores(seed, n, chunks, parity):
    seen, system = evidence(seed, n=n), HoloV(chunks=chunks, beta=0.3, parity=parity)
    sizes = system.sizes(n, 1)
    assert sum(sizes) == n and max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
    attention = seen.cls_attention.mean(1)
    scores = system.chunk_scores(seen.features, attention, sizes)
    for i in range(2):
        wanted = plain_scores(seen.features[i], attention[i], sizes, 0.3, parity)
        torch.testing.assert_close(scores[i], torch.tensor(wanted, dtype=torch.float64))


@settings(max_examples=40)
@given(st.integers(0, 999), st.integers(1, 48), st.integers(1, 60))
def test_best_of_each_chunk_and_exactly_keep(seed, keep, chunks):
    seen, system = evidence(seed), HoloV(chunks=chunks)
    reduction = system.reduce(seen, keep)
    assert reduction.keep.shape == (2, keep)
    sizes, attention = system.sizes(48, keep), seen.cls_attention.mean(1)
    scores = system.chunk_scores(seen.features, attention, sizes)
    for i in range(2):
        kept, start, counts = set(reduction.keep[i].tolist()), 0, []
        for size in sizes:
            mine = range(start, start + size)
            start += size
            count = len(kept & set(mine))
            best = sorted(mine, key=lambda j: (-float(attention[i, j]), j))[:count]
            assert kept & set(mine) == set(best)
            counts.append(count)
        if all(count < size for count, size in zip(counts, sizes, strict=True)):  # no chunk is full
            shares = [keep * score / float(scores[i].sum()) for score in scores[i].tolist()]
            wanted = [int(share) for share in shares]
            for chunk in sorted(range(len(sizes)), key=lambda c: -shares[c])[: keep - sum(wanted)]:
                wanted[chunk] += 1
            assert counts == wanted


def test_number_of_chunks_follows_the_released_rule():
    assert len(HoloV().sizes(576, 64)) == 16
    assert len(HoloV().sizes(576, 576)) == 1
    assert len(HoloV().sizes(10, 1)) == 10


def test_equal_chunks_get_equal_shares():
    chunk = evidence(b=1, n=12)
    four = Evidence(features=chunk.features.repeat(1, 4, 1), cls_attention=chunk.cls_attention.repeat(1, 1, 4))
    for keep in (4, 9, 22, 47):
        counts = torch.bincount(HoloV(chunks=4).reduce(four, keep).keep[0] // 12, minlength=4)
        assert counts.max() - counts.min() <= 1


def test_one_chunk_is_plain_top_k():
    seen = evidence()
    wanted = seen.cls_attention.mean(1).topk(7).indices.sort(1).values
    assert torch.equal(HoloV(chunks=1).reduce(seen, 7).keep, wanted)


def test_as_many_equal_chunks_as_tokens_to_keep():
    chunk = evidence(b=1, n=6)
    eight = Evidence(features=chunk.features.repeat(1, 8, 1), cls_attention=chunk.cls_attention.repeat(1, 1, 8))
    best = int(chunk.cls_attention.mean(1).argmax())
    assert HoloV(chunks=8).reduce(eight, 8).keep.tolist() == [[6 * i + best for i in range(8)]]


def test_without_beta_the_allocation_follows_mean_attention():
    attention = torch.tensor([4.0, 2.0, 1.0, 1.0]).repeat_interleave(20)[None, None] / 1000
    seen = Evidence(features=torch.randn(1, 80, 4), cls_attention=attention)
    counts = torch.bincount(HoloV(chunks=4, beta=0).reduce(seen, 32).keep[0] // 20, minlength=4)
    assert counts.tolist() == [16, 8, 4, 4]


@pytest.mark.parametrize("n", [2, 5, 9])
def test_variance_of_equal_tokens(n):
    x = torch.randn(1, 1, 7).expand(1, n, 7)
    torch.testing.assert_close(holov.similarity_variance(x), torch.full((1, n), 1 / (n - 1)))


def test_scale_of_the_features_does_not_matter_nor_does_the_batch():
    seen = evidence(b=3)
    keep = HoloV().reduce(seen, 11).keep
    scaled = Evidence(features=seen.features * 37, cls_attention=seen.cls_attention)
    assert torch.equal(HoloV().reduce(scaled, 11).keep, keep)
    for i in range(3):
        alone = Evidence(features=seen.features[i : i + 1], cls_attention=seen.cls_attention[i : i + 1])
        assert torch.equal(HoloV().reduce(alone, 11).keep[0], keep[i])


def test_excess_of_a_full_chunk_is_redistributed_or_lost():
    """Nearly all attention in the first of four chunks of 5: its share of 10 is far above 5."""
    attention = torch.full((1, 1, 20), 1e-4)
    attention[..., :5] = torch.tensor([0.01, 0.05, 0.02, 0.04, 0.03])
    seen = Evidence(features=torch.randn(1, 20, 6), cls_attention=attention)
    paper = HoloV(chunks=4).reduce(seen, 10)
    assert set(paper.keep[0, :5].tolist()) == {0, 1, 2, 3, 4} and len(set(paper.keep[0].tolist())) == 10
    assert (paper.tokens.norm(dim=2) > 0).all()

    released = HoloV(chunks=4, parity="authors").reduce(seen, 10)
    filled = released.tokens.norm(dim=2)[0] > 0
    assert filled.tolist() == [True] * 5 + [False] * 5
    assert torch.equal(released.tokens[0, :5], seen.features[0, :5])  # a whole chunk: raster order
    assert (released.keep.diff(dim=1) > 0).all()
    assert released.source[0, :5].tolist() == [0, 1, 2, 3, 4] and (released.source[0, 5:] == -1).all()


def test_released_order_is_by_attention_inside_a_cut_chunk():
    seen = evidence()
    released = HoloV(chunks=3, parity="authors").reduce(seen, 12)
    ours = HoloV(chunks=3).reduce(seen, 12)
    attention = seen.cls_attention.mean(1)
    for i in range(2):
        tokens = [int((released.source[i] == slot).nonzero()[0, 0]) for slot in range(12)]
        assert sorted(tokens) == ours.keep[i].tolist()
        assert tokens == sorted(tokens, key=lambda j: (j // 16, -float(attention[i, j])))
        assert torch.equal(released.tokens[i], seen.features[i, tokens])


def test_all_tokens_are_the_identity_only_here():
    seen = evidence()
    ours = HoloV(chunks=16).reduce(seen, 48)
    assert torch.equal(ours.tokens, seen.features)
    released = HoloV(chunks=16, parity="authors").reduce(seen, 48)
    assert bool((released.tokens.norm(dim=2) == 0).any())


def test_lone_tokens_are_scored_like_the_others():
    """7 tokens in 6 chunks: one of two tokens, five of one. All attention equal, so all chunks are equal."""
    attention = torch.full((1, 7), 0.01)
    x = torch.randn(1, 7, 5)
    ours = HoloV(beta=0).chunk_scores(x, attention, [2, 1, 1, 1, 1, 1])
    released = HoloV(beta=0, parity="authors").chunk_scores(x, attention, [2, 1, 1, 1, 1, 1])
    torch.testing.assert_close(ours, torch.full((1, 6), 10.0))
    torch.testing.assert_close(released[0, 1:] * 1000, ours[0, 1:])


@pytest.mark.parametrize(("name", "value"), [("chunks", 0), ("beta", -1.0), ("parity", "both")])
def test_wrong_hyper_parameters_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        HoloV(**{name: value})


@pytest.mark.parametrize(("pruned", "holds"), [(0.77, True), (0.76, False)])
def test_claim(pruned, holds):
    class Trial:
        def accuracy(self, method, keep=1.0, tasks=()):
            assert method is None or (method == HoloV() and keep == 1 / 9)
            return 0.8 if method is None else pruned

    outcome = holov.claim(Trial())
    assert (outcome.baseline, outcome.value, outcome.holds) == (0.8, pruned, holds)
