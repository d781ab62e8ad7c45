"""Scores of the last queries, the tokens that each head keeps, and its attention among them."""

from __future__ import annotations

import torch

from vistok.attend.token_sparse_attention import token_sparse_attention, window_scores


def run(case):
    given, how = case.inputs, case.hyper
    length = given["q"].shape[2]
    lengths = torch.full((len(given["q"]),), length)
    scores = window_scores(given["q"], given["k"], how["window"], lengths, given["q"].shape[3] ** -0.5)
    out, index = token_sparse_attention(given["q"], given["k"], given["v"], **how)
    return {
        "scores": scores[..., : length - how["window"]],
        "index": index,
        "out": out.transpose(1, 2).flatten(2),
    }
