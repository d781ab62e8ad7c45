"""Haar wavelets against convolutions, and back."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv2d

from vistok.core.wavelet import haar, inverse_haar


def test_it_is_what_separable_filters_give():
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low, high = (torch.tensor(t, dtype=torch.float64) * 2**-0.5 for t in ([1.0, 1.0], [1.0, -1.0]))
    parts = []
    for across, down in ((low, low), (low, high), (high, low), (high, high)):
        kernel = torch.outer(down, across).expand(3, 1, 2, 2)
        parts.append(conv2d(x, kernel, stride=2, groups=3) / 2)
    torch.testing.assert_close(haar(x), torch.cat(parts, 1))
    torch.testing.assert_close(haar(x, 2), haar(haar(x)))


@pytest.mark.parametrize("times", [0, 1, 2])
def test_back(times):
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    made = haar(x, times)
    assert made.shape == (2, 3 * 4**times, 8 >> times, 12 >> times)
    torch.testing.assert_close(inverse_haar(made, times), x)


def test_bad_sizes():
    with pytest.raises(ValueError, match="x: got 3 x 6, must be even"):
        haar(torch.zeros(1, 1, 6, 12), 2)
    with pytest.raises(ValueError, match="x: got 6 channels"):
        inverse_haar(torch.zeros(1, 6, 2, 2))
