"""FoPru against plain loops, and what its sheet says must hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.reduce.synthetic import Trial, evidence, permuted
from vistok.host.reducer import Evidence
from vistok.reduce import fopru
from vistok.reduce.fopru import FoPru


def given_scores(received, given=None, grid=None):
    """One picture with these scores."""
    received = torch.tensor([received]).double()
    given = torch.full_like(received, 1 / received.shape[1]) if given is None else torch.tensor([given]).double()
    return Evidence(
        features=torch.zeros(1, received.shape[1], 1), grid=grid, received_attention=received, given_attention=given
    )


@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_equals_plain_loops_also_where_scores_tie(h, w, data):
    n = h * w
    received = data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
    other = data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
    keep = data.draw(st.integers(1, n))

    def spread(x):
        return sum((v - sum(x) / n) ** 2 for v in x)

    score = other if spread(other) > spread(received) + 1e-9 else received
    picture = given_scores(received, other, (h, w))
    assert keep == n or FoPru().reduce(picture, keep).keep[0].tolist() == sorted(
        sorted(range(n), key=lambda i: (-score[i], i))[:keep]
    )
    best = sorted(range(h), key=lambda r: (-sum(score[r * w : r * w + w]), r))
    kept = [r * w + c for r in best[: keep // w] for c in range(w)]
    if keep % w:
        row = best[keep // w]
        kept += sorted(range(row * w, row * w + w), key=lambda i: (-score[i], i))[: keep % w]
    assert FoPru(strategy="row").reduce(picture, keep).keep[0].tolist() == sorted(kept)


def test_row_keeps_whole_rows():
    picture = evidence(FoPru(), (6, 10))
    kept = FoPru(strategy="row").reduce(picture, 30).keep.view(3, 3, 10)
    assert bool((kept % 10 == torch.arange(10)).all()) and bool((kept // 10 == kept[..., :1] // 10).all())


def test_rank_and_row_agree_where_a_row_is_alike():
    rows = torch.tensor([0.1, 0.5, 0.2, 0.4])
    picture = given_scores(rows.repeat_interleave(5).tolist(), grid=(4, 5))
    for keep in (5, 10, 15):
        assert torch.equal(FoPru().reduce(picture, keep).keep, FoPru(strategy="row").reduce(picture, keep).keep)


def test_uniform_attention_keeps_the_first_tokens():
    picture = given_scores([1 / 12] * 12, grid=(3, 4))
    assert FoPru().reduce(picture, 5).keep[0].tolist() == [0, 1, 2, 3, 4]
    assert FoPru(strategy="row").reduce(picture, 8).keep[0].tolist() == [*range(8)]


def test_rows_do_not_depend_on_the_order_of_columns():
    picture = evidence(FoPru(), (6, 10))
    columns = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    turned = permuted(picture, (torch.arange(6)[:, None] * 10 + columns).flatten())
    method = FoPru(strategy="row")
    assert torch.equal(method.reduce(picture, 20).keep, method.reduce(turned, 20).keep)


def test_each_picture_takes_the_score_that_varies_more():
    flat, steep = [0.25, 0.24, 0.26, 0.25], [0.0, 0.1, 0.2, 0.7]
    both = [given_scores(flat, steep), given_scores(steep[::-1], flat)]
    batch = replace(
        both[0],
        features=torch.zeros(2, 4, 1),
        received_attention=torch.cat([x.received_attention for x in both]),
        given_attention=torch.cat([x.given_attention for x in both]),
    )
    assert FoPru().reduce(batch, 1).keep.tolist() == [[3], [0]]


def test_a_tiny_share_leaves_one_token_within_the_budget():
    """The paper's floor(ratio * rows) would be 0, and one whole row more than the budget."""
    picture = evidence(FoPru(), (6, 10))
    assert FoPru(strategy="row").reduce(picture, 1).keep.shape == (3, 1)


def test_rows_of_a_picture_in_parts_are_those_of_each_part():
    picture = evidence(FoPru(), crops=((4, 6), (4, 6)))
    kept = FoPru(strategy="row").reduce(picture, 24).keep
    assert bool((kept.view(3, 4, 6) % 6 == torch.arange(6)).all())


def test_rows_need_a_grid():
    picture = replace(evidence(FoPru()), grid=None)
    assert FoPru().reduce(picture, 5).keep.shape == (3, 5)
    with pytest.raises(ValueError, match="strategy: 'row' needs the tokens of a whole grid"):
        FoPru(strategy="row").reduce(picture, 5)


def test_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match="strategy: got 'column', must be 'rank' or 'row'"):
        FoPru(strategy="column")


def test_claim_is_one_point_at_a_quarter():
    assert fopru.claim(Trial(dense=0.8, FoPru=0.791)).holds
    assert not fopru.claim(trial := Trial(dense=0.8, FoPru=0.789)).holds
    assert [call[2] for call in trial.calls if call[1] is not None] == [0.25]
