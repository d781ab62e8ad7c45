"""HoloV: the released functions, which are ``parity="authors"``."""

from __future__ import annotations

import torch

from vistok.host.reducer import Evidence
from vistok.reduce.holov import HoloV


def run(case):
    evidence = Evidence(features=case.inputs["features"], cls_attention=case.inputs["attention"].unsqueeze(1))
    reduction = HoloV(chunks=case.hyper["P"], parity="authors").reduce(evidence, case.hyper["keep"])
    b, n = reduction.source.shape
    at = torch.where(reduction.source < 0, case.hyper["keep"], reduction.source)
    order = torch.full((b, case.hyper["keep"] + 1), -1).scatter(1, at, torch.arange(n).expand(b, n))[:, :-1]
    return {"tokens": reduction.tokens, "keep_order": order}
