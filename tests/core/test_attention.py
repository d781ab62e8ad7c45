"""Rows and means of attention maps against the map itself, and the memory they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vistok.core.attention import attention_marginals, attention_rows, class_row


def full_map(q: Tensor, k: Tensor, scale: float | None = None, mask: Tensor | None = None) -> Tensor:
    """Softmax of everything, with key heads repeated; rows without a key to see are 0."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        logits = logits + torch.where(mask, 0.0, -torch.inf)
    return logits.softmax(-1).nan_to_num(0)


@given(st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]), st.integers(1, 7), st.integers(1, 5), st.integers(0, 999))
def test_rows_and_marginals(heads: tuple[int, int], m: int, block: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    h, hk = heads

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    queries = int(torch.randint(1, m + 1, (1,), generator=generator))
    q, k = draw(2, h, queries, 4), draw(2, hk, m, 4)
    places = torch.stack([torch.randperm(m, generator=generator)[:queries].sort().values for _ in range(2)])
    real = torch.rand(2, 1, 1, m, generator=generator) < 0.7
    causal = torch.arange(m) <= places[:, None, :, None]
    query_mask = torch.rand(2, queries, generator=generator) < 0.6
    additive = torch.where(real, 0.0, -torch.inf).double()
    prefix = seed % m
    for expected, extra in [
        (full_map(q, k), {}),
        (full_map(q, k, 0.3), {"scale": 0.3}),
        (full_map(q, k, mask=real), {"mask": additive}),
        (full_map(q, k, mask=real), {"mask": real}),
        (full_map(q, k, mask=causal), {"places": places}),
        (full_map(q, k, mask=causal & real), {"places": places, "mask": additive}),
        (full_map(q, k, mask=causal & real), {"mask": causal & real}),
    ]:
        torch.testing.assert_close(attention_rows(q, k, **extra), expected)
        received, given_ = attention_marginals(q, k, block=block, prefix=prefix, **extra)
        torch.testing.assert_close(received, expected.mean((1, 2)))
        torch.testing.assert_close(given_, expected.mean(1)[..., prefix:].mean(2))
        received, _ = attention_marginals(q, k, block=block, query_mask=query_mask, **extra)
        for b in range(2):
            rows = expected[b][:, query_mask[b]]
            torch.testing.assert_close(
                received[b], rows.mean((0, 1)) if rows.numel() else torch.zeros_like(received[b])
            )


def test_class_row():
    q, k = torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 4)
    row = class_row(q, k)
    torch.testing.assert_close(row, full_map(q, k)[:, :, 0, 1:])
    assert (row.sum(-1) < 1).all()
    wide = class_row(q.transpose(1, 2).flatten(2)[:, None], k.transpose(1, 2).flatten(2)[:, None])
    assert wide.shape == (2, 1, 5)


def test_finite_masks_and_half_precision():
    """The additive masks of transformers hold the least float, not -inf; half-precision inputs give float32 rows."""
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    mask = torch.zeros(1, 1, 3, 5)
    mask[..., 3:] = torch.finfo(torch.float32).min
    rows = attention_rows(q, k, mask=mask)
    assert (rows[..., 3:] == 0).all() and torch.allclose(rows.sum(-1), torch.ones(1, 2, 3))
    half = attention_rows(q.bfloat16(), k.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, attention_rows(q.bfloat16().float(), k.bfloat16().float()))


class Largest(TorchDispatchMode):
    """Remembers the number of entries of the largest tensor that any operation returned."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return out


def test_memory_is_a_block():
    b, h, m, d, block = 1, 4, 600, 8, 16
    q, k = torch.randn(b, h, m, d), torch.randn(b, h, m, d)
    with Largest() as seen:
        attention_marginals(q, k, block=block, places=torch.arange(m)[None])
    assert b * h * block * m <= seen.entries <= 2 * b * h * block * m
    with Largest() as seen:
        class_row(q, k)
    assert seen.entries <= b * h * m * d


def test_errors():
    q = torch.randn(1, 3, 4, 2)
    with pytest.raises(ValueError, match="k: got 2 heads"):
        attention_rows(q, q[:, :2])
    with pytest.raises(ValueError, match="block"):
        attention_marginals(q, q, block=0)
    with pytest.raises(ValueError, match="prefix"):
        attention_marginals(q, q, prefix=4)
