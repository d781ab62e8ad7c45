"""DependencyViT: each token sends its message to others, in shares that sum to 1; a tree of parts and wholes emerges.

What: attention reversed. The softmax of token i says where its value goes, not where it looks: parents receive from
children. A selector picks, for each sender, the heads it speaks through; a controller scales its message by a gate that
only falls from layer to layer. The mean of tokens weighed by their gates is classified. Source: Ding et al., arXiv
2304.03282; the authors' repository, dingmyu/DependencyViT, holds no code, so what is here follows a third-party port,
whose parameters' names it bears. Where: every attention of a vision transformer without class token; a lighter variant
drops the tokens that send least, after the attention of some blocks.

Nothing of N x N is held: out = F^T v is attention of the keys over the queries, each query weighed by what its own
softmax sums to. Tree: a child's parent is who receives most from it; the root is the token that receives most. Our
reading, for want of code: the score of pruning is the gate (an earlier revision of the port takes what a token
receives, ``score="received"``), kept tokens stay in their order, and a tree is made by following the strongest edges,
cycles broken as by Chu-Liu and Edmonds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import gelu

from vistok.catalogue.card import AttendTrial, Card, Outcome
from vistok.core.attention import Dense, attend, attention_rows
from vistok.core.tensors import ranking, take, upcast

Score = Literal["message", "received", "random"]
CARD = Card(
    title="Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention",
    kind="trained",
    site="in place of every attention of a vision transformer without class token",
    paper="Ding et al., 2023, arXiv 2304.03282",
    repository="dingmyu/DependencyViT",
    mechanism=("attention", "transformation"),
    score="the gate of a token's message, over all layers so far",
    select="the tokens that send most (Lite)",
    claim="A network that prunes the tokens that rarely send beats one that prunes as many by chance.",
    departures=("kept tokens stay in their order",),
)


def reversed_attention(
    q: Tensor, k: Tensor, v: Tensor, selector: Tensor | None = None, message: Tensor | None = None
) -> Tensor:
    """(B, H, N, dv): what each token receives. ``q``, ``k`` (B, H, N, d), ``v`` (B, H, N, dv).

    Token i sends message[i] * selector[i, h] * softmax_j(q_i k_j) of its value to token j. ``selector`` (B, N, H) sums
    to 1 over heads; ``message`` (B, N) in 0 .. 1; None: ones. Memory O(N): two calls of ``attend``.
    """
    dense = Dense(q.shape[2], q.shape[2])
    _, sums = attend(q, k, k, dense, return_lse=True, executor="tiles")
    share = torch.ones_like(sums) if selector is None else selector.transpose(1, 2)
    share = share if message is None else share * message[:, None]
    out, received = attend(
        k, q, v * share[..., None].to(v.dtype), dense, -sums[:, :, None], return_lse=True, executor="tiles"
    )
    return out * received.exp()[..., None].to(out.dtype)  # at most N: each softmax gives 1 at most


def dependency_map(q: Tensor, k: Tensor, selector: Tensor, message: Tensor) -> Tensor:
    """(B, N, N): what parent j (row) receives from child i (column), summed over heads. Arguments as above."""
    shares = selector.transpose(1, 2)[..., None]
    return (attention_rows(q, k) * shares).sum(1).transpose(1, 2) * message[:, None]


def dependency_tree(dependency: Tensor) -> Tensor:
    """(B, N) int64: the parent of each token, -1 at the root, of maps (B, N, N) as ``dependency_map`` gives.

    The tree with the largest sum of edges among those whose root is the token that receives most from others, ties to
    the lower index (Chu and Liu 1965, Edmonds 1967). For up to a few hundred tokens.
    """
    found = []
    for edges in upcast(dependency.detach()).double().cpu():
        edges = edges.clone().fill_diagonal_(0)
        root = int(edges.sum(1).argmax())
        found.append(_arborescence(edges.numpy(), root))
    return torch.tensor(found, dtype=torch.int64, device=dependency.device)


def _arborescence(edges: NDArray[np.float64], root: int) -> list[int]:
    """Parents of the best tree; ``edges`` (N, N) by parent and child. Cycles are contracted to one node and undone."""
    n = len(edges)
    edges = edges.copy()
    np.fill_diagonal(edges, -np.inf)
    parent = edges.argmax(0)
    parent[root] = -1
    cycle = _cycle(parent)
    if not cycle:
        return [int(p) for p in parent]
    rest = [i for i in range(n) if i not in cycle]
    gain = edges[np.ix_(rest, cycle)] - edges[parent[cycle], cycle]  # of entering the cycle at a node
    enters, leaves = gain.argmax(1), edges[np.ix_(cycle, rest)].argmax(0)
    small = np.full((len(rest) + 1,) * 2, -np.inf)
    small[:-1, :-1] = edges[np.ix_(rest, rest)]
    small[:-1, -1], small[-1, :-1] = gain.max(1), edges[np.ix_(cycle, rest)].max(0)
    inner = _arborescence(small, rest.index(root))
    for i, node in enumerate(rest):
        above = inner[i]
        parent[node] = -1 if above < 0 else cycle[leaves[i]] if above == len(rest) else rest[above]
    parent[cycle[enters[inner[-1]]]] = rest[inner[-1]]
    return [int(p) for p in parent]


def _cycle(parent: NDArray[np.int64]) -> list[int]:
    """The nodes of one cycle of a graph of parents, or none."""
    done = set[int]()
    for start in range(len(parent)):
        path: list[int] = []
        node = start
        while node >= 0 and node not in done and node not in path:
            path.append(node)
            node = int(parent[node])
        if node in path:
            return path[path.index(node) :]
        done.update(path)
    return []


class MessageController(nn.Module):
    """The gate of each token's message in one layer: (B, N, dim) to (B, N) in 0 .. 1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, dim // 2, bias=False), nn.Linear(dim // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))[..., 0].sigmoid()


