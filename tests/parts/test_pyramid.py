"""Pyramid backbones: timm's conventions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vistok.parts.pyramid import MapNorm, Pyramid, drop_rates


def small(**how):
    stages = [nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 6, 2, 2)]
    return Pyramid(stages, (4, 6), (2, 4), nn.BatchNorm2d(6), **how)


def test_logits_maps_and_what_is_told_of_them():
    x = torch.randn(2, 3, 8, 12)
    assert small(num_classes=5)(x).shape == (2, 5) and small(num_classes=0)(x).shape == (2, 6)
    net = small(features_only=True)
    maps = net(x)
    assert [m.shape[1] for m in maps] == net.feature_info.channels()
    assert [8 // m.shape[2] for m in maps] == net.feature_info.reduction()
    assert {name.split(".")[0] for name in net.state_dict()} == {"stages"}


def test_a_norm_of_maps_is_one_of_rows():
    x = torch.randn(2, 5, 3, 4)
    expected = nn.functional.layer_norm(x.permute(0, 2, 3, 1), (5,)).permute(0, 3, 1, 2)
    torch.testing.assert_close(MapNorm(5)(x), expected)


def test_rates_rise_evenly():
    flat = [rate for stage in drop_rates(0.3, (1, 3)) for rate in stage]
    assert flat == pytest.approx([0, 0.1, 0.2, 0.3]) and drop_rates(0.3, (1,)) == [[0.0]]


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="dims: got 1 and 2 reductions"):
        Pyramid([nn.Identity()] * 2, (4,), (2, 4), nn.Identity())
