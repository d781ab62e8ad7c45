"""The adversary's steps: start, weights, LeCam's memory, and that pictures do not see one another."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vistok.core import losses
from vistok.parts.adversary import Adversary, PatchGAN


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pair():
    return torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)


def test_patches_and_rows():
    net = PatchGAN(8)
    made, _ = pair()
    logits = net(made)
    assert logits.shape == (2, 1, 2, 2)
    torch.testing.assert_close(net(made[:1]), logits[:1], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="width: got 6"):
        PatchGAN(6)


def test_nothing_before_the_start_and_hinge_after_it():
    adversary = Adversary(PatchGAN(8), weight=0.5, start=2)
    made, real = pair()
    for _ in range(2):
        assert float(adversary.generator_loss(made)) == 0 and float(adversary.discriminator_loss(made, real)) == 0
    torch.testing.assert_close(adversary.generator_loss(made), -0.5 * adversary.discriminator(made).mean())
    expected = losses.hinge_discriminator(adversary.discriminator(real), adversary.discriminator(made))
    torch.testing.assert_close(adversary.discriminator_loss(made, real), expected)
    assert int(adversary.step) == 3
    adversary.eval().discriminator_loss(made, real)
    assert int(adversary.step) == 3


def test_whose_gradient_goes_where():
    adversary = Adversary(PatchGAN(8))
    made, real = (x.requires_grad_() for x in pair())
    adversary.discriminator_loss(made, real).backward()
    assert made.grad is None and real.grad is None
    assert all(p.grad is not None for p in adversary.discriminator.parameters())
    adversary.generator_loss(made).backward()
    assert made.grad.abs().sum() > 0


def test_adaptive_weight_of_a_decoder():
    adversary = Adversary(PatchGAN(8), weight=0.3, adaptive=True)
    decoder = nn.Conv2d(3, 3, 1)
    x, real = pair()
    made = decoder(x)
    reconstruction = losses.pixel(made, real)
    loss = adversary.generator_loss(made, reconstruction, decoder.weight)
    one, two = (torch.autograd.grad(t, decoder.weight, retain_graph=True)[0].norm() for t in (loss, reconstruction))
    torch.testing.assert_close(one, 0.3 * two, rtol=0.05, atol=0)
    with pytest.raises(ValueError, match="reconstruction, last: got none"):
        adversary.generator_loss(made)


def test_lecam_remembers_means():
    adversary = Adversary(PatchGAN(8), lecam_weight=0.1, decay=0.9)
    made, real = pair()
    plain = losses.hinge_discriminator(adversary.discriminator(real), adversary.discriminator(made))
    means = torch.stack([adversary.discriminator(real).mean(), adversary.discriminator(made).mean()])
    first = adversary.discriminator_loss(made, real)
    expected = means[0].relu().square() + (-means[1]).relu().square()
    torch.testing.assert_close(first, plain + 0.1 * expected)
    torch.testing.assert_close(adversary.averages, 0.1 * means)
    assert "averages" in adversary.state_dict() and "step" in adversary.state_dict()
