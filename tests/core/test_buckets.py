"""Groups by relative size and by detail."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from vistok.core.buckets import bin_by_ratio, bin_of, detail, error_by_detail
from vistok.core.fidelity import psnr


def test_bins_against_plain_grouping():
    rng = torch.Generator().manual_seed(0)
    ratios, values = torch.rand(200, generator=rng).double(), torch.rand(200, generator=rng)
    edges = (0.1, 0.3, 0.7, 1.0)
    found = bin_by_ratio(values, ratios, edges)
    for i, (low, high) in enumerate(pairwise(edges)):
        members = [float(v) for v, r in zip(values, ratios, strict=True) if low <= float(r) < high]
        assert found.counts[i] == len(members) and found.means[i] == pytest.approx(sum(members) / len(members))
    assert found.headline == pytest.approx(sum(found.means) / 3)
    inside = [float(v) for v, r in zip(values, ratios, strict=True) if 0.1 <= float(r) < 1]
    assert found.overall == pytest.approx(sum(inside) / len(inside)) and found.overall != found.headline


def test_edges_belong_above_and_empty_bins_say_so():
    for dtype in (torch.float64, torch.float32):
        ratios = torch.tensor([0.01, 0.02, 0.03, 0.5, 1.0, 2.0], dtype=dtype)
        assert bin_of(ratios, (0.02, 0.03, 1.0)).tolist() == [-1, 0, 1, 1, -1, -1]
    assert bin_of(torch.arange(4), (1, 3)).tolist() == [-1, 0, 0, -1]
    found = bin_by_ratio(torch.ones(1), torch.tensor([0.5]), (0, 0.1, 1))
    assert found.counts == (0, 1) and math.isnan(found.means[0]) and math.isnan(found.headline) and found.overall == 1
    assert math.isnan(bin_by_ratio(torch.ones(1), torch.tensor([5.0]), (0, 1)).overall)
    for edges in ((1,), (0, 0), (1, 0)):
        with pytest.raises(ValueError, match="edges: got"):
            bin_of(torch.ones(1), edges)


def test_detail():
    x = torch.zeros(1, 3, 32, 32)
    x[..., 16:, 16:] = torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    x[..., :16, :16] = torch.linspace(0, 1, 16)  # a ramp has no second difference but at its end
    found = detail(x)
    assert found.shape == (1, 2, 2) and found[0, 1, 1] > 3 * found[0, 0, 0] and found.min() >= 0
    made = x.clone()
    made[..., 16:, 16:] += 0.1
    bins = error_by_detail(made, x, 4)
    assert bins.counts == (1, 1, 1, 1) and bins.means == (100, 100, 100, pytest.approx(20, abs=1e-4))
    assert bins.overall == pytest.approx(float(psnr(made, x)), abs=1e-4)
