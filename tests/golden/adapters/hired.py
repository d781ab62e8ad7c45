"""HiRED: partitions of one or more pictures in one call, the thumbnail first; crops in a grid as the picture's shape
says. The released regions and rounding."""

from __future__ import annotations

import math

import torch

from vistok.host.reducer import Evidence
from vistok.reduce.hired import HiRED


def run(case):
    hyper = case.hyper
    rows = [case.inputs[f"cls_attention_{which}"] for which in ("first", "last")]
    n = rows[0].shape[2]
    side = math.isqrt(n)
    masks, budgets, start = [], [], 0
    for partitions in hyper["num_patches"]:
        mine = slice(start, start := start + partitions)
        attention = tuple(x[mine].transpose(0, 1).flatten(1)[None] for x in rows)
        evidence = Evidence(
            features=torch.zeros(1, partitions * n, 1), crops=((side, side),) * partitions, cls_attention=attention
        )
        system = HiRED(alpha=hyper["alpha"], parity="authors")
        keep = int(partitions * n * hyper["rate"])
        masks.append((system.reduce(evidence, keep).source >= 0).view(partitions, n))
        budgets.append(system.budgets(evidence, keep)[0, 1:])
    return {"mask": torch.cat(masks).to(torch.uint8), "crop_budget": torch.cat(budgets)}
