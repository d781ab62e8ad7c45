"""PSNR and SSIM against scikit-image, the Frechet distance against its closed form and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vistok.core.fidelity import Moments, frechet, psnr, rfid, ssim, to_uint8

metrics = pytest.importorskip("skimage.metrics")


def pair(noise=0.1, shape=(3, 3, 24, 31)):
    real = torch.rand(shape)
    return (real + noise * torch.randn(shape)).clamp(0, 1), real


def test_psnr():
    made, real = pair()
    expected = [
        metrics.peak_signal_noise_ratio(r.numpy(), m.numpy(), data_range=1) for r, m in zip(real, made, strict=True)
    ]
    torch.testing.assert_close(psnr(made, real).double(), torch.tensor(expected).double(), rtol=1e-6, atol=1e-5)
    assert psnr(real, real).tolist() == [100] * 3 and psnr(real, real, 60).tolist() == [60] * 3


def test_psnr_falls_with_noise():
    torch.manual_seed(1)
    real, noise = torch.rand(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    values = [float(psnr(real + s * noise, real).mean()) for s in (0.01, 0.02, 0.1, 0.5)]
    assert values == sorted(values, reverse=True)
    assert values[0] - values[1] == pytest.approx(20 * math.log10(2), abs=1e-3)


@pytest.mark.parametrize("window", [3, 7, 11])
@pytest.mark.parametrize("data_range", [1.0, 2.0])
def test_ssim(window, data_range):
    made, real = pair()
    expected = [
        metrics.structural_similarity(r.numpy(), m.numpy(), win_size=window, data_range=data_range, channel_axis=0)
        for r, m in zip(real, made, strict=True)
    ]
    torch.testing.assert_close(
        ssim(made, real, window, data_range).double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-5
    )


def test_ssim_with_range_two_is_too_high():
    real = 0.5 + 0.1 * torch.rand(3, 3, 24, 24)  # low contrast, as much of a photograph
    made = real + 0.05 * torch.randn(real.shape)
    assert (ssim(made, real, data_range=2.0) > ssim(made, real) + 0.02).all()
    torch.testing.assert_close(ssim(real, real), torch.ones(3))
    for window in (2, 8, 25):
        with pytest.raises(ValueError, match=f"window: got {window}"):
            ssim(made, real, window)


def moments(mean, covariance, n=400):
    """Of n vectors that have exactly this mean and unbiased covariance."""
    d = len(mean)
    x = torch.randn(n, d, dtype=torch.float64)
    x = x - x.mean(0)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / (n - 1)), x.T, upper=False).T
    return Moments().and_of(x @ torch.linalg.cholesky(covariance).T + mean)


def test_frechet_of_gaussians_in_closed_form():
    """Diagonal covariances: |m1 - m2|^2 + sum of (s1 - s2)^2; and any two that turn together."""
    m1, m2 = torch.randn(4).double(), torch.randn(4).double()
    s1, s2 = torch.rand(4).double() + 0.5, torch.rand(4).double() + 0.5
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    expected = float((m1 - m2).square().sum() + (s1 - s2).square().sum())
    for r in (torch.eye(4, dtype=torch.float64), turn):
        one, two = moments(m1, r @ torch.diag(s1**2) @ r.T), moments(m2, r @ torch.diag(s2**2) @ r.T)
        assert frechet(one, two) == pytest.approx(expected, rel=1e-9)
        assert frechet(one, two) == pytest.approx(frechet(two, one), rel=1e-9)
        assert frechet(one, one) == pytest.approx(0, abs=1e-9)


def test_frechet_against_the_square_root_of_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    x, y = torch.randn(50, 6).double(), 2 * torch.randn(60, 6).double() @ torch.randn(6, 6).double()
    a, b = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    assert frechet(Moments().and_of(x), Moments().and_of(y)) == pytest.approx(expected, rel=1e-8)


def test_moments_batch_by_batch_are_those_of_all():
    x = 1e4 + torch.randn(50, 3).double()
    parts = Moments()
    for part in x.split((1, 20, 29)):
        parts = parts.and_of(part)
    mean, covariance = parts.gaussian()
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(covariance, torch.cov(x.T), rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match="features: got 1, must be 2 or more"):
        Moments().and_of(x[:1]).gaussian()


def test_rfid():
    network = lambda x: x.mean((2, 3))  # noqa: E731
    real = torch.rand(40, 3, 4, 4)
    made = (real + 0.2).clamp(0, 1)
    batches = lambda a: [(a[:15], real[:15]), (a[15:], real[15:])]  # noqa: E731
    assert rfid(batches(real), network) == pytest.approx(0, abs=1e-12)
    whole = [Moments().and_of(network(to_uint8(x).float() / 255)) for x in (made, real)]
    assert rfid(batches(made), network) == pytest.approx(frechet(*whole), rel=1e-6)
    assert rfid(batches(made), network, truncate=True) != rfid(batches(made), network)
    with pytest.raises(ValueError, match="features: got 0"):
        rfid([], network)


def test_uint8_rounds_so_that_levels_go_round():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 255), levels)
    assert to_uint8(torch.tensor([-1.0, 2.0])).tolist() == [0, 255]
