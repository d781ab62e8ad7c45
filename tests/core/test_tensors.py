"""The helpers that the other modules share."""

from __future__ import annotations

import pytest
import torch

from vistok.core.tensors import PANEL, check_k, gram, length, ranking, take, unit, upcast


@pytest.mark.parametrize("n", [1, 7, PANEL, PANEL + 1, 3 * PANEL + 5])
def test_gram(n):
    x = torch.randn(2, n, 11)
    out = gram(x)
    torch.testing.assert_close(out, x @ x.transpose(1, 2), atol=1e-5, rtol=1e-5)
    assert torch.equal(out, out.transpose(1, 2))
    with_gradient = gram(x.requires_grad_())
    torch.testing.assert_close(with_gradient.detach(), out)
    assert torch.equal(with_gradient, with_gradient.transpose(1, 2))


def test_ranking_puts_padding_last():
    scores = torch.tensor([[2.0, -torch.inf, 2, 9, 1]])
    mask = torch.tensor([[True, True, True, False, True]])
    assert ranking(scores).tolist() == [[3, 0, 2, 4, 1]]
    assert ranking(scores, mask).tolist() == [[0, 2, 4, 1, 3]]


def test_rows_and_precision():
    x = torch.randn(2, 5, 3)
    index = torch.tensor([[4, 0], [1, 1]])
    assert torch.equal(take(x, index)[0], x[0, [4, 0]]) and torch.equal(take(x[..., 0], index)[1], x[1, [1, 1], 0])
    assert upcast(x.half()).dtype == torch.float32 and upcast(x.double()).dtype == torch.float64
    assert torch.allclose(length(unit(x)), torch.ones(2, 5)) and (unit(torch.zeros(1, 1, 2)) == 0).all()
    check_k(0, 0)
    with pytest.raises(ValueError, match="keep: got 3"):
        check_k(3, 2, name="keep")
