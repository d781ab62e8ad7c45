"""Analytic floating-point operations of transformer parts, from shapes alone.

Conventions of ``torch.utils.flop_counter``: a product of (m, k) and (k, n) matrices costs 2 m k n; attention counts
Q K^T and P V over all pairs of queries and keys (a causal mask saves nothing); convolutions count as products; norms,
softmax, activations, rotary embedding and embedding look-ups cost nothing. For one sequence; multiply by the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def linear(tokens: int, *widths: int) -> int:
    """Linear layers ``widths[0] -> widths[1] -> ...`` in a chain on ``tokens`` tokens, as in a projector."""
    return sum(2 * tokens * a * b for a, b in pairwise(widths))


def attention(queries: int, keys: int, heads: int, head_dim: int) -> int:
    """Q K^T and P V of ``queries`` tokens that look at ``keys`` tokens (grouped-query heads count as query heads)."""
    return 2 * 2 * queries * keys * heads * head_dim


def transformer_layer(
    tokens: int,
    width: int,
    mlp_width: int,
    heads: int,
    *,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    gated: bool = False,
    keys: int | None = None,
) -> int:
    """One layer on ``tokens`` tokens that look at ``keys`` tokens (by default themselves; in decoding 1 and the cache).

    Projections q, k, v, o, attention, and an MLP of two matrices, or three if ``gated`` (SwiGLU). ``head_dim``: by
    default width / heads; ``kv_heads``: by default ``heads``.
    """
    head_dim = width // heads if head_dim is None else head_dim
    kv_heads = heads if kv_heads is None else kv_heads
    projections = linear(tokens, width, (2 * heads + 2 * kv_heads) * head_dim)
    mlp = (3 if gated else 2) * linear(tokens, width, mlp_width)
    return projections + attention(tokens, tokens if keys is None else keys, heads, head_dim) + mlp


def vision_tower(
    patches: int,
    width: int,
    mlp_width: int,
    heads: int,
    layers: int,
    *,
    patch: int,
    channels: int = 3,
    class_token: bool = True,
    gated: bool = False,
) -> int:
    """A plain ViT: ``patches`` embeddings of ``patch`` x ``patch`` pixels, then ``layers`` layers of full attention."""
    tokens = patches + class_token
    embed = linear(patches, channels * patch * patch, width)
    return embed + layers * transformer_layer(tokens, width, mlp_width, heads, gated=gated)


def decoder(
    tokens: Sequence[int],
    width: int,
    mlp_width: int,
    heads: int,
    *,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    gated: bool = True,
    keys: Sequence[int] | None = None,
    vocabulary: int = 0,
    outputs: int = 1,
) -> int:
    """A language model whose layer l works on ``tokens[l]`` tokens that look at ``keys[l]`` (by default themselves).

    ``vocabulary`` adds the output head on ``outputs`` tokens (in generation only the last).
    """
    seen = tokens if keys is None else keys
    if len(seen) != len(tokens):
        raise ValueError(f"keys: got {len(seen)} layers, must be {len(tokens)} as tokens")
    body = sum(
        transformer_layer(t, width, mlp_width, heads, head_dim=head_dim, kv_heads=kv_heads, gated=gated, keys=s)
        for t, s in zip(tokens, seen, strict=True)
    )
    return body + linear(outputs, width, vocabulary)
