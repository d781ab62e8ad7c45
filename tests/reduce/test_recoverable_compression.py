"""Recoverable Compression against a plain loop over one picture, and what its sheet says must hold."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vistok.core.outlier import outlier_ratio
from vistok.core.score import text_similarity
from vistok.host.reducer import Evidence
from vistok.reduce import recoverable_compression
from vistok.reduce.recoverable_compression import RecoverableCompression


@dataclass(frozen=True)
class Recoverable(RecoverableCompression):
    """With the text score in ``text_ids`` (any evidence field of the right shape would do)."""

    def text_score(self, evidence):
        return evidence.text_ids


def evidence(seed=0, b=1, n=60, width=40, scale=2.0):
    """Scores with outliers: exponentials of normal numbers."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return Evidence(
        features=normal(b, n, 7),
        encoder_features=normal(b, n, width),
        encoder_keys=normal(b, n, 9),
        wide_cls_attention=(scale * normal(b, n)).exp() / n,
        text=normal(b, 4, 7),
        text_mask=torch.ones(b, 4, dtype=torch.bool),
        text_ids=(scale * normal(b, n)).exp() / 100,
    )


def best(values, count, among):
    return sorted(among, key=lambda j: (-float(values[j]), j))[:count]


def plain(seen, i, keep=None, neighbours=32, beta=50.0, parity="paper", base="width"):
    """Picture ``i`` step by step: kept positions, centres, and the values by position."""
    x, keys = seen.encoder_features[i], seen.encoder_keys[i]
    a, t = seen.wide_cls_attention[i], seen.text_ids[i]
    n = len(a)

    def ratio(values, k):
        return float(outlier_ratio(torch.as_tensor(values, dtype=torch.float64)[None], k))

    by_vision = int(n * ratio(a, 20))
    floored = t.clone()
    floored[best(a, by_vision, range(n))] = t.min()
    by_text = int((n - by_vision) * ratio(floored, 20))

    def select(by_vision, by_text):
        seen_ = best(a, by_vision, range(n))
        recovered = best(t, by_text, [j for j in range(n) if j not in seen_])
        return seen_, recovered, [j for j in range(n) if j not in seen_ and j not in recovered]

    seen_, recovered, rest = select(by_vision, by_text)
    size = {"width": x.shape[1], "selected": n - len(rest), "rest": len(rest)}[base]
    centres = min(int(size * ratio(a[rest], 10)), len(rest) - 1)
    merged = centres + 1 if centres else 0
    if by_vision + by_text + merged == 0:
        by_vision = 1
    if keep is not None:
        shares = [keep * c / (by_vision + by_text + merged) for c in (by_vision, by_text, merged)]
        counts = [int(s) for s in shares]
        for c in sorted(range(3), key=lambda c: counts[c] - shares[c])[: keep - sum(counts)]:
            counts[c] += 1
        by_vision, by_text, merged = counts
        if merged == 1:
            by_vision, merged = by_vision + 1, 0
    seen_, recovered, rest = select(by_vision, by_text)
    centre = best(a, merged - 1, rest) if merged else []
    values = {j: x[j] for j in seen_ + recovered}
    looked_up = {j: keys[rank if parity == "authors" else j] for rank, j in enumerate(rest)}
    for c in centre:
        near = {j: float(torch.cosine_similarity(looked_up[c], looked_up[j], 0) + beta * t[j]) for j in rest if j != c}
        taken = sorted(near, key=lambda j: (-near[j], j))[:neighbours]
        values[c] = x[c] + sum(a[j] * x[j] for j in taken)
    others = [j for j in rest if j not in centre]
    if centre:
        values[best(a, 1, others)[0]] = sum(a[j] * x[j] for j in others)
    return sorted(seen_ + recovered), sorted(centre), values


