"""Small random language models without pictures, and padded batches for them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers as tf

from tests.host.families import TEXT


@cache
def language(kind: str = "Llama", **config: Any) -> Any:
    """An untrained model, such as LlamaForCausalLM: 4 layers, 4 heads, 2 key heads."""
    torch.manual_seed(0)
    model = getattr(tf, f"{kind}ForCausalLM")(getattr(tf, f"{kind}Config")(**(TEXT | config))).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def batch(*lengths: int, side: str = "left", seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows of so many random tokens, padded on ``side``, with position ids as ``generate`` makes them."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, n in zip(ids, lengths, strict=True):
        row[len(row) - n :] = torch.randint(1, 90, (n,), generator=rng)
        if side == "right":
            row.copy_(row.roll(n - len(row)))
    mask = (ids > 0).long()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def alone(rows: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One row of a batch without its padding."""
    real = rows["attention_mask"][row].bool()
    return {name: value[row : row + 1, real] for name, value in rows.items()}
