"""LLSA: log-linear sparse attention, which finds each block's keys down a pyramid and sees the rest in coarser tokens.

What: means of ``block`` tokens, of as many means, and so on, are a pyramid of queries, keys and values. At its top each
query picks the ``topk`` best keys; a level below only the children of those its parent picked are candidates, down to
blocks of tokens. One softmax then runs over the tokens of the picked blocks, over each level's candidates, and over the
whole top, where a mean of n tokens counts n times. With as many levels as N asks for (``levels=0``) choosing and
attending take O(N log N). Source: Zhou et al., arXiv 2512.16615, SingleZombie/LLSA. Where: in place of self-attention
in a pixel-space diffusion transformer; tokens in Z-order, so that a block is a square. Trained, from a dense model.

A region may count twice, fine and coarse, as published. Indices carry no gradient, the means do. The released gradient
of one level lacks the weight of the means in those of keys and values (``parity="authors"``). In the released two-level
kernel the means of the second level are missing at some lengths and it gives NaN at others; not here. Keys are gathered
group by group, so that there is no map and no mask of blocks, in the backward pass either. Any N that ``block`` to the
power of levels divides; means are summed in float32. Left out: the Triton kernels.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from vistok.catalogue.card import AttendTrial, Card, Outcome
from vistok.core.attention import BlockMask, Dense, attend, merge_lse
from vistok.core.attention.blocks import block_mean, random_blocks, similar_blocks
from vistok.core.attention.curves import z_order
from vistok.core.tensors import ranking, take
from vistok.parts.mixed_attention import Mix, MixedAttention, dense, digit_pictures, learn_digits, mixing, velocity_loss

Parity = Literal["paper", "authors"]
CARD = Card(
    title="Trainable Log-linear Sparse Attention for Efficient Diffusion Transformers",
    kind="trained",
    site="in place of self-attention, on pictures with many tokens",
    paper="Zhou et al., 2025, arXiv 2512.16615",
    repository="SingleZombie/LLSA",
    mechanism=("similarity",),
    score="product of the mean query and the mean key, level by level",
    select="the k best children of what the parent picked",
    merge="means of tokens in the same softmax, each with the weight of its tokens",
    claim="After fine-tuning, a log-linear pyramid is better than plain top-k that sees as many keys.",
    departures=("the gradient of the means has their weight", "lengths need not be powers of two"),
)


@dataclass(frozen=True)
class Count:
    """Products of a query and a key, of one head."""

    selection: int
    """Of means, to choose."""
    keys: int
    """That each query attends to."""
    attention: int
    """That all queries attend to."""

    @property
    def total(self) -> int:
        return self.selection + self.attention


def count(n: int, block: int = 16, topk: int = 8, levels: int = 2) -> Count:
    """For ``n`` tokens."""
    levels = levels or levels_for(n, block, topk)
    top = n // block**levels
    selection = top * top + sum(n // block**level * topk * block for level in range(1, levels))
    keys = levels * topk * block + top
    return Count(selection, keys, n * keys)


def levels_for(n: int, block: int = 16, topk: int = 8) -> int:
    """The fewest levels whose top has at most ``topk * block`` tokens, as many as a step below: N log N in all."""
    levels = 1
    while n // block**levels > topk * block and n % block ** (levels + 1) == 0:
        levels += 1
    return levels


def select(q: Tensor, k: Tensor, block: int, topk: int, levels: int) -> list[Tensor]:
    """What the queries of each level pick, from level 1 up: (B, H, N / block^l, topk) int64, of the keys of that level.

    ``q``, ``k`` (B, H, N, d). In rising order; ties go to the lower. No gradient.
    """
    means = _pyramid(q.detach(), block, levels), _pyramid(k.detach(), block, levels)
    picked: list[Tensor] = []
    for queries, keys in zip(*(reversed(x) for x in means), strict=True):
        b, h, n, d = queries.shape
        if not picked:
            candidates = torch.arange(n, device=q.device).expand(b, h, 1, n)
        else:
            candidates = _children(picked[-1], block)
        groups = candidates.shape[2]
        near = _gathered(keys, candidates)
        scores = queries.reshape(b * h, groups, n // groups, d) @ near.transpose(2, 3)
        best = ranking(scores.flatten(0, 2))[:, :topk].reshape(b, h, groups, -1)
        picked.append(candidates.gather(3, best).view(b, h, n, topk).sort(3).values)
    return picked[::-1]


def llsa(
    q: Tensor, k: Tensor, v: Tensor, block: int = 16, topk: int = 8, levels: int = 2, parity: Parity = "paper"
) -> Tensor:
    """(B, H, N, dv): attention of ``q``, ``k`` (B, H, N, d), ``v`` (B, H, N, dv), tokens in Z-order; d ** -0.5 scales.

    Raises ValueError if block ** levels does not divide N, or the top has fewer than ``topk`` tokens.
    """
    if q.dim() != 4 or q.shape != k.shape or v.shape[:3] != k.shape[:3]:
        got = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        raise ValueError(f"q, k, v: got {got}, must be (B, H, N, d) each")
    n = q.shape[2]
    levels = levels or levels_for(n, block, topk)
    if n % block**levels or n // block**levels < topk:
        raise ValueError(f"q: got {n} tokens, must be divided by {block}^{levels}, and {topk} times as many at least")
    picked = select(q, k, block, topk, levels)
    keys, values = [k, *_pyramid(k, block, levels)], [v, *_pyramid(v, block, levels)]
    if parity == "authors" and levels == 1:
        keys[1], values[1] = (_lighter(x, block) for x in (keys[1], values[1]))
    outs, lses = [], []
    for level in range(levels):  # of each level, the children of what the queries above picked
        index = _children(picked[level], block)
        out, lse = _by_group(q, _gathered(keys[level], index), _gathered(values[level], index))
        outs.append(out)
        lses.append(lse + level * math.log(block))
    out, lse = attend(q, keys[-1], values[-1], Dense(n, keys[-1].shape[2]), return_lse=True, executor="tiles")
    return merge_lse([*outs, out], [*lses, lse + levels * math.log(block)])[0]


def _pyramid(x: Tensor, block: int, levels: int) -> list[Tensor]:
    """Levels 1 to ``levels`` of ``x`` (B, H, N, d)."""
    found = []
    for _ in range(levels):
        x = block_mean(x, block)
        found.append(x)
    return found


def _children(index: Tensor, block: int) -> Tensor:
    """(B, H, G, K * block): the positions one level below."""
    return (index[..., None] * block + torch.arange(block, device=index.device)).flatten(3)


def _gathered(x: Tensor, index: Tensor) -> Tensor:
    """(B * H, G, K, d): rows ``index`` (B, H, G, K) of ``x`` (B, H, N, d)."""
    return take(x.flatten(0, 1), index.flatten(0, 1).flatten(1)).unflatten(1, (index.shape[2], -1))


def _by_group(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of ``q`` (B, H, N, d), G groups of equal size, each to its own of ``keys`` (B * H, G, K, d)."""
    b, h, n, d = q.shape
    groups, seen = keys.shape[1:3]
    grouped = q.reshape(b * h, groups, n // groups, d)
    out, lse = attend(grouped, keys, values, Dense(n // groups, seen), return_lse=True, executor="tiles")
    return out.view(b, h, n, -1), lse.view(b, h, n)


def _lighter(x: Tensor, block: int) -> Tensor:
    """``x``, with a gradient ``block`` times smaller."""
    return x.detach() + (x - x.detach()) / block


class LogLinearAttention(MixedAttention):
    """Self-attention of a diffusion transformer by LLSA; parameters as ``plain_attention``'s, so that a dense model's
    fit. Tokens (B, h * w, width) of a grid (h, w) in raster order are laid out in Z-order."""

    def __init__(self, width: int, heads: int, system: LLSA) -> None:
        super().__init__(width, heads, system.mix)


@dataclass(frozen=True)
class LLSA:
    """Log-linear sparse attention."""

    block: int = 16
    """Tokens to one of the next level."""
    topk: int = 8
    """Keys that a query of each level picks."""
    levels: int = 2
    """Of the pyramid (the paper: 1 below 16,384 tokens, 2 above); 0: so many that the cost is O(N log N)."""
    parity: Literal["paper", "authors"] = "paper"
    """"authors": the released gradient of one level, in which means of keys and values lack their weight."""

    def __post_init__(self) -> None:
        if self.block < 2 or self.topk < 1 or self.levels < 0:
            got = f"{self.block}, {self.topk}, {self.levels}"
            raise ValueError(f"block, topk, levels: got {got}, must be at least 2, 1 and 0")
        if self.parity not in ("paper", "authors"):
            raise ValueError(f"parity: got {self.parity!r}, must be 'paper' or 'authors'")

    def build(self, width: int, heads: int) -> LogLinearAttention:
        """A layer, as ``DiffusionTransformer(attention=...)`` asks for."""
        return LogLinearAttention(width, heads, self)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, H, h * w, dv) of tokens in raster order."""
        order = z_order(*size)
        q, k, v = (order.permute(x) for x in (q, k, v))
        return order.unpermute(llsa(q, k, v, self.block, self.topk, self.levels, self.parity))

    def count(self, n: int) -> Count:
        """What ``n`` tokens cost."""
        return count(n, self.block, self.topk, self.levels)


def claim(trial: AttendTrial, steps: int = 120, width: int = 32, side: int = 32, held_out: int = 64) -> Outcome:
    """The abstract: quality kept, where the pyramid shows what top-k alone cannot.

    A small diffusion transformer learns digits of 32 x 32 tokens; copies with LLSA of two levels, plain top-k blocks
    and random ones, which see at least as many keys, are fine-tuned for a third of the steps. Their loss on new draws.
    """
    net = learn_digits(trial, steps, side, width)
    system = LLSA(topk=2)
    blocks = -(-system.count(side * side).keys // system.block)
    rng = torch.Generator().manual_seed(trial.seed + 1)
    mixes: dict[str, Mix | None] = {
        "dense": None,
        "llsa": system.mix,
        "plain top-k": partial(_blocks, keep=blocks, block=system.block),
        "random": partial(_blocks, keep=blocks, block=system.block, rng=rng),
    }
    losses = {name: _tuned(trial, net, mix, steps // 3, side, held_out) for name, mix in mixes.items()}
    seen = system.count(side * side).keys / side**2, blocks * system.block / side**2
    note = f"dense {losses['dense']:.4f}, random {losses['random']:.4f}; keys seen {seen[0]:.1%}, top-k {seen[1]:.1%}"
    note += f"; {steps // 3} steps of fine-tuning, one seed"
    before, after = losses["plain top-k"], losses["llsa"]
    return Outcome("loss of the velocity, against plain top-k", before, after, after < before, note)


def _blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: tuple[int, int],
    keep: int,
    block: int,
    rng: torch.Generator | None = None,
) -> Tensor:
    """Attention to ``keep`` blocks of tokens in Z-order: the best by their means, or drawn by ``rng``."""
    order, n = z_order(*size), q.shape[2]
    q, k, v = (order.permute(x) for x in (q, k, v))
    mask = similar_blocks(q, k, block, keep) if rng is None else random_blocks(q, k, block, keep, rng)
    return order.unpermute(attend(q, k, v, BlockMask(mask, n, n, (block, block)), executor="tiles"))


def _tuned(trial: AttendTrial, net: torch.nn.Module, mix: Mix | None, steps: int, side: int, held_out: int) -> float:
    """The loss of a copy of ``net`` after ``steps`` steps with ``mix`` (None: as it is), on new draws."""
    tuned = copy.deepcopy(net)
    rng = torch.Generator().manual_seed(trial.seed + 2)
    with mixing(tuned, [mix or dense] * 2):
        trial.fit(tuned, steps, loss=lambda of, rng: velocity_loss(of, digit_pictures(trial, rng, 4, side), rng))
        with torch.no_grad():
            return velocity_loss(tuned, digit_pictures(trial, rng, held_out, side), rng).item()
