"""Attention projections: who sees whom, and what a bias of the keys would do."""

from __future__ import annotations

import pytest
import torch

from vistok.parts.projection import AttentionProjection

torch.manual_seed(0)


@pytest.mark.parametrize(("dim", "out", "heads"), [(24, 6, 4), (24, 8, 2), (6, 24, 4)])
@pytest.mark.parametrize("causal", [True, False])
def test_a_token_sees_those_before_it_or_all(dim, out, heads, causal):
    module, x = AttentionProjection(dim, out, heads, causal=causal), torch.randn(2, 5, dim)
    before = module(x)
    assert before.shape == (2, 5, out)
    changed = x.clone()
    changed[:, 2] += torch.randn(2, dim)
    moved = (module(changed) - before).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [not causal, not causal, True, True, True]


def test_a_bias_of_the_keys_changes_nothing():
    module, x = AttentionProjection(24, 6, 4), torch.randn(2, 5, 24)
    before = module(x)
    with torch.no_grad():
        module.qkv.bias[24:48] += 3
    torch.testing.assert_close(module(x), before, atol=1e-5, rtol=1e-5)


def test_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="heads: got 5, must divide 24"):
        AttentionProjection(24, 6, 5)
