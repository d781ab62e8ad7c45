"""Token sparse attention: while a prompt is read, each head leaves tokens out of one attention call, not of the cache.

In each of the chosen layers the last queries of the prompt say how much each token before them matters, head by head,
smoothed along the sequence. As many tokens are dropped as sum, least first and heads averaged, to less than
``coverage``; which ones each head says itself. Attention among what is left, in order, is causal still, and the output
is put back: a row that a head dropped gets nothing from it, and the residual carries the token on. All keys and values
stay in the cache, the next layer chooses anew, and decoding is dense.

Source: Jo et al., arXiv 2602.03216, dongwonjo/Token-Sparse-Attention. Where: after RoPE, positions stay; the prompt
alone, not later turns. The layers are those in which hidden states change least (``layer_drifts`` in
``vistok.host.attention``, ``select_layers`` here), by default the second half. Departures: batches, each row with a
number of its own; ties go to the lower index. As released, one token more than the coverage allows is dropped once any
is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, scaled_dot_product_attention

from vistok.attend._recall import Recall, recall_model
from vistok.catalogue.card import AttendTrial, Card, Outcome
from vistok.core.attention import attention_rows
from vistok.core.ragged import positions as places_of
from vistok.core.ragged import top_mask
from vistok.host.attention import AttentionCall, AttentionMethod

CARD = Card(
    title="Token Sparse Attention: Efficient Long-Context Inference with Interleaved Token Selection",
    kind="training-free",
    site="attention of chosen layers of a language model while a prompt is read, each head by itself",
    paper="Jo et al., 2026, arXiv 2602.03216",
    repository="dongwonjo/Token-Sparse-Attention",
    needs=("queries and keys of the chosen layers",),
    mechanism=("attention",),
    score="attention of the last queries, mean over them, smoothed along the sequence",
    allocate="as many tokens as hold all but a share of the scores",
    select="top-k of each head, and the last tokens",
    claim="Answers stay within a point of dense attention, and beat those with as many tokens left out at random.",
    departures=("rows of a batch have numbers of tokens of their own",),
)

Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(q, k, v (B, H, N, d), scale) -> (B, H, N, dv), causal."""


