"""How a gradient gets past the choice of a code. Each rule gives exactly ``table[ids]``, bit for bit.

    rule(z (..., D), table (K, D), ids (...)) -> (..., D)

The value is the row itself; what carries the gradient is added as a difference of equal numbers, which is zero. The
usual ``z + (q - z).detach()`` rounds, and then a stored id no longer gives the vector that was decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding, normalize

GradientRule: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
RuleName: TypeAlias = Literal["straight-through", "rotation", "index"]

_BLOCK = 2**22
"""Logits of a block, N' x K."""


def pass_through(carrier: Tensor, value: Tensor) -> Tensor:
    """``value`` exactly, with the gradient of ``carrier``; none to ``value``. Both of one shape, finite."""
    return value.detach() + (carrier - carrier.detach())


def straight_through(z: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """The gradient goes to ``z`` as it is (van den Oord et al., arXiv 1711.00937); none to ``table``."""
    return pass_through(z, embedding(ids, table))


def rotation(z: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """The rotation trick (Fifty et al., arXiv 2410.06424): out = |q| / |z| R z, where R turns z onto q, is held fixed.

    The gradient's angle to q is kept as an angle to z, and its length times |q| / |z|. Where z is opposite to q no
    rotation is singled out, and where z is 0 there is no direction: there the gradient is passed straight through.
    """
    q = embedding(ids, table).detach()
    fixed = z.detach()
    u, v = normalize(fixed, dim=-1, eps=1e-12), normalize(q, dim=-1, eps=1e-12)
    half = u + v
    size = half.norm(dim=-1, keepdim=True)
    w = half / size.clamp_min(1e-6)
    # R z for z = |z| u is z - 2 w (w z) + 2 v (u z): two reflections.
    turned = z - 2 * w * (w * z).sum(-1, keepdim=True) + 2 * v * (u * z).sum(-1, keepdim=True)
    length = fixed.norm(dim=-1, keepdim=True)
    scaled = q.norm(dim=-1, keepdim=True) / length.clamp_min(1e-12) * turned
    plain = (size < 1e-6) | (length < 1e-12)
    return pass_through(torch.where(plain, z, scaled), q)


def index_backpropagation(z: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """IBQ (Shi et al., arXiv 2412.02692): as if the choice were softmax(z table^T), so that every code learns.

    Gradient to ``z``: p (g - <p, g>) C, with g the gradient by code; to ``table``: that of the chosen row and, through
    the softmax, of all. Softmax and products are made again in the backward pass, in blocks: memory O(N + K).
    """
    out: Tensor = _IndexBackpropagation.apply(z, table, ids)  # type: ignore[no-untyped-call]
    return out


class _IndexBackpropagation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, table: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(z, table, ids)
        return embedding(ids, table)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        z, table, ids = ctx.saved_tensors
        rows, vectors, chosen = grad.flatten(0, -2), z.flatten(0, -2), ids.flatten()
        to_table = torch.zeros_like(table).index_add_(0, chosen, rows)
        block = max(1, _BLOCK // len(table))
        to_z = []
        for g, v in zip(torch.split(rows, block), torch.split(vectors, block), strict=True):
            p = (v @ table.t()).softmax(1)
            by_code = g @ table.t()
            by_logit = p * (by_code - (p * by_code).sum(1, keepdim=True))
            to_z.append(by_logit @ table)
            to_table = to_table + by_logit.t() @ v
        return torch.cat(to_z).view_as(z), to_table, None


RULES: dict[str, GradientRule] = {
    "straight-through": straight_through,
    "rotation": rotation,
    "index": index_backpropagation,
}


def rule_of(rule: RuleName | GradientRule) -> GradientRule:
    """A rule by its name, or as it is. Raises ValueError for an unknown name."""
    if callable(rule):
        return rule
    if rule not in RULES:
        raise ValueError(f"gradient: got {rule!r}, must be a rule or one of {', '.join(RULES)}")
    return RULES[rule]
