"""How close pictures are to those they were made from: PSNR, SSIM, Frechet distance of features.

Pictures (B, C, H, W) in [0, 1], so the range of data is 1. The SSIM that the scripts of the LlamaGen lineage print is
taken with range 2 on such pictures and is too high; ``data_range=2`` gives it, for comparison alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d


def psnr(made: Tensor, real: Tensor, most: float = 100.0) -> Tensor:
    """(B,) peak signal-to-noise ratio in dB with a peak of 1; ``most`` where pictures are equal or nearly so."""
    error = (made.double() - real.double()).square().flatten(1).mean(1)
    return (-10 * error.clamp_min(10 ** (-most / 10)).log10()).float()


def ssim(made: Tensor, real: Tensor, window: int = 7, data_range: float = 1.0) -> Tensor:
    """(B,) structural similarity as scikit-image's: uniform ``window``, unbiased covariance, K 0.01 and 0.03.

    Places whose window would reach over the border do not count; mean over channels. ValueError for a window that is
    even or larger than the picture.
    """
    if window < 3 or window % 2 == 0 or window > min(made.shape[2:]):
        raise ValueError(f"window: got {window}, must be odd, 3 or more, and fit the picture, {tuple(made.shape[2:])}")
    x, y = made.double(), real.double()
    n = window**2
    mean_x, mean_y = (avg_pool2d(t, window, 1) for t in (x, y))
    cov = n / (n - 1)
    var_x = cov * (avg_pool2d(x * x, window, 1) - mean_x.square())
    var_y = cov * (avg_pool2d(y * y, window, 1) - mean_y.square())
    both = cov * (avg_pool2d(x * y, window, 1) - mean_x * mean_y)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * both + c2)
    bottom = (mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2)
    return (top / bottom).flatten(1).mean(1).float()


def to_uint8(x: Tensor) -> Tensor:
    """Pictures in [0, 1] as uint8, rounded to the nearest level. (Scripts that truncate lose half a level.)"""
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of features seen batch by batch, in float64; what a Frechet distance is taken of."""

    count: int = 0
    mean: Tensor | None = None
    """(D,)"""
    scatter: Tensor | None = None
    """(D, D): the sum of products of deviations from the mean."""

    def and_of(self, features: Tensor) -> Moments:
        """These and ``features`` (n, D): what all at once would give, without cancellation."""
        x = features.detach().double().cpu()
        mean = x.mean(0)
        scatter = (x - mean).t() @ (x - mean)
        if self.mean is None or self.scatter is None:
            return Moments(len(x), mean, scatter)
        total, away = self.count + len(x), mean - self.mean
        scatter = self.scatter + scatter + torch.outer(away, away) * (self.count * len(x) / total)
        return Moments(total, self.mean + away * (len(x) / total), scatter)

    def gaussian(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased covariance. ValueError with fewer than two features."""
        if self.count < 2 or self.mean is None or self.scatter is None:
            raise ValueError(f"features: got {self.count}, must be 2 or more")
        return self.mean, self.scatter / (self.count - 1)


def frechet(one: Moments, two: Moments) -> float:
    """Frechet distance of two Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), by eigenvalues, in float64."""
    (mean_a, a), (mean_b, b) = one.gaussian(), two.gaussian()
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.t()
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp_min(0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + a.trace() + b.trace() - 2 * cross)


def rfid(pairs: Iterable[tuple[Tensor, Tensor]], network: Callable[[Tensor], Tensor], truncate: bool = False) -> float:
    """Frechet distance of reconstructions from originals in the features of ``network``.

    ``pairs``: batches of (made, real), (B, 3, H, W) in [0, 1] each. ``network`` is given pictures in [0, 1] that went
    through uint8 (rounded; ``truncate``: as 1d-tokenizer does) and gives (B, D). Any network: the figure compares only
    with figures of the same one, and says little of fewer than some thousand pictures. ValueError for fewer than two.
    """
    sides = [Moments(), Moments()]
    for pair in pairs:
        for i, pictures in enumerate(pair):
            levels = (pictures.clamp(0, 1) * 255).to(torch.uint8) if truncate else to_uint8(pictures)
            with torch.no_grad():
                sides[i] = sides[i].and_of(network(levels.float() / 255))
    return frechet(*sides)
