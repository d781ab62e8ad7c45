"""MustDrop: each of its filters by itself. The window cases keep the class token, which is put in front here, and give
the released order of slots (``parity="authors"``); the filter cases leave the key set out."""

from __future__ import annotations

import math

import torch

from vistok.host.reducer import Evidence
from vistok.reduce.mustdrop import MustDrop


def run(case):
    hyper = case.hyper
    if "llm_attention" in case.inputs:
        return _filter(case.inputs["llm_attention"], hyper)
    if "attention_rows" in case.inputs:
        key = MustDrop().key_set(case.inputs["attention_rows"][..., 1:].mean(1))
        count = int((key[0] >= 0).sum())
        order = key.sort(dim=1, descending=True, stable=True).indices[:, :count]
        return {"order": order, "keep": order.sort(1).values}
    return _windows(case.inputs["features"], hyper)


def _filter(attention, hyper):
    span = slice(hyper["start"], hyper["start"] + hyper["N"])
    rows = attention[:, :, span.stop :, span]
    system = MustDrop(
        threshold=hyper["global_thr"], individual=hyper["individual_thr"] / hyper["global_thr"], key_share=0.0
    )
    no_key = torch.full((1, hyper["N"]), -1.0)
    evidence = Evidence(features=torch.zeros(1, hyper["N"], 1), llm_attention=rows, carry=no_key)
    return {"keep": system.at_layer(evidence, 0, 2).keep[0]}


def _windows(features, hyper):
    x = features[:, 1:]
    b, n, _ = x.shape
    side = math.isqrt(n)
    system = MustDrop(window=hyper["window"], similarity=hyper["threshold"], threshold=0.0, parity="authors")
    evidence = Evidence(
        features=x, encoder_features=x, encoder_states=x, cls_attention=torch.ones(b, 1, n) / n, grid=(side, side)
    )
    reduction = system.reduce(evidence, n - 1)
    source = torch.cat([torch.zeros(b, 1, dtype=torch.int64), reduction.source + 1], 1)
    size = torch.zeros(b, reduction.keep.shape[1] + 1).scatter_add(1, source, torch.ones(b, n + 1))
    return {"tokens": torch.cat([features[:, :1], reduction.tokens], 1), "size": size, "source": source}
