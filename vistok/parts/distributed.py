"""What modules with state must agree on where several processes train one model; nothing to do in a single one."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def summed(x: Tensor) -> Tensor:
    """The sum of ``x`` over all processes."""
    if _alone():
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total


def of_first(x: Tensor) -> Tensor:
    """``x`` of the first process, on all."""
    if _alone():
        return x
    first = x.clone()
    dist.broadcast(first, src=0)
    return first
