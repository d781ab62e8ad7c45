"""ApET against a plain loop over one picture, and what its sheet says must hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vistok.core.score import reconstruction_error
from vistok.core.tensors import take
from vistok.host.reducer import Evidence
from vistok.reduce import apet
from vistok.reduce.apet import ApET


def tokens(seed=0, b=2, n=30, d=12):
    return torch.randn(b, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reduce(system, x, keep):
    return system.reduce(Evidence(features=x, encoder_features=x), keep)


def plain(x, keep, k, deal, ridge=1e-5):
    """One picture ``x`` (N, D), step by step; the tokens by position."""
    basis = [max(range(len(x)), key=lambda j: float(x[j].norm()))]
    while len(basis) < k:
        apart = [min(float((x[j] - x[c]).square().sum()) for c in basis) for j in range(len(x))]
        basis.append(max((j for j in range(len(x)) if j not in basis), key=lambda j: apart[j]))
    basis = basis[:k]
    s = x[basis]
    rebuilt = x @ s.T @ torch.linalg.inv(s @ s.T + ridge * torch.eye(k, dtype=x.dtype)) @ s
    errors = (x - rebuilt).norm(dim=1)
    order = sorted(range(len(x)), key=lambda j: -float(errors[j]))[:keep]
    picked, last = order[: keep - k], order[keep - k :]
    groups = {j: [j] for j in picked}
    for j in set(range(len(x))) - set(order):
        nearest = max(picked, key=lambda p: float(torch.cosine_similarity(x[j], x[p], 0)))
        groups[nearest].append(j)
    out = {j: x[members].mean(0) for j, members in groups.items()}
    if deal == "position":
        last = sorted(last)
    out |= {slot: x[vector] for slot, vector in zip(last, basis, strict=True)}
    return sorted(out), torch.stack([out[j] for j in sorted(out)]), groups, dict(zip(basis, last, strict=True))


@settings(max_examples=20)
@given(st.integers(0, 9999), st.integers(2, 29), st.integers(1, 8), st.sampled_from(["position", "error"]))
def test_against_a_loop(seed, keep, basis, deal):
    x, system = tokens(seed), ApET(basis=basis)
    reduction = system.approximate(x, keep, deal)
    k = basis if keep > basis else keep // 2
    for i in range(2):
        places, values, groups, dealt = plain(x[i], keep, k, deal)
        assert reduction.keep[i].tolist() == places
        torch.testing.assert_close(reduction.tokens[i], values)
        overwritten = set(dealt.values())
        for anchor, members in groups.items():
            assert all(places[reduction.source[i, m]] == anchor for m in set(members) - overwritten)
        assert all(places[reduction.source[i, slot]] == slot for slot in overwritten)
        assert (reduction.source[i] >= 0).all()


def test_both_sites_use_their_own_order():
    x, system = tokens(), ApET(basis=4)
    outside = system.compress(Evidence(features=x[..., :3], encoder_features=x), 12)
    inside = system.at_layer(Evidence(features=x), 12, 16)
    assert torch.equal(outside.keep, inside.keep)
    for i in range(2):
        for reduction, deal in ((outside, "position"), (inside, "error")):
            torch.testing.assert_close(reduction.tokens[i], plain(x[i], 12, 4, deal)[1])
    assert not torch.equal(outside.tokens, inside.tokens)


def test_basis_and_its_span_have_no_error():
    x = tokens(d=20)
    vectors, index = ApET(basis=6).basis_of(x, 20)
    x[:, 0] = vectors.mean(1) * 2 - vectors[:, 0]
    errors = reconstruction_error(x, vectors, 1e-5)
    assert float(errors.gather(1, index).max()) < 1e-4
    assert float(errors[:, 0].max()) < 1e-4
    assert float(errors.max()) > 1


def test_errors_are_distances_to_the_span():
    x = tokens()
    vectors, _ = ApET(basis=5).basis_of(x, 20)
    q = torch.linalg.qr(vectors.transpose(1, 2)).Q
    torch.testing.assert_close(reconstruction_error(x, vectors, 1e-12), (x - x @ q @ q.transpose(1, 2)).norm(dim=2))


def test_ranking_does_not_change_with_rotation_or_scale():
    x = tokens()
    keep = reduce(ApET(basis=4, ridge=1e-12), x, 11).keep
    rotation = torch.linalg.qr(tokens(7, 1, 12, 12)[0]).Q
    for other in (x @ rotation, x * 5):
        assert torch.equal(reduce(ApET(basis=4, ridge=1e-12), other, 11).keep, keep)


def test_mass_is_conserved_by_the_merge():
    """Times the size of its group, error-picked slots add up to error-picked and discarded tokens."""
    x, k, keep = tokens(), 4, 11
    reduction = ApET(basis=k).compress(Evidence(features=x, encoder_features=x), keep)
    for i in range(2):
        places, _, groups, dealt = plain(x[i], keep, k, "position")
        total = sum(len(groups[p]) * reduction.tokens[i, s] for s, p in enumerate(places) if p in groups)
        stood_in = list(dealt.values())
        everyone = [j for j in range(30) if j not in stood_in]
        torch.testing.assert_close(total, x[i, everyone].sum(0))


def test_batch_and_repetition_do_not_matter():
    x = tokens(b=3)
    for sampler in ("fps", "dpc", "random"):
        system = ApET(basis=4, sampler=sampler, seed=5)
        whole = reduce(system, x, 9)
        assert torch.equal(reduce(system, x, 9).tokens, whole.tokens)
        for i in range(3):
            torch.testing.assert_close(reduce(system, x[i : i + 1], 9).tokens[0], whole.tokens[i])


def test_samplers():
    x = tokens()
    vectors, index = ApET(basis=4, sampler="random", seed=1).basis_of(x, 20)
    assert torch.equal(vectors, take(x, index)) and torch.equal(index[0], index[1])
    assert not torch.equal(ApET(basis=4, sampler="random", seed=2).basis_of(x, 20)[1], index)
    # Two tight clusters: their means.
    cluster = torch.tensor([[10.0, 0], [0, 10]]).repeat_interleave(6, 0)[None] + tokens(b=1, n=12, d=2) * 0.1
    vectors, index = ApET(basis=2, sampler="dpc").basis_of(cluster.double(), 6)
    assert index is None
    means = torch.stack([cluster[0, :6].mean(0), cluster[0, 6:].mean(0)])
    torch.testing.assert_close(vectors[0].sort(0, descending=True).values, means.sort(0, descending=True).values)


def test_small_keeps_shrink_the_basis():
    x = tokens()
    for keep, k in ((1, 0), (2, 1), (5, 2), (10, 5), (11, 10), (25, 10)):
        vectors, _ = ApET().basis_of(x, keep)
        assert vectors.shape[1] == k
        assert reduce(ApET(), x, keep).tokens.shape == (2, keep, 12)


def test_one_token_takes_in_all_others():
    x = tokens()
    reduction = reduce(ApET(), x, 1)
    assert torch.equal(reduction.keep[:, 0], x.norm(dim=2).argmax(1))  # nothing rebuilds it: its error is its length
    torch.testing.assert_close(reduction.tokens[:, 0], x.mean(1))


def test_all_tokens_are_the_identity_only_here():
    x = tokens()
    evidence = Evidence(features=x, encoder_features=x)
    for reduction in (reduce(ApET(), x, 30), ApET().at_layer(evidence, 30, 16)):
        assert torch.equal(reduction.tokens, x)
    assert ApET().at_layer(evidence, 0, 16).tokens.shape == (2, 0, 12)
    released = ApET(parity="authors")
    for reduction, deal in ((reduce(released, x, 30), "position"), (released.at_layer(evidence, 30, 16), "error")):
        assert torch.equal(reduction.keep, torch.arange(30).expand(2, 30))
        torch.testing.assert_close(reduction.tokens[0], plain(x[0], 30, 10, deal)[1])
        assert not torch.equal(reduction.tokens, x)
    square = tokens(n=576, d=3)
    assert torch.equal(reduce(released, square, 576).tokens, square)  # the one count that is short-cut there


def test_input_is_not_written_to():
    x = tokens()
    copy = x.clone()
    reduce(ApET(), x, 12)
    assert torch.equal(x, copy)


def test_half_precision_comes_back_as_it_went_in():
    x = tokens().to(torch.bfloat16)
    assert reduce(ApET(), x, 12).tokens.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("keep", "layers", "first", "later"),
    [(64, 32, 96, {16: 32}), (22, 6, 33, {3: 11}), (1, 6, 1, {3: 1}), (500, 32, 576, {16: 424}), (7, 1, 7, {})],
)
def test_schedule(keep, layers, first, later):
    schedule = ApET().schedule(576, keep, layers)
    assert (schedule.input, dict(schedule.layers)) == (first, later)
    assert schedule.mean(layers) == keep


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("basis", 0), ("sampler", "kmeans"), ("ridge", 0.0), ("fall", 0.0), ("depth", 1.0), ("parity", "both")],
)
def test_wrong_hyper_parameters_are_named(name, wrong):
    with pytest.raises(ValueError, match=name):
        ApET(**{name: wrong})


@pytest.mark.parametrize(("pruned", "holds"), [(0.77, True), (0.76, False)])
def test_claim(pruned, holds):
    class Trial:
        def accuracy(self, method, keep=1.0, tasks=()):
            assert method is None or (method == ApET() and keep == 1 / 9)
            return 0.8 if method is None else pruned

    outcome = apet.claim(Trial())
    assert (outcome.baseline, outcome.value, outcome.holds) == (0.8, pruned, holds)
