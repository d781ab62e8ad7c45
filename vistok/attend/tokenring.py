"""TokenRing: attention over a sequence cut over devices, in which queries travel one way and outputs the other.

What: every rank keeps its keys and values. Its queries go round the ring; the rank that holds them computes a block,
and sends the partial output, with its log-sum-exp, straight back to their owner, who merges. Both directions of a link
work at once. Ring Attention, the baseline, passes keys and values on, one way. Three schedules: "ring" and
"bidirectional" with a run of tokens a rank, "zigzag" with one from each end, for causal masks. Source: Wang et al.,
arXiv 2412.20501, ACA-Lab-SJTU/token-ring. Where: in place of attention, exactly, under sequence parallelism.

With as many key heads as query heads a direction carries about half of what Ring Attention sends; with fewer key heads
Ring Attention sends less as soon as H (1 + 1 / d) > 2 Hk: ``cost`` says which is faster. Partial outputs go back over
links of their own (a full mesh); on a mere ring they pass all ranks between. The release cannot train with its zigzag.
Here it can: in the backward pass queries and the gradients above travel with their log-sum-exp, and the gradients of
queries come back, while those of keys and values stay. Under a causal mask queries go to earlier ranks first, and no
further than they are of use; a single rank sends nothing, where the release runs its last exchange all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vistok.catalogue.card import AttendTrial, Card, Outcome
from vistok.core.attention import Dense, attend
from vistok.parts.ring import Alone, Group, Message, Share, busiest
from vistok.parts.sharded import join, sharded_attention, split

CARD = Card(
    title="TokenRing: An Efficient Parallelism Framework for Infinite-Context LLMs via Bidirectional Communication",
    kind="training-free",
    site="in place of attention, over several devices",
    paper="Wang et al., 2024, arXiv 2412.20501",
    repository="ACA-Lab-SJTU/token-ring",
    mechanism=("transformation",),
    select="all keys: exact",
    merge="partial outputs, by log-sum-exp",
    claim="Queries one way and outputs the other load a direction less than keys and values one way do.",
    departures=("the zigzag trains", "a single rank sends nothing", "causal without a zigzag"),
)


@dataclass(frozen=True)
class Cost:
    """What the model says of one attention layer's forward pass."""

    ring: int
    """Elements that Ring Attention sends a step, one way."""
    on: int
    """Elements of the queries that TokenRing sends a step one way,"""
    back: int
    """and of partial outputs the other way."""
    ring_seconds: float
    token_seconds: float

    @property
    def better(self) -> Literal["ring", "tokenring"]:
        """The faster one; "ring" if they are alike."""
        return "tokenring" if self.token_seconds < self.ring_seconds else "ring"


def cost(
    ranks: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    bandwidth: float,
    flops: float,
    batch: int = 1,
    element_bytes: int = 2,
    causal: bool = False,
    full_mesh: bool = True,
) -> Cost:
    """The model: a step takes as long as the slower of its computing and its sending.

    ``tokens`` of the whole sequence; ``bandwidth`` of a link in bytes a second, each way; ``flops`` a second of a rank.
    ``causal``: a zigzag, half the work a step (its savings of messages are not counted). Without ``full_mesh`` what
    comes back from s ranks away loads s links. TokenRing's last outputs are sent when nothing is left to compute.
    """
    rows = batch * tokens // ranks
    ring, on, back = 2 * rows * kv_heads * head_dim, rows * heads * head_dim, rows * heads * (head_dim + 1)
    computing = 4 * rows * (tokens / ranks) * heads * head_dim / flops / (2 if causal else 1)
    each = element_bytes / bandwidth
    ring_seconds = (ranks - 1) * max(computing, ring * each) + computing
    token_seconds = 0.0
    for step in range(ranks + 1):
        sent = on if step + 1 < ranks else 0
        links = (1 if full_mesh else step - 1) if step > 1 else 0
        token_seconds += max(computing if step < ranks else 0.0, sent * each, links * back * each)
    return Cost(ring, on, back, ring_seconds, token_seconds)


@dataclass(frozen=True)
class TokenRing:
    """Exact attention under sequence parallelism."""

    schedule: Literal["ring", "bidirectional", "zigzag"] = "bidirectional"
    """"ring": keys and values go round; "bidirectional": queries do, outputs come back; "zigzag": the same, tokens from
    both ends of the sequence on each rank."""
    causal: bool = False
    """Whether a token sees only those up to itself."""

    def __post_init__(self) -> None:
        if self.schedule not in ("ring", "bidirectional", "zigzag"):
            raise ValueError(f"schedule: got {self.schedule!r}, must be 'ring', 'bidirectional' or 'zigzag'")

    def share(self, tokens: int, ranks: int) -> Share:
        """How ``tokens`` lie on ``ranks``; its ``positions`` are those of each rank's tokens.

        Raises ValueError if they do not divide, into two runs each for a zigzag.
        """
        parts = 2 * ranks if self.schedule == "zigzag" else ranks
        if tokens % parts:
            raise ValueError(f"tokens: got {tokens}, must be divided by {parts} for {ranks} ranks, {self.schedule}")
        return Share(ranks, tokens // ranks, self.schedule == "zigzag", self.causal)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, group: Any = None, scale: float | None = None) -> Tensor:
        """(B, H, n, d): this process's part of the attention of all of ``group`` (None: all processes, or only this
        one). ``q`` (B, H, n, d), ``k``, ``v`` (B, Hk, n, d): its own tokens, as ``share`` says."""
        world = Group(group)
        share = self.share(world.size * q.shape[2], world.size)
        return sharded_attention(q[None], k[None], v[None], world, share, self.schedule, scale)[0][0]

    def simulate(
        self, q: Tensor, k: Tensor, v: Tensor, ranks: int, scale: float | None = None
    ) -> tuple[Tensor, Tensor, Sequence[Message]]:
        """Attention of whole sequences, ``q`` (B, H, N, d), ``k``, ``v`` (B, Hk, N, d), by ``ranks`` in this process:
        the output, the log-sum-exp (B, H, N), and the messages; those of a backward pass are added to them."""
        world, share = Alone(ranks), self.share(q.shape[2], ranks)
        parts = [split(x, share) for x in (q, k, v)]
        out, lse = sharded_attention(parts[0], parts[1], parts[2], world, share, self.schedule, scale)
        return join(out, share), join(lse, share), world.log


def claim(trial: AttendTrial, tokens: int = 1024) -> Outcome:
    """The title: communication both ways. 8 heads on 4 ranks, counted in one process; the result must be exact too."""
    rng = torch.Generator().manual_seed(trial.seed)
    q, k, v = torch.randn(3, 1, 8, tokens, 64, generator=rng).unbind()
    plain = attend(q, k, v, Dense(tokens, tokens))
    loads, wrong = {}, 0.0
    for name in ("ring", "bidirectional"):
        for kv_heads in (8, 2):
            own = k[:, :kv_heads], v[:, :kv_heads]
            out, _, log = TokenRing(name).simulate(q, *own, 4)
            loads[name, kv_heads] = busiest(log)
            wrong = max(wrong, (out - plain).abs().max().item()) if kv_heads == 8 else wrong
    before, after = loads["ring", 8], loads["bidirectional", 8]
    note = f"with 2 key heads {loads['ring', 2]} and {loads['bidirectional', 2]}; largest error {wrong:.0e}"
    metric = "elements a step, in the busier direction"
    return Outcome(metric, float(before), float(after), after < before and wrong < 1e-5, note)
