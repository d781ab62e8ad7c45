"""CT phantoms as a tokenizer's pictures, and what can be read out of their codes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vistok.core.fidelity import psnr
from vistok.parts.tokenizer import Tokenizer
from vistok.world.phantoms import FINDINGS, WINDOWS, make_phantom, window


def slices(start: int, count: int, side: int) -> tuple[Tensor, Tensor]:
    """Phantoms ``start`` .. as pictures (count, 3, side, side) in [0, 1], in one of the windows each; and findings."""
    found = [make_phantom(start + i, side) for i in range(count)]
    seen = list(WINDOWS.values())
    shown = [torch.from_numpy(window(p.hu, *seen[(start + i) % len(seen)])) for i, p in enumerate(found)]
    return torch.stack(shown)[:, None].expand(-1, 3, -1, -1).clone(), torch.tensor([p.finding for p in found])


@torch.no_grad()
def read_out(model: Tokenizer, features: Callable[[Tensor], Tensor], pictures: int, side: int) -> tuple[float, float]:
    """Share of held-out findings that ridge regression on ``features`` of codes names right, and PSNR in dB.

    ``features``: codes (B, N, D) to (B, C). It is solved on four times as many slices as ``pictures``.
    """
    sets = []
    made, real = torch.zeros(0), torch.zeros(0)
    for start, count in ((10**6, 4 * pictures), (2 * 10**6, pictures)):
        x, y = slices(start, count, side)
        z = [model.encode(part).z for part in x.split(64)]
        sets.append((torch.cat([features(part) for part in z if part is not None]).double(), y))
        made, real = torch.cat([model.render(part) for part in z if part is not None]).clamp(0, 1), x
    (x, y), (seen, truth) = sets
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    x, seen = (torch.cat([(t - mean) / std, t.new_ones(len(t), 1)], 1) for t in (x, seen))
    inner = x.t() @ x / len(x) + 1e-2 * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(inner, x.t() @ one_hot(y, len(FINDINGS)).double() / len(x))
    return float(((seen @ weights).argmax(1) == truth).double().mean()), float(psnr(made, real).mean())
