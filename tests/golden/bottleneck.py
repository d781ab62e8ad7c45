"""What the adapters of bottlenecks share: channels first to tokens and back, and gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def tokens(x: Tensor) -> Tensor:
    """(B, D, ...) to (B, N, D)."""
    return x.flatten(2).transpose(1, 2)


def like(x: Tensor, shape: Tensor) -> Tensor:
    """Tokens (B, N, D) as the channels-first tensor ``shape``."""
    return x.transpose(1, 2).reshape(shape.shape)


def grads(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The gradients of a number, zeros where it does not depend on an input."""
    found = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)
    return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True))


def projected(case) -> dict[str, Tensor]:
    """What an attention projection of ``case`` gives."""
    from vistok.parts.projection import AttentionProjection, published

    hyper, start = case.hyper, "proj."
    module = AttentionProjection(
        hyper["in_dim"], hyper["out_dim"], hyper["num_heads"], hyper["mlp_ratio"], hyper["is_causal"]
    )
    state = {name.removeprefix(start): value for name, value in case.inputs.items() if name.startswith(start)}
    module.load_state_dict(published(state))
    return {"y": module(case.inputs["x"])}
