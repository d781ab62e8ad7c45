"""Attention debiasing: the letterbox masks of both rules, and the corrected FastV ranking of each picture by itself.

The weights 1 / f were an input of the authors' code; the trend behind them is fitted here.
"""

from __future__ import annotations

import torch

from vistok.host.reducer import Evidence
from vistok.reduce.attention_debias import AttentionDebias, debias, fit_recency, padding_mask


def run(case):
    sizes = case.inputs["sizes"].tolist()
    if "weight" not in case.inputs:
        grid, threshold = case.hyper["grid"], case.hyper["threshold"]
        rules = {"real_area": "area", "real_floor": "whole"}
        return {
            name: torch.stack([~padding_mask(*size, grid, threshold, rule) for size in sizes]).to(torch.uint8)
            for name, rule in rules.items()
        }
    attention, keep = case.inputs["llm_attention"], case.hyper["keep"]
    n = attention.shape[1]
    side = round(n**0.5)
    mu, sigma = fit_recency(1 / case.inputs["weight"].double()[None])
    scores, kept, counts = [], [], []
    for row, size in zip(attention, sizes, strict=True):
        mask = padding_mask(*size, side).flatten()
        count = min(keep, int((~mask).sum()))
        scores.append(debias(row, mu, sigma, mask))
        seen = Evidence(features=torch.zeros(1, n, 1), llm_attention=row[None, None, None], grid=(side, side))
        found = AttentionDebias(mu=mu, sigma=sigma, size=tuple(size)).at_layer(seen, count, 2).keep[0]
        kept.append(torch.cat([found, torch.full((keep - count,), -1)]))
        counts.append(count)
    return {"score": torch.stack(scores), "keep": torch.stack(kept), "count": torch.tensor(counts)}
