"""The adversary of a tokenizer: a PatchGAN discriminator, and what it must remember between steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from vistok.core.losses import adaptive_weight, generator, hinge_discriminator, lecam
from vistok.parts.distributed import summed


class PatchGAN(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] to logits (B, 1, h, w), each of one patch (Isola et al., arXiv 1611.07004).

    ``layers`` strided convolutions of 4 x 4 from ``width`` channels, doubling up to eight times. Group norm in place of
    batch norm, so that a picture's logits do not depend on the others of its batch.
    """

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        if width % 4:
            raise ValueError(f"width: got {width}, must be a multiple of 4")
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        strides = [2] * (layers - 1) + [1]
        self.first = nn.Conv2d(3, width, 4, 2, 1)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 4, stride, 1, bias=False) for a, b, stride in zip(widths, widths[1:], strides, strict=False)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(4, b) for b in widths[1 : len(self.convs) + 1])
        self.last = nn.Conv2d(widths[len(self.convs)], 1, 4, 1, 1)

    def forward(self, pictures: Tensor) -> Tensor:
        x = leaky_relu(self.first(2 * pictures - 1), 0.2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = leaky_relu(norm(conv(x)), 0.2)
        return self.last(x)


class Adversary(nn.Module):
    """The two adversarial losses of a training step, from ``start`` on (0 before): hinge, LeCam, adaptive weight.

    ``generator_loss`` is for the tokenizer's optimizer, ``discriminator_loss`` for that of ``discriminator``; the
    latter also counts the step. ``weight``: of the first; ``adaptive``: times the ratio of gradients at the decoder's
    last weights, between ``bounds``. ``lecam_weight`` with moving averages of ``decay``.
    """

    step: Tensor
    averages: Tensor

    def __init__(
        self,
        discriminator: nn.Module,
        *,
        weight: float = 0.1,
        start: int = 0,
        adaptive: bool = False,
        bounds: tuple[float, float] = (0.0, 1e4),
        lecam_weight: float = 0.0,
        decay: float = 0.999,
    ) -> None:
        super().__init__()
        self.discriminator = discriminator
        self.weight, self.start, self.adaptive, self.bounds = weight, start, adaptive, bounds
        self.lecam_weight, self.decay = lecam_weight, decay
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("averages", torch.zeros(2))

    @property
    def active(self) -> bool:
        """Whether the adversary has started."""
        return int(self.step) >= self.start

    def generator_loss(self, made: Tensor, reconstruction: Tensor | None = None, last: Tensor | None = None) -> Tensor:
        """For pictures ``made`` with their gradient; the others are needed where the weight is adaptive.

        The discriminator's weights get a gradient too: zero it, as its own step does.
        """
        if not self.active:
            return made.new_zeros(())
        loss = generator(self.discriminator(made))
        if not self.adaptive:
            return self.weight * loss
        if reconstruction is None or last is None:
            raise ValueError("reconstruction, last: got none, must be given where the weight is adaptive")
        return self.weight * adaptive_weight(reconstruction, loss, last, *self.bounds) * loss

    def discriminator_loss(self, made: Tensor, real: Tensor) -> Tensor:
        """For a batch of pictures, of which neither gets a gradient; counts one step in training."""
        active = self.active
        if self.training:
            self.step.add_(1)
        if not active:
            return made.new_zeros(())
        real_logits, fake_logits = self.discriminator(real.detach()), self.discriminator(made.detach())
        loss = hinge_discriminator(real_logits, fake_logits)
        if self.lecam_weight:
            loss = loss + self.lecam_weight * lecam(real_logits, fake_logits, *self.averages.clone())
            if self.training:
                with torch.no_grad():
                    now = torch.stack([real_logits.mean(), fake_logits.mean()]).float()
                    count = summed(torch.ones_like(now))
                    self.averages.mul_(self.decay).add_((1 - self.decay) * summed(now) / count)
        return loss
