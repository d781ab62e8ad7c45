"""Recoverable Compression with the data's counts and the case's own text score; rows in the released order."""

from __future__ import annotations

import torch

from vistok.core.attention import class_row
from vistok.host.reducer import Evidence
from vistok.reduce.recoverable_compression import RecoverableCompression


def run(case):
    x, text = case.inputs["encoder_features"], case.inputs["text_score"]
    queries, keys = (case.inputs[name].unsqueeze(1) for name in ("encoder_queries", "encoder_keys"))
    attention = class_row(queries, keys)[:, 0]

    class Given(RecoverableCompression):
        def text_score(self, evidence):
            return text

    system = Given(counts="data", parity="authors" if case.hyper["variant"] == "authors" else "paper")
    evidence = Evidence(
        features=x, encoder_features=x, wide_cls_attention=attention, encoder_keys=keys[:, 0, 1:], text=x[:, :0]
    )
    seen, recovered, centre = system.roles(evidence, None)
    reduction = system.reduce(evidence, x.shape[1] - 1)
    kept = (seen | recovered).gather(1, reduction.keep)[0]
    middle = centre.gather(1, reduction.keep)[0]
    slots = torch.arange(len(kept))
    falling = attention[0, reduction.keep[0]].argsort(descending=True)
    order = torch.cat([slots[kept], falling[middle[falling]], slots[~kept & ~middle]])
    return {
        "tokens": reduction.tokens[:, order],
        "keep": reduction.keep[:, slots[kept]],
        "counts": torch.tensor([int(kept.sum()), int((~kept).sum())]),
    }
