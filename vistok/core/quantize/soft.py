"""Codes that are not chosen but expected."""

from __future__ import annotations

from torch import Tensor


def soft_lookup(logits: Tensor, table: Tensor, sharpness: float = 1.0) -> Tensor:
    """(..., D): the expected code, softmax(``sharpness`` ``logits``) (..., K) times ``table`` (K, D), in float32.

    TiTok's second stage and AiT's soft tokens. As ``sharpness`` grows, the code of the largest logit.
    """
    return (sharpness * logits.float()).softmax(-1) @ table.float()
