"""The other ways to make a model cheaper, to be combined with fewer tokens: weights and caches of fewer bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CACHES: Mapping[str, dict[str, Any] | None] = {
    "none": None,
    "fp8": {"backend": "fp8"},
    "quanto-4": {"backend": "quanto", "nbits": 4, "q_group_size": 32},
    "quanto-2": {"backend": "quanto", "nbits": 2, "q_group_size": 32},
}
"""How keys and values are held -> what transformers' quantized cache is told; quanto is the package optimum-quanto."""


@contextmanager
def cached(model: PreTrainedModel, kind: str) -> Iterator[None]:
    """Every cache that ``generate`` makes inside the ``with`` is of this kind, see ``CACHES``."""
    config, told = model.generation_config, CACHES[kind]
    before = config.cache_implementation, config.cache_config
    if told is not None:
        config.cache_implementation, config.cache_config = "quantized", dict(told)
    try:
        yield
    finally:
        config.cache_implementation, config.cache_config = before


def weight_bytes(model: torch.nn.Module, weights: str = "none") -> int:
    """Bytes of the parameters and buffers, shared ones once; values of four bits count half a byte each, as they would
    when packed."""
    found = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(_bytes(tensor.data, weights == "int4") for tensor in found.values())


def _bytes(tensor: torch.Tensor, four: bool) -> int:
    if type(tensor) is torch.Tensor:
        return tensor.numel() * tensor.element_size()
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    parts = [getattr(tensor, name) for name in names]
    return sum(part.nbytes // 2 if four and part.dtype is torch.int8 else part.nbytes for part in parts)
