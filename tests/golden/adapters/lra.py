"""Values of ListOps expressions."""

from __future__ import annotations

import torch

from vistok.world.lra import listops_value


def run(case):
    return {"value": torch.tensor([listops_value(row.tolist()) for row in case.inputs["tokens"]])}
