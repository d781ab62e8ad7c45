"""HiPrune against plain loops, and what its sheet says must hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.reduce.synthetic import Trial, encoder_layer, evidence
from vistok.host.reducer import Evidence
from vistok.reduce import hiprune
from vistok.reduce.hiprune import HiPrune


def picture(middle, deep, grid):
    scores = tuple(torch.tensor([x]).double() for x in (middle, deep))
    return Evidence(features=torch.zeros(1, len(middle), 1), grid=grid, received_attention=scores)


def plain(middle, deep, grid, keep, alpha, wrap):
    """The choice for one picture, as the paper (or, with ``wrap``, the released code) reads."""
    h, w = grid
    n = h * w
    anchors = sorted(range(n), key=lambda i: (-middle[i], i))[: round(keep * alpha / 5)]
    buffers = set()
    for i in anchors:
        if wrap:
            buffers |= {min(max(j, 0), n - 1) for j in (i - 1, i + 1, i - w, i + w)}
        else:
            places = [(i // w, i % w - 1), (i // w, i % w + 1), (i // w - 1, i % w), (i // w + 1, i % w)]
            buffers |= {r * w + c for r, c in places if 0 <= r < h and 0 <= c < w}
    chosen = [*anchors, *sorted(buffers - set(anchors))][:keep]
    rest = sorted(set(range(n)) - set(chosen), key=lambda i: (-deep[i], i))
    return sorted(chosen + rest[: keep - len(chosen)]), anchors, buffers


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0]), st.booleans(), st.data())
def test_equals_plain_loops_also_where_scores_tie(h, w, alpha, wrap, data):
    n = h * w
    middle, deep = (data.draw(st.lists(st.integers(0, 6), min_size=n, max_size=n)) for _ in range(2))
    keep = data.draw(st.integers(1, n))
    method = HiPrune(alpha=alpha, parity="authors" if wrap else "paper")
    kept = method.reduce(picture(middle, deep, (h, w)), keep).keep[0].tolist()
    expected, anchors, buffers = plain(middle, deep, (h, w), keep, alpha, wrap)
    assert kept == expected
    assert set(anchors) <= set(kept)
    assert keep < len({*anchors, *buffers}) or buffers <= set(kept)


def test_without_alpha_it_is_the_best_of_the_deep_layer():
    given = evidence(HiPrune())
    best = given.received_attention[1].topk(16).indices.sort(1).values
    assert torch.equal(HiPrune(alpha=0).reduce(given, 16).keep, best)


def test_neighbours_end_at_the_border():
    """An anchor at the end of a row: its right neighbour does not exist, or is the next row's first token."""
    middle, deep = [0.0] * 12, [0.0] * 8 + [0.1] * 4
    middle[7] = 1.0  # of 3 x 4: end of the second row
    given = picture(middle, deep, (3, 4))
    assert HiPrune(alpha=1).reduce(given, 5).keep[0].tolist() == [3, 6, 7, 8, 11]  # 8 is the best of the deep layer
    deep[8:] = [0.0, 0.1, 0.1, 0.1]
    given = picture(middle, deep, (3, 4))
    assert HiPrune(alpha=1).reduce(given, 5).keep[0].tolist() == [3, 6, 7, 9, 11]
    assert HiPrune(alpha=1, parity="authors").reduce(given, 5).keep[0].tolist() == [3, 6, 7, 8, 11]


def test_anchors_come_first_where_the_budget_is_too_small_for_their_neighbours():
    middle = [0.0] * 25
    middle[12] = 1.0
    given = picture(middle, [1.0] * 25, (5, 5))
    assert HiPrune(alpha=1).reduce(given, 3).keep[0].tolist() == [7, 11, 12]


@pytest.mark.parametrize("shift", [0.5, 0.999, 100.0, -100.0])
def test_a_constant_on_the_deep_scores_changes_nothing(shift):
    """The released code marks chosen tokens by subtracting 1, which only works in [0, 1]."""
    given = evidence(HiPrune(alpha=0.5))
    middle, deep = (x.double() for x in given.received_attention)
    plain = HiPrune(alpha=0.5).reduce(replace(given, received_attention=(middle, deep)), 24)
    shifted = HiPrune(alpha=0.5).reduce(replace(given, received_attention=(middle, deep + shift)), 24)
    assert torch.equal(plain.keep, shifted.keep)


def test_received_attention_sums_to_one_with_the_class_token():
    layer = encoder_layer(torch.randn(2, 2, 3, 10, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    received = layer["received_attention"].sum(1)
    assert bool((received < 1).all())
    without_class_token = layer["encoder_attention"] / layer["encoder_attention"].sum(3, keepdim=True)
    torch.testing.assert_close(without_class_token.mean((1, 2)).sum(1), torch.ones(2, dtype=torch.float64))


def test_layers_are_what_it_asks_for():
    assert HiPrune().needs == {"received_attention": (9 / 24, -2)}
    assert HiPrune(object_layer=15, layer=-1).needs == {"received_attention": (15, -1)}


def test_needs_a_grid():
    with pytest.raises(ValueError, match="evidence: HiPrune needs the tokens of a whole grid"):
        HiPrune().reduce(replace(evidence(HiPrune()), grid=None), 5)


@pytest.mark.parametrize("hyper", [{"alpha": -0.1}, {"alpha": 1.5}, {"parity": "theirs"}])
def test_bad_hyper_parameters_are_named(hyper):
    (name,) = hyper
    with pytest.raises(ValueError, match=f"^{name}: got "):
        HiPrune(**hyper)


def test_claim_is_993_permille_of_dense_at_a_third():
    assert hiprune.claim(Trial(dense=0.8, HiPrune=0.7945)).holds
    assert not hiprune.claim(trial := Trial(dense=0.8, HiPrune=0.7943)).holds
    assert [call[2] for call in trial.calls if call[1] is not None] == [1 / 3]