class ReversedAttention(nn.Module):
    """(B, N, dim) and the messages so far (B, N) to what each token receives, and the messages after this layer."""

    def __init__(self, dim: int, heads: int, temperature: float = 0.1) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads: got {heads}, must divide dim, {dim}")
        self.heads, self.temperature = heads, temperature
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.head_selector = nn.Linear(dim, heads, bias=False)
        self.message_controller = MessageController(dim)

    def parts(self, x: Tensor, message: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k and v (B, heads, N, d), the selector (B, N, heads) and the messages (B, N)."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        selector = (self.head_selector(x) / self.temperature).softmax(2)
        return q, k, v, selector, message * self.message_controller(x)

    def forward(self, x: Tensor, message: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, selector, message = self.parts(x, message)
        out = reversed_attention(q, k, v, selector, message)
        return self.proj(out.transpose(1, 2).flatten(2)), message

    def received(self, x: Tensor, message: Tensor) -> Tensor:
        """(B, N): the sum of what each token receives, over heads and children; ``message`` as in ``forward``."""
        q, k, v, selector, message = self.parts(x, message)
        return reversed_attention(q, k, torch.ones_like(v), selector, message)[..., 0].sum(1)


class DependencyBlock(nn.Module):
    """Reversed attention and MLP. ``keep``: the share of its tokens that stay after attention, by ``score``."""

    def __init__(
        self, dim: int, heads: int, mlp_ratio: float = 4.0, keep: float = 1.0, score: Score = "message"
    ) -> None:
        super().__init__()
        self.keep, self.score = keep, score
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = ReversedAttention(dim, heads)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor, message: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, n, dim) and messages (B, n) after the block, and which of its tokens stayed, (B, n) ascending."""
        normed = self.norm1(x)
        out, after = self.attn(normed, message)
        x = x + out
        keep = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        if self.keep < 1:
            keep = self.choose(normed, message, after)
            x, after = take(x, keep), take(after, keep)
        return x + self.mlp(self.norm2(x)), after, keep

    def choose(self, normed: Tensor, message: Tensor, after: Tensor) -> Tensor:
        """(B, floor(keep * N)) int64 ascending: the tokens with the best score, ties to the lower index."""
        n = normed.shape[1]
        count = math.floor(self.keep * n + 1e-9)
        if self.score == "random":
            score = torch.rand(after.shape, device=after.device)
        elif self.score == "received":
            score = self.attn.received(normed, message)
        elif self.score == "message":
            score = after
        else:
            raise ValueError(f"score: got {self.score!r}, must be 'message', 'received' or 'random'")
        return ranking(score.detach())[:, :count].sort(1).values


class DependencyNet(nn.Module):
    """Pictures (B, channels, size, size) to logits; with ``features_only`` to a list of the last map (B, dim, h, w)."""

    def __init__(
        self,
        size: int,
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        keeps: dict[int, float],
        score: Score = "message",
        channels: int = 3,
        num_classes: int = 1000,
        features_only: bool = False,
    ) -> None:
        super().__init__()
        if size % patch:
            raise ValueError(f"patch: got {patch}, must divide the side of a picture, {size}")
        if features_only and keeps:
            raise ValueError("features_only: got True with pruning, which leaves no map; must be without")
        self.grid, self.features_only = (size // patch, size // patch), features_only
        self.patch_embed = nn.Conv2d(channels, dim, patch, patch)
        self.pos_embed = nn.Parameter(torch.empty(1, (size // patch) ** 2, dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList(DependencyBlock(dim, heads) for _ in range(depth))
        self.prune(keeps, score)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Identity() if features_only else nn.Linear(dim, num_classes)

    def prune(self, keeps: dict[int, float], score: Score = "message") -> None:
        """From now on keep these shares of a block's tokens, by block, and all in the others."""
        for i, block in enumerate(self.blocks):
            assert isinstance(block, DependencyBlock)
            block.keep, block.score = keeps.get(i, 1.0), score

    def forward_features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, n, dim) weighed by their messages, these (B, n), and which tokens they are, (B, n) int64."""
        x = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed
        message = x.new_ones(x.shape[:2])
        places = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        for block in self.blocks:
            x, message, keep = block(x, message)
            places = places.gather(1, keep)
        return self.norm(x) * message[..., None], message, places

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        tokens, _, _ = self.forward_features(x)
        return [tokens.transpose(1, 2).unflatten(2, self.grid)] if self.features_only else self.head(tokens.mean(1))


WIDTHS = {"tiny": 192, "small": 384}


@dataclass(frozen=True)
class DependencyViT:
    """The backbone, of 12 blocks with 12 heads."""

    size: str = "tiny"
    """tiny (192 channels) or small (384)."""
    prune: float = 0.0
    """Share of the first tokens that each pruning block drops; 0.16 in the Lite variant."""
    prune_at: tuple[int, ...] = (1, 4, 7, 10)
    """Blocks that prune, counted from 0."""
    score: Literal["message", "received", "random"] = "message"
    """Whose tokens stay: who sends most, who receives most, or by chance."""

    def build(self, num_classes: int = 1000, features_only: bool = False, image: int = 224, patch: int = 16) -> Any:
        """An untrained network for pictures of ``image`` pixels a side."""
        if self.size not in WIDTHS:
            raise ValueError(f"size: got {self.size!r}, must be {', '.join(WIDTHS)}")
        shape = (image, patch, WIDTHS[self.size], 12, 12)
        return DependencyNet(*shape, self.keeps(), self.score, 3, num_classes, features_only)

    def keeps(self) -> dict[int, float]:
        """By block, the share of its tokens that stay."""
        if not 0 <= self.prune * len(self.prune_at) < 1:
            raise ValueError(f"prune: got {self.prune}, must leave tokens after {len(self.prune_at)} blocks")
        left = [1 - i * self.prune for i in range(len(self.prune_at) + 1)]
        return {block: left[i + 1] / left[i] for i, block in enumerate(self.prune_at)} if self.prune else {}


def claim(trial: AttendTrial, steps: int = 200, draws: int = 8) -> Outcome:
    """The abstract: a lightweight model that prunes the leaves of the tree. Small networks learn digits with two thirds
    of their tokens dropped, by their messages or by chance. Holds where the first does better than each draw of the
    second.
    """
    keeps, found = DependencyViT(prune=0.32, prune_at=(0, 1)).keeps(), []
    ways: list[tuple[Score, dict[int, float], int]] = [
        ("message", {}, 1),
        ("message", keeps, 1),
        ("random", keeps, draws),
    ]
    for score, shares, times in ways:
        torch.manual_seed(trial.seed)
        net = DependencyNet(8, 2, 48, 3, 3, shares, score, channels=1, num_classes=10)
        trial.fit(net, steps)
        found.append([trial.accuracy(net) for _ in range(times)])
    (whole,), (sends,), chance = found
    left = net.forward_features(trial.draw(torch.Generator().manual_seed(0), 1)[0])[2].shape[1]
    told = f"with all {whole:.1%}, the best of {draws} draws {max(chance):.1%}"
    note = f"{left} of 16 tokens left; {told}; {steps} steps each, one seed"
    return Outcome("accuracy pruned, against chance", sum(chance) / draws, sends, sends > max(chance), note)
