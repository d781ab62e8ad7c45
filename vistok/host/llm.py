"""Attention evidence inside the language model, from one decoder layer's own norm, projections and rotary embedding.

The layer itself runs later, with whatever fused attention it has; here only the rows asked for are computed, over the
whole causal row: padding masked, keys of earlier turns included.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vistok.core.attention import attention_marginals, attention_pagerank, attention_rows
from vistok.host.pictures import Group
from vistok.host.reducer import LayerNeed
from vistok.host.text import question_of

Rotary = tuple[Tensor, Tensor]


def rotated(x: Tensor, attention: Any, rotary: Rotary) -> Tensor:
    """Queries or keys (B, H, T, d) after the model's own ``apply_rotary_pos_emb``."""
    rotate: Callable[..., Any] = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    if "x" in inspect.signature(rotate).parameters:  # one at a time (Gemma 4)
        return rotate(x, *rotary)
    return rotate(x, x, *rotary)[0]


def _heads(x: Tensor, attention: Any, norm: str) -> Tensor:
    """(B, T, H * d) to (B, H, T, d), normed where the layer norms its queries or keys."""
    module = getattr(attention, norm, None)
    if module is not None and module.weight.shape[-1] != attention.head_dim:  # over all heads at once (OLMo)
        x, module = module(x), None
    x = x.unflatten(-1, (-1, attention.head_dim))
    return (x if module is None else module(x)).transpose(1, 2)


class LayerView:
    """One decoder layer's queries and keys for the hidden states that are about to enter it."""

    def __init__(
        self,
        layer: Any,
        hidden: Tensor,
        real: Tensor,
        given: Mapping[str, Any],
        past: tuple[Tensor, Tensor] | None,
        own_mask: bool = False,
    ) -> None:
        """``hidden`` (B, T, D) and ``real`` (B, T) bool, False at padding; ``given``: the layer's keyword arguments;
        ``past``: keys (B, Hk, P, d) of earlier turns and which of them are real (B, P); ``own_mask``: the layer sees
        what its mask (B, 1, T, P + T) says, not what comes before."""
        self.attention = layer.self_attn
        self.rotary: Rotary = given["position_embeddings"]
        self.normed = layer.input_layernorm(hidden)
        self.new_real = real
        self.past = 0 if past is None else past[0].shape[2]
        if getattr(self.attention, "is_kv_shared_layer", False):  # an earlier layer's keys, past and new (Gemma 4)
            self.keys: Tensor = given["shared_kv_states"][self.attention.layer_type][0]
            self.new_keys = self.keys[:, :, self.past :]
        else:
            keys = _heads(self.attention.k_proj(self.normed), self.attention, "k_norm")
            self.new_keys = rotated(keys, self.attention, self.rotary)
            self.keys = self.new_keys if past is None else torch.cat([past[0], self.new_keys], 2)
        self.real = real if past is None else torch.cat([past[1], real], 1)
        self.allowed: Tensor | None = None
        if own_mask:
            mask: Tensor = given["attention_mask"][:, 0]
            self.allowed = (mask if mask.dtype == torch.bool else mask == 0) & self.real[:, None]
        self._importance: dict[tuple[float, int], Tensor] = {}

    def _queries(self, rows: Tensor, columns: Tensor) -> Tensor:
        """(G, H, Q, d) queries at ``columns`` (G, Q) of ``rows`` (G,)."""
        at = (rows[:, None], columns)
        q = self.attention.q_proj(self.normed[at])
        if q.shape[-1] == 2 * self.attention.o_proj.in_features:  # each head's query and, behind it, its gate (Qwen3.5)
            q = q.unflatten(-1, (-1, 2, self.attention.head_dim))[..., 0, :].flatten(-2)
        q = _heads(q, self.attention, "q_norm")
        cos, sin = (t.expand(len(self.normed), -1, -1)[at] for t in self.rotary)
        return rotated(q, self.attention, (cos, sin))

    def inputs(self, rows: Tensor, columns: Tensor) -> dict[str, Any]:
        """What ``attention_rows`` takes for the queries at ``columns`` (G, Q) of ``rows`` (G,)."""
        inputs = {"q": self._queries(rows, columns), "k": self.keys[rows], "scale": self.attention.scaling}
        if self.allowed is not None:
            return inputs | {"mask": self.allowed[rows[:, None], columns][:, None]}
        return inputs | {"mask": self.real[rows][:, None, None], "places": columns + self.past}

    def importance(self, temperature: float, iterations: int) -> Tensor:
        """(B, H, T): PageRank of the sequence, padding 0. Earlier turns are left out: the cache holds no queries."""
        how = temperature, iterations
        if how not in self._importance:  # the same for all pictures of the prompt
            rows, columns = (torch.arange(n, device=self.new_keys.device) for n in self.new_real.shape)
            self._importance[how] = attention_pagerank(
                self._queries(rows, columns.expand(len(rows), -1)),
                self.new_keys,
                temperature,
                iterations,
                self.attention.scaling,
                mask=self.new_real,
                allowed=None if self.allowed is None else self.allowed[:, :, self.past :],
            )
        return self._importance[how]

    def fields(
        self, needs: Mapping[str, LayerNeed], group: Group, now_at: Tensor, words: Tensor | None
    ) -> dict[str, Any]:
        """The fields ``needs`` of the evidence of ``group``. ``now_at`` (B, T) is the current column of each column of
        the prompt, ``words`` (B, T) bool where the prompt is text."""
        rows, out = group.rows, {}
        visual = now_at[rows].gather(1, group.columns)
        if "llm_keys" in needs:
            at = visual[:, :, None].expand(-1, -1, self.new_keys.shape[-1])
            out["llm_keys"] = self.new_keys.mean(1)[rows].gather(1, at)
        if "llm_received" in needs:
            received = attention_marginals(**self.inputs(rows, visual))[0]
            out["llm_received"] = received.gather(1, visual + self.past)
        how = needs.get("llm_importance")
        if isinstance(how, tuple):
            rank = self.importance(*how)[rows]
            out["llm_importance"] = rank.gather(2, visual[:, None].expand(-1, rank.shape[1], -1))
        if "llm_attention" in needs:
            if needs["llm_attention"] == "text" and words is not None:
                queries = now_at[rows].gather(1, question_of(group, words)[0]).clamp(min=0)
            elif needs["llm_attention"] == "visual":
                queries = visual
            else:
                real = self.new_real[rows]
                queries = real.shape[1] - 1 - real.flip(1).int().argmax(1, keepdim=True)
            weights = attention_rows(**self.inputs(rows, queries))
            at = (visual + self.past)[:, None, None].expand(*weights.shape[:3], -1)
            out["llm_attention"] = weights.gather(3, at)
        return out
