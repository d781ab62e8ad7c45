"""FasterVLM against a plain loop, and what its sheet says must hold."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.reduce.synthetic import Trial, evidence, permuted
from vistok.host.reducer import Evidence
from vistok.reduce import fastervlm
from vistok.reduce.fastervlm import FasterVLM


def made(seed, grid=(5, 7), batch=2):
    return evidence(FasterVLM(), grid, batch, seed=seed)


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 4), st.integers(0, 3))
def test_equals_a_plain_ranking_also_where_scores_tie(seed, n, heads, levels):
    """``levels``: of how many attention values there are, so that most scores tie."""
    generator = torch.Generator().manual_seed(seed)
    attention = torch.randint(levels + 1, (2, heads, n), generator=generator).double() / 8
    given = Evidence(features=torch.zeros(2, n, 1), cls_attention=attention)
    for keep in range(1, n + 1):
        found = FasterVLM().reduce(given, keep).keep
        for row, kept in zip(attention.tolist(), found.tolist(), strict=True):
            score = [sum(head[i] for head in row) / heads for i in range(n)]
            assert kept == sorted(sorted(range(n), key=lambda i: (-score[i], i))[:keep])


def test_order_of_heads_does_not_matter():
    given = made(1)
    turned = replace(given, cls_attention=given.cls_attention[:, [2, 0, 3, 1]])
    assert torch.equal(FasterVLM().reduce(given, 9).keep, FasterVLM().reduce(turned, 9).keep)


def test_a_rising_map_of_the_score_does_not_matter():
    given = replace(made(2), cls_attention=made(2).cls_attention.mean(1, keepdim=True))
    for change in (torch.log, torch.exp, lambda x: 3 * x - 1, lambda x: x.double() ** 3):
        changed = replace(given, cls_attention=change(given.cls_attention))
        assert torch.equal(FasterVLM().reduce(given, 9).keep, FasterVLM().reduce(changed, 9).keep)


def test_a_larger_budget_keeps_a_superset():
    given = made(3)
    sets = [{*FasterVLM().reduce(given, keep).keep[1].tolist()} for keep in range(1, 36)]
    assert all(small < large for small, large in pairwise(sets))


def test_follows_the_tokens_where_they_are_shuffled():
    given, order = made(4), torch.randperm(35, generator=torch.Generator().manual_seed(4))
    plain, shuffled = FasterVLM().reduce(given, 9), FasterVLM().reduce(permuted(given, order), 9)
    assert torch.equal(order[shuffled.keep].sort(1).values, plain.keep)


def test_needs_no_gradient_and_carries_one_where_there_is():
    given = made(5)
    features = given.features.clone().requires_grad_()
    FasterVLM().reduce(replace(given, features=features), 9).tokens.sum().backward()
    assert int((features.grad != 0).any(2).sum()) == 2 * 9
    with torch.inference_mode():
        assert not FasterVLM().reduce(given, 9).tokens.requires_grad


def test_parts_of_one_size_get_equal_shares():
    """As released: every partition of a high-resolution picture keeps the same number."""
    given = evidence(FasterVLM(), crops=((4, 6),) * 5)
    kept = FasterVLM().reduce(given, 5 * 7).keep // 24
    assert all((kept == part).sum(1).tolist() == [7, 7, 7] for part in range(5))


def test_layer_is_what_it_asks_for():
    assert FasterVLM().needs == {"cls_attention": -2}
    assert FasterVLM(layer=3).needs == {"cls_attention": 3}


def test_claim_is_nine_tenths_of_dense_at_a_twentieth():
    assert fastervlm.claim(Trial(dense=0.8, FasterVLM=0.721)).holds
    outcome = fastervlm.claim(trial := Trial(dense=0.8, FasterVLM=0.719))
    assert not outcome.holds and (outcome.baseline, outcome.value) == (0.8, 0.719)
    assert [call[2] for call in trial.calls if call[1] is not None] == [0.05]
