"""Plain-Python references for ``vistok.core``: one picture at a time, one token at a time, nothing clever.

Inputs are whole numbers (or vectors whose length is a power of two), so that sums and cosines are exact and a tie is a
tie in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor

Vector = Sequence[float]


@dataclass
class Case:
    """A batch, some of whose tokens are padding, and how many to choose (as many as all have, at most)."""

    x: Tensor
    mask: Tensor
    k: int
    generator: torch.Generator

    def whole(self, *shape: int, low: int = -2, high: int = 3) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).double()

    def real(self, picture: int) -> list[int]:
        return self.mask[picture].nonzero()[:, 0].tolist()


@st.composite
def cases(draw: st.DrawFn, exact_cosines: bool = False, max_n: int = 11) -> Case:
    """Up to 3 pictures of up to ``max_n`` tokens; k is often 0, 1 or all; often nothing is padded."""
    b, n, d = draw(st.integers(1, 3)), draw(st.integers(1, max_n)), draw(st.sampled_from([1, 4]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mask = torch.ones(b, n, dtype=torch.bool)
    if draw(st.booleans()):
        mask = torch.rand(b, n, generator=generator) < 0.7
    most = int(mask.sum(1).min())
    k = draw(st.sampled_from([0, min(1, most), most, most // 2]))
    if exact_cosines:
        choices = torch.tensor(
            [[1.0, 0, 0, 0], [0, -2, 0, 0], [0, 0, 4, 0], [1, 1, 1, 1], [2, 2, -2, -2], [0, 0, 0, 0]]
        )
        x = choices[torch.randint(0, 6, (b, n), generator=generator)].double()
    else:
        x = torch.randint(-2, 3, (b, n, d), generator=generator).double()
    return Case(x, mask, k, generator)


def best(candidates: Sequence[int], value: Callable[[int], float]) -> int:
    """The candidate of largest value, the lowest index of equals."""
    return max(candidates, key=lambda i: (value(i), -i))


def dot(a: Vector, b: Vector) -> float:
    return sum(p * q for p, q in zip(a, b, strict=True))


def cosine(a: Vector, b: Vector) -> float:
    lengths = math.sqrt(dot(a, a)), math.sqrt(dot(b, b))
    return 0.0 if 0 in lengths else dot(a, b) / (lengths[0] * lengths[1])


def squared(a: Vector, b: Vector) -> float:
    return sum((p - q) ** 2 for p, q in zip(a, b, strict=True))


def farthest(x: list[Vector], real: list[int], k: int, start: int, distance: Callable[[Vector, Vector], float]) -> list:
    picks = [start][:k]
    while len(picks) < k:
        left = [i for i in real if i not in picks]
        picks.append(best(left, lambda i: min(distance(x[i], x[p]) for p in picks)))
    return picks


def least_similar(x: list[Vector], real: list[int], k: int, start: int) -> list[int]:
    picks = [start][:k]
    while len(picks) < k:
        left = [i for i in real if i not in picks]
        picks.append(best(left, lambda i: -sum(cosine(x[i], x[p]) for p in picks)))
    return picks


def coverage(rows: list[Vector], chosen: Sequence[int]) -> float:
    return sum(max([0.0, *(row[i] for i in chosen)]) for row in rows)


def cover(rows: list[Vector], real: list[int], k: int) -> list[int]:
    picks: list[int] = []
    while len(picks) < k:
        left = [i for i in real if i not in picks]
        picks.append(best(left, lambda i: coverage(rows, [*picks, i])))
    return picks


def suppress(scores: Vector, x: list[Vector], real: list[int], k: int, limits: Vector) -> list[int]:
    alive, removed, picks = set(real), set(), []
    while len(picks) < k:
        pick = best(sorted(alive or removed), lambda i: scores[i])
        picks.append(pick)
        if alive:
            near = {i for i in alive if i != pick and 1 - cosine(x[i], x[pick]) < limits[len(picks) - 1]}
            removed |= near
            alive -= near | {pick}
        else:
            removed -= {pick}
    return picks


def even_odd(x: list[Vector], real: list[int], k: int, step: int, author: bool) -> list[int]:
    items = list(real)
    while len(items) > k:
        even, odd = items[::2], items[1::2]
        similarity = {i: max([-math.inf, *(cosine(x[i], x[j]) for j in odd)]) for i in even}
        falling = sorted(even, key=lambda i: -similarity[i])  # stable: earlier in the list first
        drop = set(falling[: min(step, len(items) - k)])
        items = [*(i for i in falling if i not in drop), *odd] if author else [i for i in items if i not in drop]
    return items


def density_peaks(x: list[Vector], real: list[int], k: int, neighbours: int) -> list[int]:
    d = len(x[0]) if x else 1
    gap = {(i, j): math.sqrt(squared(x[i], x[j])) / math.sqrt(d) for i in real for j in real}
    density = {}
    for i in real:
        near = sorted(gap[i, j] for j in real)[:neighbours]
        density[i] = -sum(g * g for g in near) / len(near)
    score = {}
    for i in real:
        denser = [j for j in real if density[j] > density[i] or (density[j] == density[i] and j < i)]
        apart = min(gap[i, j] for j in denser) if denser else max(gap.values())
        score[i] = density[i] + (math.log(apart) if apart else -math.inf)
    return sorted(real, key=lambda i: (-score[i], i))[:k]


def medoids(x: list[Vector], real: list[int], k: int, start: int, iterations: int = 100) -> list[int]:
    def distance(a: Vector, b: Vector) -> float:
        return math.sqrt(squared(a, b))

    now = sorted(farthest(x, real, k, start, squared))
    for _ in range(iterations):
        member: dict[int, list[int]] = {m: [m] for m in now}
        for i in real:
            if i not in now:
                member[min(now, key=lambda m: (distance(x[i], x[m]), m))].append(i)
        new = sorted(
            min(group, key=lambda i: (sum(distance(x[i], x[j]) for j in group), i)) for group in member.values()
        )
        if new == now:
            break
        now = new
    return now


def hamilton(weights: list[int], total: int, capacity: list[int], by_weight: bool = False) -> list[int]:
    """Largest remainders in exact fractions; what a full group cannot take is shared again."""
    given = [0] * len(weights)
    for group in ([i for i, w in enumerate(weights) if w], [i for i, w in enumerate(weights) if not w]):
        want = min(total - sum(given), sum(capacity[i] for i in group))
        weight = {i: Fraction(weights[i] or 1) for i in group}
        full: set[int] = set()
        while True:
            left = [i for i in group if i not in full]
            room = want - sum(capacity[i] for i in full)
            quota = {i: room * weight[i] / sum(weight[j] for j in left) for i in left}
            over = {i for i in left if quota[i] > capacity[i]}
            if not over:
                break
            full |= over
        for i in full:
            given[i] = capacity[i]
        for i in left:
            given[i] = math.floor(quota[i])
        key = weight if by_weight else {i: quota[i] - math.floor(quota[i]) for i in left}
        while sum(given[i] for i in group) < want:
            for i in sorted((i for i in left if given[i] < capacity[i]), key=lambda i: (-key[i], i)):
                if sum(given[i] for i in group) < want:
                    given[i] += 1
    return given


def outlier_factors(values: Vector, k: int) -> list[float]:
    """LOF by its definition, over all pairs; ``k`` neighbours, those before one in sorted order first among equals."""
    n = len(values)
    if n < 2:
        return [1.0] * n
    k = min(k, n - 1)
    order = sorted(range(n), key=lambda i: (values[i], i))
    line = [values[i] for i in order]
    near = []
    for i in range(n):
        others = [*range(i - 1, -1, -1), *range(i + 1, n)]
        near.append(sorted(others, key=lambda j: abs(line[i] - line[j]))[:k])
    reach = [abs(line[i] - line[near[i][-1]]) for i in range(n)]
    density = [1 / (sum(max(abs(line[i] - line[j]), reach[j]) for j in near[i]) / k + 1e-10) for i in range(n)]
    factor = [sum(density[j] for j in near[i]) / k / density[i] for i in range(n)]
    out = [0.0] * n
    for place, i in enumerate(order):
        out[i] = factor[place]
    return out


def distinct_rank(values: Sequence[int]) -> list[int]:
    """Each value as the smallest plus the number of distinct smaller ones."""
    steps = sorted(set(values))
    assert all(a < b for a, b in pairwise(steps))
    return [steps[0] + steps.index(v) for v in values]
