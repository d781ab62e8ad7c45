"""How many scores stand out: the local outlier factor of single numbers.

Breunig, Kriegel, Ng, Sander: LOF (SIGMOD 2000), in the form of scikit-learn's ``LocalOutlierFactor``: a token is an
outlier where its factor is above 1.5 (``contamination="auto"``). Recoverable Compression keeps as many tokens as there
are outliers. On numbers the nearest neighbours lie beside one in sorted order: no N x N distances are needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

OUTLIER = 1.5
"""Factor above which a value counts as an outlier (the "auto" offset of the original paper and scikit-learn)."""


def local_outlier_factor(values: Tensor, neighbours: int = 20, mask: Tensor | None = None) -> Tensor:
    """(B, N) float64: about 1 where a value's neighbourhood is as dense as its neighbours', larger where it is sparser.

    ``values`` (B, N); ``neighbours`` is cut to the number of other real values. Of equally near neighbours
    those before it in (stable) sorted order are taken (scikit-learn takes any). Padded tokens (``mask`` False) and lone
    values have factor 1; more than ``neighbours`` duplicates have each other and factor 1.
    """
    b, n = values.shape
    if neighbours < 1:
        raise ValueError(f"neighbours: got {neighbours}, must be 1 or more")
    if mask is None:
        mask = torch.ones(b, n, dtype=torch.bool, device=values.device)
    if n < 2:
        return torch.ones(b, n, dtype=torch.float64, device=values.device)
    k = min(neighbours, n - 1)
    wide = torch.where(mask, values.double(), torch.inf)
    line, order = wide.sort(dim=1, stable=True)
    count = mask.sum(1, keepdim=True)  # the real ones come first
    take = (count - 1).clamp(0, k)  # neighbours of each picture's values

    place = torch.arange(n, device=values.device)
    # Candidates: the k values on either side, nearest first on each side.
    offsets = torch.cat([-torch.arange(1, k + 1), torch.arange(1, k + 1)]).to(values.device)
    at = place[:, None] + offsets
    outside = (at < 0) | (at >= count[..., None])
    at = at.clamp(0, n - 1).expand(b, n, 2 * k)
    beside = line.gather(1, at.flatten(1)).view(b, n, 2 * k)
    gap = (beside - line[:, :, None]).abs().masked_fill(outside, torch.inf).nan_to_num(torch.inf, posinf=torch.inf)
    gap, nearest = gap.sort(dim=2, stable=True)
    gap, nearest = gap[..., :k], at.gather(2, nearest)[..., :k]
    used = torch.arange(k, device=values.device) < take[..., None]

    reach = gap.gather(2, (take - 1).clamp_min(0)[:, :, None].expand(b, n, 1))[..., 0]  # distance to the last one
    apart = torch.maximum(gap, reach.gather(1, nearest.flatten(1)).view(b, n, k))
    density = 1 / (torch.where(used, apart, 0).sum(2) / take.clamp_min(1) + 1e-10)
    ratio = density.gather(1, nearest.flatten(1)).view(b, n, k) / density[..., None]
    factor = torch.where(used, ratio, 0).sum(2) / take.clamp_min(1)
    factor = torch.where((place < count) & (take > 0), factor, 1)
    return torch.empty_like(factor).scatter_(1, order, factor)


def outlier_ratio(values: Tensor, neighbours: int = 20, mask: Tensor | None = None) -> Tensor:
    """(B,) float64: outliers among the real ``values`` (B, N), as a share of them. Equal values give 0."""
    factor = local_outlier_factor(values, neighbours, mask)
    total = factor.new_full((len(factor),), values.shape[1]) if mask is None else mask.sum(1)
    return (factor > OUTLIER).sum(1) / total.clamp_min(1)
