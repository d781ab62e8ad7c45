"""Queries that read features: who sees whom, against a loop over queries and heads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vistok.parts.query_transformer import CrossAttention, QueryTransformer


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@torch.no_grad()
def test_cross_attention_is_the_sum_over_features():
    module = CrossAttention(8, 6, 2)
    x, features = torch.randn(2, 3, 8), torch.randn(2, 5, 6)
    mask = torch.tensor([[True] * 5, [True, False, True, False, False]])
    found = module(x, features, mask)
    q, kv = module.query(module.norm(x)), module.key_value(features)
    for b in range(2):
        for i in range(3):
            parts = []
            for h in range(2):
                span = slice(4 * h, 4 * h + 4)
                weights = [(q[b, i, span] @ kv[b, n, :8][span] / 2).exp() if mask[b, n] else 0.0 for n in range(5)]
                parts.append(sum(w * kv[b, n, 8:][span] for n, w in enumerate(weights)) / sum(weights))
            torch.testing.assert_close(found[b, i], x[b, i] + module.out(torch.cat(parts)))


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_a_query_reaches_later_queries_only_if_causal(causal):
    model = QueryTransformer(12, 3, 3, 5, 4, causal=causal, cross_every=2)
    features = torch.randn(2, 7, 5)
    before = model(features)
    model.queries[2] += torch.randn(12)
    changed = (model(features) - before).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == ([False, False, True, True] if causal else [True] * 4)
    assert before.shape == (2, 4, 12)


@torch.no_grad()
def test_every_query_may_see_every_feature_and_hidden_ones_are_as_if_cut():
    model = QueryTransformer(12, 2, 3, 5, 4, causal=True)
    features = torch.randn(2, 7, 5)
    before = model(features)
    other = features.clone()
    other[:, 6] += torch.randn(5)
    assert ((model(other) - before).abs().amax((0, 2)) > 1e-6).all()
    mask = torch.arange(7).expand(2, 7) < 6
    torch.testing.assert_close(model(features, mask=mask), model(features[:, :6]))
    torch.testing.assert_close(model(other, mask=mask), model(features, mask=mask))


@torch.no_grad()
def test_queries_from_outside():
    model = QueryTransformer(12, 2, 3, 5, 4)
    features = torch.randn(2, 7, 5)
    torch.testing.assert_close(model(features, model.queries.expand(2, -1, -1)), model(features))
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model(features, model.queries[order].expand(2, -1, -1)), model(features)[:, order])
    assert QueryTransformer(12, 2, 3, 5, 0)(features, torch.randn(2, 9, 12)).shape == (2, 9, 12)


def test_which_blocks_read_and_with_what():
    class Mean(nn.Module):
        def __init__(self, width, features, heads):
            super().__init__()
            self.map = nn.Linear(features, width)

        def forward(self, x, features, mask=None):
            return x + self.map(features).mean(1, keepdim=True)

    model = QueryTransformer(12, 5, 3, 5, 4, cross_every=2, cross=Mean)
    assert [type(block.cross) for block in model.blocks] == [Mean, type(None), Mean, type(None), Mean]
    model(torch.randn(2, 7, 5)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_refusals():
    model = QueryTransformer(12, 1, 3, 5, 0)
    for call, message in (
        (lambda: model(torch.randn(2, 7, 5)), "queries: got None"),
        (lambda: model(torch.randn(2, 7, 4)), r"features: got shape \(2, 7, 4\), must be \(B, N, 5\)"),
        (lambda: model(torch.randn(2, 7, 5), torch.randn(1, 3, 12)), r"queries: got shape .* must be \(2, Q, 12\)"),
        (lambda: QueryTransformer(12, 1, 5, 5, 0), "heads: got 5, must divide width, 12"),
        (lambda: QueryTransformer(12, 1, 3, 5, 0, cross_every=0), "must be 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