def causal_sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Fused causal attention."""
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def window_scores(q: Tensor, k: Tensor, window: int, lengths: Tensor, scale: float) -> Tensor:
    """(B, H, N): softmax attention of the last ``window`` queries of each row, mean over them; 0 at these themselves.

    ``q`` (B, H, N, d), ``k`` (B, Hk, N, d), of which ``lengths`` (B,) are real.
    """
    b, h, n, d = q.shape
    at = (lengths[:, None] - window + torch.arange(window, device=q.device)).clamp_min(0)
    last = q.gather(2, at[:, None, :, None].expand(b, h, -1, d))
    scores = attention_rows(last, k, scale, places=at).mean(2)
    return scores * (torch.arange(n, device=q.device) < lengths[:, None] - window)[:, None]


def kept_tokens(
    scores: Tensor, lengths: Tensor, window: int, kernel: int, coverage: float, min_tokens: int
) -> tuple[Tensor, Tensor]:
    """(B, H, N) bool, the tokens that each head keeps, the last ``window`` among them; and (B,), how many are dropped.

    ``scores`` (B, H, N) as from ``window_scores``; ``lengths`` (B,).
    """
    b, h, n = scores.shape
    at = torch.arange(n, device=scores.device)
    before = at < lengths[:, None] - window
    smooth = avg_pool1d(scores, kernel, 1, kernel // 2) * before[:, None]
    shares = smooth.mean(1)
    shares = shares / shares.sum(1, keepdim=True).clamp_min(torch.finfo(shares.dtype).tiny)
    rising = shares.masked_fill(~before, torch.inf).sort(dim=1).values.cumsum(1)
    dropped = (rising < coverage).sum(1)
    dropped = dropped + (dropped > 0)
    room = lengths - window
    keep = torch.where(dropped > 0, torch.maximum(room - dropped, room.clamp(0, min_tokens)), room.clamp_min(0))
    by_head = (smooth.flatten(0, 1), keep.repeat_interleave(h), before.repeat_interleave(h, 0))
    kept = top_mask(*by_head).view(b, h, n) | (~before & (at < lengths[:, None]))[:, None]
    return kept, room.clamp_min(0) - keep


def token_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int = 128,
    kernel: int = 7,
    coverage: float = 0.005,
    min_tokens: int = 1024,
    attn: Attention = causal_sdpa,
    lengths: Tensor | None = None,
    scale: float | None = None,
    scores: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """(B, H, N, dv), causal attention of each head among its own tokens, 0 at the others; and these, (B, H, K) int64
    ascending, with -1 behind those of rows that have fewer. None where no row drops any.

    ``q`` (B, H, N, d), ``k``, ``v`` (B, Hk, N, d) of a prompt, RoPE applied, of which the first ``lengths`` (B,; all)
    of each row are real. ``attn``: any causal attention, here over K tokens. ``scores``: others than
    ``window_scores``. The rest as of the system.
    """
    b, h, n, d = q.shape
    lengths = torch.full((b,), n, device=q.device) if lengths is None else lengths
    if coverage <= 0 or int(lengths.max()) <= min_tokens + window:
        return None
    scale = d**-0.5 if scale is None else scale
    scores = window_scores(q, k, window, lengths, scale) if scores is None else scores
    kept, dropped = kept_tokens(scores, lengths, window, kernel, coverage, min_tokens)
    if not bool(dropped.any()):
        return None
    index, there = (t.view(b, h, -1) for t in places_of(kept.flatten(0, 1)))
    heads, rows = torch.arange(h, device=q.device)[:, None], torch.arange(b, device=q.device)[:, None, None]
    shared = heads // (h // k.shape[1])
    # What fills up shorter rows stands behind their tokens, so that none of these sees it.
    found = attn(q[rows, heads, index], k[rows, shared, index], v[rows, shared, index], scale)
    out = found.new_zeros(b, h, n, v.shape[3])
    out[rows, heads, index] = found * there[..., None]
    return out, index.masked_fill(~there, -1)


def select_layers(drifts: Tensor, delta: float = 0.5) -> tuple[int, ...]:
    """The layers whose drift (layers,) is at most the ``delta``-quantile of all: there a zero row does least harm."""
    return tuple(int(i) for i in (drifts <= drifts.quantile(delta)).nonzero()[:, 0])


@dataclass(frozen=True)
class TokenSparseAttention(AttentionMethod):
    """For ``vistok.apply``, in any language model."""

    window: int = 128
    """Last tokens of the prompt, whose queries score and which all heads keep."""
    kernel: int = 7
    """Tokens that a score is averaged over; odd."""
    coverage: float = 0.005
    """Share of the scores that may be dropped; 0: none."""
    min_tokens: int = 1024
    """Tokens before the window that are always kept."""
    layers: tuple[int, ...] | None = None
    """Layers that it acts in, as from select_layers; None: the second half."""

    def __post_init__(self) -> None:
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0 or self.min_tokens < 0:
            got = f"{self.window}, {self.kernel} and {self.min_tokens}"
            raise ValueError(f"window, kernel, min_tokens: got {got}, must be 1 or more, odd, and 0 or more")
        if not 0 <= self.coverage < 1:
            raise ValueError(f"coverage: got {self.coverage}, must be in [0, 1)")

    def attend(self, call: AttentionCall) -> Tensor | None:
        layers = tuple(range(call.num_layers // 2, call.num_layers)) if self.layers is None else self.layers
        if layers and not 0 <= min(layers) <= max(layers) < call.num_layers:
            raise ValueError(f"layers: got {layers}, must be within the {call.num_layers} layers of the model")
        whole_prompt = call.q.shape[2] == call.k.shape[2] > 1 and torch.equal(call.keys, call.queries)
        if call.layer not in layers or not whole_prompt:
            return None
        how: dict[str, Any] = {n: getattr(self, n) for n in ("window", "kernel", "coverage", "min_tokens")}
        scores = self.scores(call)
        found = token_sparse_attention(
            call.q, call.k, call.v, **how, lengths=call.keys, scale=call.scale, scores=scores
        )
        return None if found is None else found[0]

    def scores(self, call: AttentionCall) -> Tensor | None:
        """Others than those of the last queries."""
        return None


@dataclass(frozen=True)
class _AtRandom(TokenSparseAttention):
    """Drops as many tokens before the window, but any: what the claim is held against. Not smoothed."""

    dropped: list[float] = field(default_factory=list, compare=False)
    """Shares of the rows."""

    def scores(self, call: AttentionCall) -> Tensor:
        scores = window_scores(call.q, call.k, self.window, call.keys, call.scale)
        length = int(call.keys.min()) - self.window  # mixed alike in all heads, so that as many can go
        mixed = torch.randperm(length, generator=torch.Generator().manual_seed(call.layer))
        return torch.cat([scores[..., mixed], scores[..., length:]], 2)

    def attend(self, call: AttentionCall) -> Tensor | None:
        out = super().attend(call)
        if out is not None:
            self.dropped.append((out == 0).all(3).float().mean().item())
        return out


def claim(trial: AttendTrial, steps: int = 500) -> Outcome:
    """The abstract: less than a point lost. A small Llama learns to recall values by their keys in prompts of 80
    tokens, of which the last 16 ask; its two layers (it recalls in the first) then drop what holds less than a fifth
    of their attention. The baseline drops as many at random."""
    task = Recall(seed=trial.seed)
    model = recall_model(trial, steps, task)
    how: dict[str, Any] = dict(window=16, kernel=1, coverage=0.2, min_tokens=8, layers=(0, 1))
    at_random = _AtRandom(**how)
    dense, old, new = (task.accuracy(model, method) for method in (None, at_random, TokenSparseAttention(**how)))
    share = sum(at_random.dropped) / max(1, len(at_random.dropped))
    note = f"dense {dense:.3f}; {share:.0%} of the tokens dropped"
    return Outcome("values recalled", old, new, new > old and new >= dense - 0.01, note)
