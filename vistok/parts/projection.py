"""Attention projection: to other widths with a look at the other tokens (UniTok, MedITok, DualToken)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d, gelu, scaled_dot_product_attention


class AttentionProjection(nn.Module):
    """(B, N, ``dim``) to (B, N, ``out``): a linear map plus attention, then a gated MLP with its residual.

    To fewer channels the heads work at the width that comes in and are averaged, channels pooled to ``out`` if theirs
    are more; to more channels they work at the width that goes out and stand side by side. ``causal`` over tokens:
    MedITok both ways, DualToken on the way up. A bias of the keys would cancel in the softmax, so there is none to set.
    """

    def __init__(self, dim: int, out: int, heads: int, mlp_ratio: float = 2.0, causal: bool = True) -> None:
        super().__init__()
        width = max(dim, out)
        if width % heads:
            raise ValueError(f"heads: got {heads}, must divide {width}, the larger of the two widths")
        self.out, self.heads, self.causal, self.narrows = out, heads, causal, dim > out
        self.norm_linear, self.norm_attention = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, out)
        self.qkv = nn.Linear(dim, 3 * width)
        self.mix = nn.Linear(out, out)
        hidden = int(out * mlp_ratio)
        # Two norms in a row, as published: the gated MLP brings its own.
        self.norm_mlp = nn.Sequential(nn.LayerNorm(out), nn.LayerNorm(out, eps=1e-6))
        self.gate, self.up, self.down = nn.Linear(out, hidden), nn.Linear(out, hidden), nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(self.norm_linear(x)) + self.attend(self.norm_attention(x))
        h = self.norm_mlp(x)
        return x + self.down(gelu(self.gate(h), approximate="tanh") * self.up(h))

    def attend(self, x: Tensor) -> Tensor:
        """The attention's part, (B, N, out), of normed ``x``."""
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        if self.narrows:
            together = seen.mean(1)
            return self.mix(together if together.shape[2] == self.out else adaptive_avg_pool1d(together, self.out))
        return self.mix(seen.transpose(1, 2).flatten(2))


def published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of UniTok's and DualToken's AttnProjection under our names."""
    names = {
        "attn.proj.": "mix.",
        "attn.qkv.": "qkv.",
        "mlp.norm.": "norm_mlp.1.",
        "norm2.": "norm_mlp.0.",
        "norm1.": "norm_attention.",
        "norm3.": "norm_linear.",
        "mlp.w0.": "gate.",
        "mlp.w1.": "up.",
        "mlp.w2.": "down.",
        "proj.": "linear.",
    }
    found = {}
    for key, value in state.items():
        prefix = next((theirs for theirs in names if key.startswith(theirs)), None)
        if prefix is not None:
            found[names[prefix] + key.removeprefix(prefix)] = value
    found["qkv.bias"] = torch.cat([state["attn.q_bias"], torch.zeros_like(state["attn.q_bias"]), state["attn.v_bias"]])
    return found
