"""Losses of tokenizers by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from vistok.core import losses


def pictures(seed=0):
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def network(x):
    """Two layers: the picture itself, and it at half the size with its channels mixed."""
    return [x, nn.functional.avg_pool2d(x, 2) @ torch.eye(4).flip(0)]


def test_pixel():
    a, b = pictures(), pictures(1)
    assert float(losses.pixel(a, b, "l1")) == pytest.approx(float((a - b).abs().mean()))
    assert float(losses.pixel(a, b)) == pytest.approx(float(((a - b) ** 2).mean()))
    valid = torch.rand(2, 1, 8, 8) < 0.5
    before = losses.pixel(a, b, valid=valid)
    changed = torch.where(valid, a, 99.0)
    assert torch.equal(losses.pixel(changed, b, valid=valid), before)
    torch.testing.assert_close(before, (a - b).square()[valid.expand(-1, 3, -1, -1)].mean())
    assert float(losses.pixel(a, b, valid=torch.zeros_like(valid))) == 0
    with pytest.raises(ValueError, match="kind: got 'l3'"):
        losses.pixel(a, b, "l3")


def test_perceptual():
    a, b = pictures().requires_grad_(), pictures(1).requires_grad_()
    assert float(losses.perceptual(a, a, network).detach()) == 0
    expected = torch.stack(
        [(2 - 2 * cosine_similarity(x, y, dim=1)).mean() for x, y in zip(network(a), network(b), strict=True)]
    )
    found = losses.perceptual(a, b, network)
    torch.testing.assert_close(found, expected.mean())
    found.backward()
    assert a.grad.abs().sum() > 0 and b.grad is None
    with pytest.raises(ValueError, match="network: gave no features"):
        losses.perceptual(a, b, lambda x: [])


def test_hinge_and_lecam():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.5])
    assert float(losses.hinge_discriminator(real, fake)) == pytest.approx((0 + 0.5 + 2) / 3 / 2 + (0 + 1.5) / 2 / 2)
    assert float(losses.generator(fake)) == pytest.approx(0.75)
    value = losses.lecam(real, fake, torch.tensor(1.0), torch.tensor(-2.0))
    assert float(value) == pytest.approx((0.5 + 2) ** 2 + (1 + 0.75) ** 2)


def test_adaptive_weight_makes_gradients_equally_long():
    last = torch.randn(4, 3, requires_grad=True)
    x, target, direction = torch.randn(5, 3), torch.randn(5, 4), torch.randn(5, 4)
    reconstruction = (x @ last.T - target).square().mean()
    adversarial = 0.01 * (x @ last.T * direction).sum()
    weight = losses.adaptive_weight(reconstruction, adversarial, last)
    one, two = (torch.autograd.grad(t, last, retain_graph=True)[0].norm() for t in (reconstruction, adversarial))
    torch.testing.assert_close(weight * (two + 1e-4), one)
    assert not weight.requires_grad
    assert float(losses.adaptive_weight(reconstruction, 1e-9 * adversarial, last, 0.3, 10)) == 10
    assert float(losses.adaptive_weight(1e-9 * reconstruction, adversarial, last, 0.3, 10)) == pytest.approx(0.3)


def test_distillation():
    a, teacher = torch.randn(3, 4, 5, requires_grad=True), torch.randn(3, 4, 5, requires_grad=True)
    assert float(losses.distillation(teacher, teacher)) == pytest.approx(0, abs=1e-6)
    assert float(losses.distillation(-teacher, teacher)) == pytest.approx(2)
    cosine, square, both = (losses.distillation(a, teacher, k) for k in ("cosine", "l2", "both"))
    torch.testing.assert_close(both, cosine + square)
    both.backward()
    assert teacher.grad is None and a.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="kind: got 'l1'"):
        losses.distillation(a, teacher, "l1")


def test_info_nce():
    a, b = torch.randn(6, 4), torch.randn(6, 4)
    similarity = 10 * torch.stack([torch.stack([cosine_similarity(x, y, 0) for y in b]) for x in a])
    rows = -torch.stack([similarity[i].log_softmax(0)[i] for i in range(6)]).mean()
    columns = -torch.stack([similarity[:, i].log_softmax(0)[i] for i in range(6)]).mean()
    torch.testing.assert_close(losses.info_nce(a, b, 10.0), (rows + columns) / 2)
    torch.testing.assert_close(losses.info_nce(a, b), losses.info_nce(b, a))
    assert float(losses.info_nce(a, torch.ones(6, 4), 0.0)) == pytest.approx(math.log(6))
    assert float(losses.info_nce(a, 3 * a, 1000.0)) < 1e-3
    with pytest.raises(ValueError, match=r"b: got shape \(5, 4\)"):
        losses.info_nce(a, b[:5])


def test_gram_is_blind_to_the_order_of_places():
    a = torch.randn(2, 5, 4, 4)
    shuffled = a.flatten(2)[:, :, torch.randperm(16)].view_as(a)
    torch.testing.assert_close(losses.gram_matrix(a), losses.gram_matrix(shuffled))
    by_hand = torch.stack([x.flatten(1) @ x.flatten(1).T / 16 for x in a])
    torch.testing.assert_close(losses.gram_matrix(a), by_hand)
    x, y = pictures().requires_grad_(), pictures(1)
    assert float(losses.gram(x, x, network)) == 0
    value = losses.gram(x, y, network)
    value.backward()
    assert float(value) > 0 and x.grad.abs().sum() > 0
