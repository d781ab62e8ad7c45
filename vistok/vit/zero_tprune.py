"""Zero-TPrune: drop tokens that the attention graph ranks low, and those that resemble a higher one.

What: at a few blocks of a frozen ViT the attention map of each head is read as a graph and walked (PageRank: a token
matters if tokens that matter attend to it). Heads whose ranks are too even or too concentrated are left out, the others
fused by root mean square. First this rank splits the tokens into a more and a less important half, and those of the
latter whose keys are most like one of the former go (S); then the walk is repeated among what is left, and the lowest
go (I). Source: Wang et al., arXiv 2305.17328 (no code was released). Where: between attention and MLP of the chosen
blocks. The one block's map (B, H, T, T) is made; fused attention stays on.

How many tokens go by importance and how many by similarity is searched for: ``search``.

Departures and readings. A fixed number of steps, not a threshold on the change: the same graph for all pictures, which
compiles. The walk goes over all tokens, the prefix too, but only the others are ranked, filtered by and dropped. The
paper's range for a head's variance, [0.01, 0.7], is taken of ranks scaled to mean 1 (of ranks that sum to 1 no
variance gets near it); where no head is in the range all are used. Keys are compared as their mean over heads. Kept
tokens stay in raster order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from vistok.catalogue.card import Card, Outcome, ViTTrial
from vistok.core.position import rest
from vistok.core.score import pagerank
from vistok.core.select import topk
from vistok.core.tensors import check_k, ranking, take, unit
from vistok.host.keep import Keep
from vistok.host.vit import KeepRate, Stage, TokenState, ViTEvidence

CARD = Card(
    title="Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph",
    kind="training-free",
    site="between attention and MLP of chosen encoder blocks",
    paper="Wang et al., 2024, arXiv 2305.17328",
    mechanism=("attention", "similarity"),
    needs=("the block's attention map by heads", "its keys"),
    score="weighted PageRank of each head's map, root mean square over heads of middling variance",
    allocate="numbers by importance and by similarity for each block, given or searched for",
    select="less important tokens most like a more important one go, then the lowest ranks",
    claim="Loses less accuracy than pruning by attention alone, at as many tokens.",
)

Counts = Mapping[int, tuple[int, int]] | tuple[tuple[int, tuple[int, int]], ...]


@dataclass(frozen=True)
class ZeroTPrune(KeepRate):
    """Pruning by importance on the attention graph and by similarity, at several blocks."""

    keep: Keep = 0.7
    """Share of the patches that stay at each block (rounded up), or their number."""
    layers: tuple[int, ...] | None = None
    """Blocks, from 0; by default those after each quarter of the depth."""
    similar: float = 0.5
    """Share of those that go at a block which go by similarity, 0 to 1 (at most half of the block's tokens)."""
    counts: Counts | None = None
    """In place of the three: {block: (how many go by importance, by similarity)}. An empty one changes nothing."""
    iterations: tuple[int, int, int] = (30, 5, 1)
    """Steps of the walk in the first quarter of the blocks, the middle half, and the last quarter; the paper's are
    30 to 50, 5 to 10, and 1."""
    variance: tuple[float, float] = (0.01, 0.7)
    """Heads are used if the variance of their ranks, scaled to mean 1, is in this range."""
    order: Literal["ISI", "IS"] = "ISI"
    """"ISI": rank only, drop by similarity, rank again and drop by importance; "IS": by importance, then similarity."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.similar <= 1:
            raise ValueError(f"similar: got {self.similar!r}, must be a share between 0 and 1")
        if len(self.iterations) != 3 or not all(isinstance(n, int) and n >= 1 for n in self.iterations):
            raise ValueError(f"iterations: got {self.iterations}, must be three numbers of steps, each 1 or more")
        if not 0 <= self.variance[0] <= self.variance[1]:
            raise ValueError(f"variance: got {self.variance}, must be two rising numbers, 0 or more")
        if self.order not in ("ISI", "IS"):
            raise ValueError(f"order: got {self.order!r}, must be 'ISI' or 'IS'")
        object.__setattr__(self, "iterations", tuple(self.iterations))
        object.__setattr__(self, "variance", tuple(self.variance))
        if self.counts is not None:
            given = {layer: tuple(pair) for layer, pair in dict(self.counts).items()}
            if not all(layer >= 0 and len(pair) == 2 and min(pair) >= 0 for layer, pair in given.items()):
                raise ValueError(
                    f"counts: got {self.counts}, must be {{block: (by importance, by similarity)}}, from 0"
                )
            object.__setattr__(self, "counts", tuple(sorted(given.items())))
            object.__setattr__(self, "layers", tuple(sorted(given)))

    def count(self, tokens: int, stage: Stage) -> int:
        if self.counts is None:
            return super().count(tokens, stage)
        return max(1, tokens - sum(dict(self.counts)[stage.layer]))

    def reduce(self, state: TokenState, evidence: ViTEvidence, count: int) -> TokenState:
        with torch.no_grad():
            chosen = self._chosen(state, evidence, count)
        return state.keep(chosen)

    def _chosen(self, state: TokenState, evidence: ViTEvidence, count: int) -> Tensor:
        p, k, stage = state.prefix, state.num_slots, evidence.stage
        steps = self.iterations[(0, 1, 1, 2)[4 * stage.layer // stage.depth]]
        graph, keys = evidence.attention, evidence.keys[:, p:]
        score = importance(graph, p, steps, self.variance)
        alike = self._by_similarity(k, k - count, stage)
        if self.order == "IS":
            first = topk(score, count + alike)
            return take(first, similarity_prune(take(keys, first), take(score, first), alike))
        if alike:
            left = similarity_prune(keys, score, alike)
            mask = torch.zeros_like(score, dtype=torch.bool).scatter(1, left, True)
            if alike == k - count:
                return left
            score = importance(graph, p, steps, self.variance, mask).masked_fill(~mask, -torch.inf)
        return topk(score, count)

    def _by_similarity(self, tokens: int, fewer: int, stage: Stage) -> int:
        """How many of ``fewer`` go by similarity: no more than there are in the less important half."""
        given = {} if self.counts is None else dict(self.counts)
        wanted = given[stage.layer][1] if stage.layer in given else round(self.similar * fewer)
        return min(wanted, fewer, tokens // 2 if self.order == "ISI" else tokens - fewer)


def importance(
    attention: Tensor, prefix: int, steps: int, variance: tuple[float, float], mask: Tensor | None = None
) -> Tensor:
    """(B, K): PageRank by head of ``attention`` (B, H, T, T) for the K = T - ``prefix`` tokens, fused over heads.

    Root mean square over the heads whose ranks, scaled to mean 1, have a ``variance`` in that range (all heads, if none
    has). ``mask`` (B, K) bool: only the tokens it marks True are walked over, and the prefix; others have 0.
    """
    walked = None if mask is None else pad(mask, (prefix, 0), value=True)[:, None]
    rank = pagerank(attention, steps, mask=walked)[:, :, prefix:]
    real = torch.ones_like(rank[:, :1]) if mask is None else mask[:, None].to(rank.dtype)
    number = real.sum(2)
    relative = rank * (number / rank.sum(2)).unsqueeze(2)
    spread = ((relative - 1).square() * real).sum(2) / number
    used = (spread >= variance[0]) & (spread <= variance[1])
    used = (used | ~used.any(1, keepdim=True)).to(rank.dtype)
    return ((rank.square() * used[..., None]).sum(1) / used.sum(1, keepdim=True)).sqrt()


def similarity_prune(keys: Tensor, score: Tensor, r: int) -> Tensor:
    """(B, K - r) ascending: what stays when ``r`` tokens of the less important half go.

    Those whose ``keys`` (B, K, d) have the largest cosine to one of the more important half by ``score`` (B, K); of an
    odd number the middle one is important. ValueError unless 0 <= r <= K // 2.
    """
    k = score.shape[1]
    check_k(r, k // 2, name="r")
    ranked = ranking(score)
    high, low = ranked[:, : k - k // 2], ranked[:, k - k // 2 :]
    if not r:
        return rest(low[:, :0], k)
    best = torch.bmm(unit(take(keys, low)), unit(take(keys, high)).transpose(1, 2)).amax(2)
    return rest(take(low, topk(best, r)), k)


def search(
    score: Callable[[ZeroTPrune], float],
    patches: int,
    depth: int,
    budget: float,
    *,
    layers: tuple[int, ...] | None = None,
    draws: int = 50,
    seed: int = 0,
    method: ZeroTPrune | None = None,
) -> ZeroTPrune:
    """The best of ``draws`` random plans that cost no more than ``budget``: ``method`` (default ZeroTPrune()) with
    ``counts``.

    ``budget``: the share, in (0, 1), of the ``patches`` that leave a block, mean over all ``depth`` blocks. Linear
    layers cost in proportion to it. ``score``: what a plan is worth, more is better, such as accuracy on one small
    batch, or how often the pruned model says what the whole one says (that needs no labels):

        def agreement(plan):
            with torch.no_grad(), vistok.apply(vit, plan):
                return (vit(pixels).argmax(1) == whole).float().mean().item()

    A plan draws, for each of ``layers`` (by default those of ``method``), how much goes by importance and by
    similarity, and takes as little of that as meets the budget. ValueError if none of the draws can.
    """
    method = method or ZeroTPrune()
    if not 0 < budget < 1:
        raise ValueError(f"budget: got {budget!r}, must be between 0 and 1, the mean share of the patches")
    if draws < 1:
        raise ValueError(f"draws: got {draws}, must be 1 or more")
    stages = sorted(replace(method, layers=layers).stages(depth) if layers is not None else method.stages(depth))
    rng = random.Random(seed)
    plans = [_drawn(rng, stages, patches, depth, budget, method) for _ in range(draws)]
    meeting = [plan for plan in plans if plan is not None]
    if not meeting:
        raise ValueError(
            f"budget: got {budget}, but none of {draws} plans over the blocks {stages} of {depth} meets it; allow "
            "more, or give earlier layers"
        )
    return max(dict.fromkeys(meeting), key=score)


def _drawn(
    rng: random.Random, stages: list[int], patches: int, depth: int, budget: float, method: ZeroTPrune
) -> ZeroTPrune | None:
    """A random plan within the budget; None if what was drawn cannot meet it."""
    shares = [(rng.expovariate(1), rng.expovariate(1)) for _ in stages]
    whole = sum(map(sum, shares))
    for total in range(patches):
        counts, left = {}, patches
        for layer, (important, similar) in zip(stages, shares, strict=True):
            s = min(round(total * similar / whole), left // 2)
            i = min(round(total * important / whole), left - s - 1)
            counts[layer], left = (i, s), left - s - i
        plan = replace(method, counts=counts)
        if sum(plan.plan(patches, depth)) <= budget * patches * depth:
            return plan
    return None


def claim(trial: ViTTrial) -> Outcome:
    """The abstract: up to 49% less loss than other methods that need no training, at as many operations.

    Against top-k by class-token attention; off the shelf, 50% of the patches at each of three blocks.
    """
    attention = trial.accuracy("topk", 0.5)
    graph = trial.accuracy(ZeroTPrune(keep=0.5))
    return Outcome("accuracy at keep rate 0.5, against top-k", baseline=attention, value=graph, holds=graph > attention)
