"""One attention with its predictor, as released."""

from __future__ import annotations

import math

import torch

from vistok.attend.sparsifiner import SparsifinerAttention, prune
from vistok.core.attention import attention_rows


def run(case):
    hyper = case.hyper
    attention = SparsifinerAttention(
        hyper["dim"],
        hyper["heads"],
        hyper["tokens"],
        hyper["keep_rate"] if hyper["score_topk"] else 0,
        hyper["score_threshold"],
        n_factor=hyper["reduce_n"],
        c_factor=hyper["reduce_c"],
        basis_threshold=hyper["basis_threshold"],
        coef_topk=hyper["coef_topk"],
        coef_threshold=hyper["coef_threshold"],
        parity="authors",
    )
    state = {n.removeprefix("param."): t for n, t in case.inputs.items() if n.startswith("param.")}
    attention.load_state_dict(state)
    attention.mask_predictor.reconstructs = hyper["recon"]
    x = case.inputs["x"]
    with torch.no_grad():
        q, k, _ = attention.split(x)
        out, connectivity, mask = attention(x)
        found = {
            "out": out,
            "connectivity": connectivity,
            "coef": attention.mask_predictor.coefficients(q, k),
            "mask": mask.to(torch.uint8),
            "attention": attention_rows(q, k, mask=None if hyper["recon"] else mask),
        }
        kept = prune(q, k, math.ceil(hyper["token_keep_rate"] * (x.shape[1] - 1)))
    live = torch.zeros(len(x), x.shape[1], dtype=torch.uint8).scatter(1, kept, 1)
    return found | {"token_mask": live[:, 1:]}
