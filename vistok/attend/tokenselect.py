"""TokenSelect: each layer reads a few tokens of its KV cache, chosen anew for every chunk of queries, moved together.

A prompt is read in chunks of queries, and then token by token. Of each chunk a layer reads the first tokens of the
conversation, the last ones (among them the chunk) and, of those between, the ``k`` that get most votes: each head votes
by a softmax of its products with the chunk's mean query. What is read is moved together, the n-th token read at
position n, so that positions never exceed the budget and a context may be longer than the model was trained on. A chunk
whose mean query resembles the one that chose last, in the same layer, reads that choice again. While the budget holds
all tokens, attention is the model's own.

Source: Wu et al., arXiv 2411.02886, pzs19/TokenSelect. Where: the KV cache read of every layer, prefill and decoding;
no weights. Departures: the cache is the model's own, its keys turned by their old positions; they are turned back to
score and on to their new ones to be read, which costs a pass over the keys that a cache of unturned ones saves, and
leaves a cache that goes on working elsewhere. Batches, one choice a row. Where positions have several axes (mRoPE),
gaps between what is read are closed over all axes together. Keys are gathered and attended to by SDPA, not by paged
kernels; the smoothing of votes by pooling, an option of the code, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention

from vistok.attend._recall import Recall, recall_model
from vistok.catalogue.card import AttendTrial, Card, Outcome
from vistok.core.position import recompact_positions
from vistok.core.ragged import positions as places_of
from vistok.core.select import topk
from vistok.core.tensors import upcast
from vistok.host.attention import AttentionCall, AttentionMethod
from vistok.host.rows import take, take_keys

CARD = Card(
    title="TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic Token-Level KV "
    "Cache Selection",
    kind="training-free",
    site="KV cache read of every layer of a language model, prefill in chunks and decoding",
    paper="Wu et al., 2024, arXiv 2411.02886",
    repository="pzs19/TokenSelect",
    needs=("queries and keys of every layer", "positions of the tokens"),
    mechanism=("attention",),
    score="sum over heads of the softmax of products with the mean query of a chunk",
    select="top-k for all heads of a layer, with the first and the last tokens",
    claim="At an equal budget, selected tokens find what a window of the first and last tokens has lost.",
    departures=(
        "query heads score the key head that they attend to; parity='authors' takes head h modulo the key heads",
        "the choice of a similar query is read again, as in the paper; the released code chooses every time, "
        "parity='authors' too",
        "keys in the cache are turned by their positions and turned back, so that the cache stays the model's own",
    ),
)


Vote = Literal["softmax_sum", "sum", "max"]


def token_votes(
    query: Tensor, keys: Tensor, candidates: Tensor, vote: Vote = "softmax_sum", modulo: bool = False
) -> Tensor:
    """(B, N): what the heads of ``query`` (B, H, d) give each of the unturned ``keys`` (B, Hk, N, d).

    "softmax_sum" adds up softmaxes over ``candidates`` (B, N) bool, so that a head gives 1 in all; "sum" and "max" are
    over the products, which are not scaled. ``modulo``: query head h scores key head h % Hk, not h // (H / Hk).
    """
    b, h, d = query.shape
    heads = keys.shape[1]
    split = query.view(b, h // heads, heads, d).transpose(1, 2) if modulo else query.view(b, heads, h // heads, d)
    products = (upcast(split) @ upcast(keys).transpose(2, 3)).flatten(1, 2)
    if vote != "softmax_sum":
        return products.sum(1) if vote == "sum" else products.amax(1)
    hidden = ~candidates & candidates.any(1, keepdim=True)  # a row without any is not read by its votes
    return products.masked_fill(hidden[:, None], -torch.inf).softmax(2).sum(1)


def token_select(
    query: Tensor,
    keys: Tensor,
    n_init: int,
    n_local: int,
    k: int,
    vote: Vote = "softmax_sum",
    modulo: bool = False,
    seen: Tensor | None = None,
) -> Tensor:
    """(B, k) int64, best first: what ``query`` chooses between the first ``n_init`` and the last ``n_local`` of the
    ``seen`` (B,; all) first of ``keys``; any of a row that has not so many. Other arguments as of ``token_votes``."""
    n = keys.shape[2]
    seen = torch.full((len(keys),), n, device=keys.device) if seen is None else seen
    at = torch.arange(n, device=keys.device)
    candidates = (at >= n_init) & (at < seen[:, None] - n_local)
    votes = token_votes(query, keys, candidates, vote, modulo)
    return topk(votes, k, candidates | (candidates.sum(1, keepdim=True) < k))


def reading_list(picks: Tensor, seen: Tensor, n_init: int, n_local: int) -> Tensor:
    """(B, m) int64 ascending, -1 behind them: the first ``n_init`` tokens, ``picks`` (B, k) and the last ``n_local`` of
    the ``seen`` (B,) tokens of each row; all of a row that has no more than fit."""
    n = int(seen.max())
    at = torch.arange(n, device=seen.device)
    ends = (at < n_init) | (at >= seen[:, None] - n_local)
    few = (seen <= n_init + picks.shape[1] + n_local)[:, None]
    index, there = places_of((ends.scatter(1, picks.clamp_max(n - 1), True) | few) & (at < seen[:, None]))
    return index.masked_fill(~there, -1)


@dataclass(frozen=True)
class TokenSelect(AttentionMethod):
    """For ``vistok.apply``, in any language model with RoPE."""

    n_init: int = 128
    """First tokens, always read."""
    n_local: int = 512
    """Last tokens, always read; at least the chunk."""
    k: int = 2048
    """Tokens read of those between; 0 for the first and the last alone."""
    chunk: int = 512
    """Queries of a prompt that read the same tokens."""
    similarity: float = 0.9
    """Cosine of the mean query with that of the last choice, from which on it is read again; above 1 never."""
    vote: Literal["softmax_sum", "sum", "max"] = "softmax_sum"
    """How the heads of a layer agree."""
    parity: Literal["paper", "authors"] = "paper"
    """"authors": query head h scores key head h modulo their number, and every chunk chooses anew."""
    reads_positions: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, least in (("n_init", 0), ("chunk", 1), ("n_local", self.chunk), ("k", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, must be {least} or more")
        if self.vote not in ("softmax_sum", "sum", "max"):
            raise ValueError(f"vote: got {self.vote!r}, must be 'softmax_sum', 'sum' or 'max'")

    @property
    def budget(self) -> int:
        """Tokens that a query reads."""
        return self.n_init + self.k + self.n_local

    def attend(self, call: AttentionCall) -> Tensor | None:
        if int(call.keys.max()) <= self.budget or call.positions is None:
            return None
        plain = call.turn(call.k, -call.positions)
        parts = []
        for start in range(0, call.q.shape[2], self.chunk):
            q = call.q[:, :, start : start + self.chunk]
            count = (call.queries - start).clamp(0, q.shape[2])
            before = call.keys - call.queries + (call.queries.clamp_max(start))
            parts.append(self._chunk(call, plain, q, before, count))
        return torch.cat(parts, 2)

    def _chunk(self, call: AttentionCall, plain: Tensor, q: Tensor, before: Tensor, count: Tensor) -> Tensor:
        """Attention of the queries ``q`` (B, H, w, d), of which ``count`` (B,) are real, behind ``before`` tokens."""
        assert call.positions is not None
        seen = before + count
        place = torch.arange(q.shape[2], device=q.device)
        column = (before[:, None] + place).clamp_max(call.k.shape[2] - 1)
        where = take(call.positions, column, -1)
        real = (place < count[:, None])[:, None, :, None]
        query = (upcast(call.turn(q, self.n_local + place - where)) * real).sum(2) / count.clamp_min(1)[:, None, None]
        picks = self._choose(call, query, plain, before, seen)
        read = reading_list(picks, seen, self.n_init, self.n_local)
        length = (read >= 0).sum(1)

        old = take(call.positions, read, -1)
        by = recompact_positions(call.positions, read.clamp_min(0), read >= 0) - old
        by = by.masked_fill(((read < 0) | (seen <= self.budget)[:, None]), 0)
        at = (length - count)[:, None] + place  # of each query in the list
        q = call.turn(q, take(by, at.clamp_max(read.shape[1] - 1), -1))
        k, v = call.turn(take_keys(call.k, read), by), take_keys(call.v, read)
        mask = None
        if q.shape[2] > 1 or bool((length < read.shape[1]).any()):
            mask = (torch.arange(read.shape[1], device=q.device) <= at[:, :, None])[:, None]
        grouped = q.shape[1] != k.shape[1]
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=call.scale, enable_gqa=grouped)

    def _choose(self, call: AttentionCall, query: Tensor, plain: Tensor, before: Tensor, seen: Tensor) -> Tensor:
        """(B, k): what the layer chose for a similar query, or anew; any of rows that read all."""
        flat, over = query.flatten(1), seen > self.budget
        if not bool(over.any()):
            return seen.new_zeros(len(seen), self.k)
        last = call.memory.get("last")
        again = torch.zeros_like(over)
        if last is not None and self.parity == "paper":
            known = (last["seen"] == before) & last["chose"]  # the same conversation, and a choice was made in it
            again = known & (cosine_similarity(flat, last["query"], dim=1) >= self.similarity)
        if last is not None and bool((again | ~over).all()):
            picks = last["picks"]
        else:
            keys = plain[:, :, : int(seen.max())]
            picks = token_select(
                query, keys, self.n_init, self.n_local, self.k, self.vote, self.parity == "authors", seen
            )
        if last is not None:
            picks, flat = (torch.where(again[:, None], last[n], x) for n, x in (("picks", picks), ("query", flat)))
        call.memory["last"] = {"query": flat, "picks": picks, "seen": seen, "chose": over}
        return picks


def claim(trial: AttendTrial, steps: int = 500) -> Outcome:
    """The abstract: long contexts at a small budget, and beyond the trained length. A small Llama learns to recall
    values by their keys in prompts of 80 tokens; it then reads 20 of them at a time, and 20 of prompts of 144, which it
    was not trained on. The baseline reads the first and the last tokens, as many in all."""
    task, longer = Recall(seed=trial.seed), Recall(128, seed=trial.seed)
    model = recall_model(trial, steps, task)
    system, window = (TokenSelect(4, n_local, k, chunk=1) for n_local, k in ((8, 8), (16, 0)))
    dense, old, new = (task.accuracy(model, method) for method in (None, window, system))
    beyond = [longer.accuracy(model, method) for method in (None, window, system)]
    note = f"dense {dense:.3f}; prompts of 144: dense {beyond[0]:.3f}, window {beyond[1]:.3f}, system {beyond[2]:.3f}"
    return Outcome("values recalled, 20 tokens read", old, new, new > old, note)
