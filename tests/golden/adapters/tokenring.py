"""Merging of partial outputs; the ring and the zigzag of all ranks, with what each sends."""

from __future__ import annotations

import torch

from vistok.attend.tokenring import TokenRing
from vistok.core.attention import merge_lse


def run(case):
    given, hyper = case.inputs, case.hyper
    if "blocks" in hyper:
        outs = [given[f"block_out{i}"].transpose(1, 2) for i in range(hyper["blocks"])]
        out, lse = merge_lse(outs, [given[f"block_lse{i}"] for i in range(hyper["blocks"])])
        return {"out": out.transpose(1, 2), "lse": lse.transpose(1, 2)}
    system = TokenRing("zigzag" if hyper["causal"] else "bidirectional", hyper["causal"])
    q, k, v = (given[name].transpose(1, 2) for name in "qkv")
    out, lse, log = system.simulate(q, k, v, hyper["ranks"])
    sent = torch.zeros(hyper["ranks"], 2, dtype=torch.int64)
    for message in log:
        sent[message.source, int(message.what == "back")] += message.elements
    return {"out": out.transpose(1, 2), "lse": lse, "sent_elements": sent}