@settings(max_examples=25)
@given(
    st.integers(0, 999),
    st.one_of(st.none(), st.integers(1, 59)),
    st.sampled_from(["paper", "authors"]),
    st.sampled_from(["width", "selected", "rest"]),
)
def test_against_a_loop(seed, keep, parity, base):
    seen = evidence(seed)
    counts = "data" if keep is None else "keep"
    system = Recoverable(counts=counts, parity=parity, centre_base=base, merged_neighbours=5)
    reduction = system.reduce(seen, keep or 10)
    kept, centres, values = plain(seen, 0, keep, 5, parity=parity, base=base)
    by_vision, by_text, centre = system.roles(seen, keep)
    assert (by_vision | by_text)[0].nonzero()[:, 0].tolist() == kept
    assert centre[0].nonzero()[:, 0].tolist() == centres
    assert not (by_vision & by_text).any()
    assert reduction.keep[0].tolist() == sorted(values)
    assert keep is None or len(values) == keep
    torch.testing.assert_close(reduction.tokens[0], torch.stack([values[j] for j in sorted(values)]))


def test_there_are_merges_and_recoveries_to_test():
    """The loop above would prove little on data without outliers."""
    found = [plain(evidence(seed), 0) for seed in range(20)]
    assert sum(bool(centres) for _, centres, _ in found) >= 10
    assert all(kept for kept, _, _ in found)


def test_batch_with_counts_of_its_own_each():
    seen = evidence(b=4)
    whole = Recoverable().reduce(seen, 15)
    centres = [int(c) for c in Recoverable().roles(seen, 15)[2].sum(1)]
    assert len(set(centres)) > 1
    for i in range(4):
        values = plain(seen, i, 15)[2]
        assert whole.keep[i].tolist() == sorted(values)
        torch.testing.assert_close(whole.tokens[i], torch.stack([values[j] for j in sorted(values)]))


def test_where_the_tokens_went():
    seen = evidence(3)
    system = Recoverable(merged_neighbours=3)
    reduction = system.reduce(seen, 15)
    kept, centres, _ = plain(seen, 0, 15, 3)
    places = reduction.keep[0].tolist()
    assert centres
    (extra,) = set(places) - set(kept) - set(centres)
    for j, slot in enumerate(reduction.source[0].tolist()):
        assert slot >= 0  # with a centre there is an extra token, which takes in what no centre did
        if j in places:
            assert places[slot] == j
        else:
            assert places[slot] in [*centres, extra]
    # Those that no centre took in are in the extra token.
    near = {c: torch.cosine_similarity(seen.encoder_keys[0, c], seen.encoder_keys[0], 1) for c in centres}
    taken = set()
    for c in centres:
        free = [j for j in range(60) if j not in kept and j != c]
        taken |= set(sorted(free, key=lambda j, c=c: -float(near[c][j] + 50 * seen.text_ids[0, j]))[:3])
    for j in set(range(60)) - set(places):
        assert (places[reduction.source[0, j]] in centres) == (j in taken)


def test_the_released_lookup_differs():
    seen = evidence(3)
    right, wrong = (Recoverable(parity=p, merged_neighbours=3).reduce(seen, 15) for p in ("paper", "authors"))
    assert torch.equal(right.keep, wrong.keep)
    assert not torch.equal(right.tokens, wrong.tokens)


def test_centres_that_take_in_all_others():
    """beta = 0 and room for all: each centre gains the attention-weighted sum of all other left-over tokens."""
    seen = evidence(3)
    system = Recoverable(beta=0.0, merged_neighbours=60)
    reduction = system.reduce(seen, 15)
    kept, centres, _ = plain(seen, 0, 15)
    x, a = seen.encoder_features[0], seen.wide_cls_attention[0]
    assert len(centres) == 2
    rest = [j for j in range(60) if j not in kept]
    for c in centres:
        wanted = x[c] + sum(a[j] * x[j] for j in rest if j != c)
        torch.testing.assert_close(reduction.tokens[0, reduction.keep[0].tolist().index(c)], wanted)


