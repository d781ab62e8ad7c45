"""Losses of tokenizers as pure functions: pixels, adversary, distillation, contrast, Gram matrices.

What needs a network is given it (``perceptual``). The discriminator is ``vistok.parts.adversary``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, normalize, relu

Features = Callable[[Tensor], Sequence[Tensor]]
"""Pictures (B, 3, H, W) in [0, 1] to maps or vectors (B, C, ...), one for each layer that counts."""


def pixel(made: Tensor, real: Tensor, kind: Literal["l1", "l2"] = "l2", valid: Tensor | None = None) -> Tensor:
    """Mean absolute ("l1") or squared ("l2") difference of pictures (B, C, H, W), in float32.

    ``valid`` bool, broadcastable to both: pixels that are False do not count; 0 if none does.
    """
    if kind not in ("l1", "l2"):
        raise ValueError(f"kind: got {kind!r}, must be 'l1' or 'l2'")
    difference = made.float() - real.float()
    each = difference.abs() if kind == "l1" else difference.square()
    if valid is None:
        return each.mean()
    weight = valid.to(each.dtype).expand_as(each)
    return (each * weight).sum() / weight.sum().clamp_min(1)


def perceptual(made: Tensor, real: Tensor, network: Features) -> Tensor:
    """LPIPS without its learned weights: squared distance of features of unit length over channels, mean over layers.

    ``network`` is any frozen one (``vistok.core.losses.Features``); it gets no gradient from ``real``.
    """
    with torch.no_grad():
        wanted = [normalize(f.float(), dim=1) for f in network(real)]
    found = [normalize(f.float(), dim=1) for f in network(made)]
    if not wanted:
        raise ValueError("network: gave no features, must give one map or more")
    each = [(a - b).square().sum(1).mean() for a, b in zip(found, wanted, strict=True)]
    return torch.stack(each).mean()


# Adversary ---------------------------------------------------------------------------------------------------------


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Half of mean relu(1 - real) + mean relu(1 + fake), of a discriminator's logits of any shape."""
    return (relu(1 - real).mean() + relu(1 + fake).mean()) / 2


def generator(fake: Tensor) -> Tensor:
    """What the tokenizer wants of the logits of its pictures: - mean."""
    return -fake.mean()


def lecam(real: Tensor, fake: Tensor, average_real: Tensor, average_fake: Tensor) -> Tensor:
    """LeCam regulariser (Tseng et al., arXiv 2104.03310) on batch means and their moving averages."""
    return relu(real.mean() - average_fake).square() + relu(average_real - fake.mean()).square()


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, last: Tensor, least: float = 0.0, most: float = 1e4
) -> Tensor:
    """The weight that makes the adversary's gradient at the decoder's ``last`` weights as long as the reconstruction's.

    |grad reconstruction| / (|grad adversarial| + 1e-4), between ``least`` and ``most`` (VQGAN; DualToken: 0.3 and 10);
    a number without a gradient.
    """
    (one,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
    (two,) = torch.autograd.grad(adversarial, last, retain_graph=True)
    weight: Tensor = one.norm() / (two.norm() + 1e-4)
    return weight.clamp(least, most).detach()


# Features ----------------------------------------------------------------------------------------------------------


def distillation(student: Tensor, teacher: Tensor, kind: Literal["cosine", "l2", "both"] = "cosine") -> Tensor:
    """How far features (..., D) are from a frozen teacher's: 1 - cosine ("cosine"), mean square, or their sum.

    No gradient to ``teacher``. "both" less 1 is DualToken's (MSE - cos).
    """
    if kind not in ("cosine", "l2", "both"):
        raise ValueError(f"kind: got {kind!r}, must be 'cosine', 'l2' or 'both'")
    teacher = teacher.detach().float()
    away = 1 - cosine_similarity(student.float(), teacher, dim=-1).mean()
    square = (student.float() - teacher).square().mean()
    return away if kind == "cosine" else square if kind == "l2" else away + square


def info_nce(a: Tensor, b: Tensor, scale: Tensor | float = 1 / 0.07, smoothing: float = 0.0) -> Tensor:
    """Contrast of pairs (B, D): row i of ``a`` belongs to row i of ``b``; mean of both directions, in nats.

    ``scale`` multiplies the cosines (CLIP's exp(logit_scale), 100 at most).
    """
    if a.shape != b.shape or a.dim() != 2:
        raise ValueError(f"b: got shape {tuple(b.shape)}, must be that of a, {tuple(a.shape)}, of two axes")
    logits = scale * normalize(a.float(), dim=1) @ normalize(b.float(), dim=1).t()
    same = torch.arange(len(a), device=a.device)
    both = [cross_entropy(x, same, label_smoothing=smoothing) for x in (logits, logits.t())]
    return (both[0] + both[1]) / 2


def gram_matrix(features: Tensor) -> Tensor:
    """(B, C, C): products of the channels of ``features`` (B, C, ...), mean over places; blind to their order."""
    x = features.float().flatten(2)
    return x @ x.transpose(1, 2) / x.shape[2]


def gram(made: Tensor, real: Tensor, network: Features) -> Tensor:
    """Mean absolute difference of the Gram matrices of a frozen network's layers (AToken), mean over layers."""
    with torch.no_grad():
        wanted = [gram_matrix(f) for f in network(real)]
    each = [(gram_matrix(f) - w).abs().mean() for f, w in zip(network(made), wanted, strict=True)]
    if not each:
        raise ValueError("network: gave no features, must give one map or more")
    return torch.stack(each).mean()