@pytest.mark.parametrize("seed", range(8))
def test_merged_tokens_are_centres_and_one_or_none(seed):
    reduction, roles = Recoverable().reduce(evidence(seed), 15), Recoverable().roles(evidence(seed), 15)
    kept, centres = int((roles[0] | roles[1]).sum()), int(roles[2].sum())
    assert reduction.keep.shape[1] - kept == (centres + 1 if centres else 0)


def test_constant_scores_leave_it_to_vision():
    seen = evidence()
    flat = Evidence(**{**vars(seen), "wide_cls_attention": torch.full((1, 60), 0.1), "text_ids": torch.zeros(1, 60)})
    assert Recoverable().reduce(flat, 5).keep.tolist() == [[0, 1, 2, 3, 4]]
    assert Recoverable(counts="data").reduce(flat, 5).keep.tolist() == [[0]]


def test_data_counts_ignore_keep_and_come_one_at_a_time():
    seen, system = evidence(b=4), Recoverable(counts="data")
    assert system.one_at_a_time and not Recoverable().one_at_a_time
    with pytest.raises(ValueError, match="one picture at a time"):
        system.reduce(seen, 10)
    one = evidence()
    assert torch.equal(system.reduce(one, 5).keep, system.reduce(one, 30).keep)


def test_data_counts_of_a_picture_in_parts():
    """Each part keeps what its own data say; slots are numbered through."""
    seen = evidence(2, n=100)
    cut = Evidence(**{**vars(seen), "crops": ((5, 8), (6, 10))})
    system = RecoverableCompression(counts="data")
    whole, parts = system.reduce(cut, 50), [system.reduce(cut.crop(i), 20) for i in range(2)]
    first = parts[0].keep.shape[1]
    assert first != 20
    assert torch.equal(whole.keep, torch.cat([parts[0].keep, parts[1].keep + 40], 1))
    assert torch.equal(whole.source[:, whole.keep[0]], torch.arange(whole.keep.shape[1])[None])
    assert bool((whole.source[:, 40:] >= first).logical_or(whole.source[:, 40:] < 0).all())


def test_question_that_names_a_patch_recovers_it():
    """Text equal to one patch's projected feature; that patch has little attention of its own."""
    seen = evidence()
    patch = int(seen.wide_cls_attention[0].argmin())
    told = Evidence(**{**vars(seen), "text": seen.features[:, patch : patch + 1], "text_mask": None})
    by_vision, by_text, _ = RecoverableCompression().roles(told, 20)
    score = RecoverableCompression().text_score(told)
    torch.testing.assert_close(score, text_similarity(seen.features, told.text) * 7**-0.5)
    assert int(score.argmax()) == patch
    assert by_text.any() and by_text[0, patch] and not by_vision[0, patch]


def test_without_text_nothing_is_recovered():
    seen = evidence()
    alone = RecoverableCompression(text=False)
    assert "text" in RecoverableCompression().needs and "text" not in alone.needs
    by_vision, by_text, _ = alone.roles(seen, 15)
    assert by_vision.any() and not by_text.any()
    assert alone.reduce(seen, 15).keep.shape == (1, 15)


def test_half_precision_comes_back_as_it_went_in():
    seen = evidence()
    names = ("features", "encoder_features", "encoder_keys", "wide_cls_attention", "text")
    half = Evidence(**{name: getattr(seen, name).to(torch.bfloat16) for name in names})
    assert RecoverableCompression().reduce(half, 15).tokens.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("counts", "fixed"), ("centre_base", "all"), ("parity", "both"), ("neighbours", 0), ("merged_neighbours", 0)],
)
def test_wrong_hyper_parameters_are_named(name, wrong):
    with pytest.raises(ValueError, match=name):
        RecoverableCompression(**{name: wrong})


@pytest.mark.parametrize(("recovered", "holds"), [(0.61, True), (0.6, False)])
def test_claim(recovered, holds):
    class Trial:
        def accuracy(self, method, keep=1.0, tasks=()):
            assert keep == 0.1
            return recovered if method.text else 0.6

    outcome = recoverable_compression.claim(Trial())
    assert (outcome.baseline, outcome.value, outcome.holds) == (0.6, recovered, holds)
