"""Corpus statistics of sequences of ids: how often, how new, how predictable, and with what structure.

Sequences are int64 tensors (N,), a sentence each; nothing reaches from one into the next. All is computed in float64.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.core.codes import bits_of
from vistok.core.quantize import count_ids, entropy_bits

Ids = Sequence[Tensor]


# Frequency ------------------------------------------------------------------------------------------------------------


def ngrams(ids: Ids, n: int) -> Tensor:
    """(M, n) int64: all runs of ``n`` ids. ValueError for ``n`` below 1, or where no sequence is so long."""
    found = [one.unfold(0, n, 1) for one in ids if len(one) >= n] if n >= 1 else []
    if not found:
        raise ValueError(f"n: got {n}, must be 1 or more, and one of the {len(ids)} sequences must be so long")
    return torch.cat(found)


def ngram_counts(ids: Ids, n: int = 1) -> Tensor:
    """(U,) int64: how often each n-gram that occurs does, the most frequent first."""
    return _distinct(ngrams(ids, n))[2].sort(descending=True)[0]


@dataclass(frozen=True)
class ZipfFit:
    """p(rank) proportional to (rank + ``offset``) ** -``exponent``."""

    exponent: float
    offset: float = 0.0


def zipf_fit(counts: Tensor, offset: bool = False) -> ZipfFit:
    """Zipf's law, or with ``offset`` Zipf-Mandelbrot's, of ``counts`` (U,) by maximum likelihood over their U ranks.

    The order of ``counts`` does not matter: the r-th largest has rank r. Counts of 0 are ranks that could occur.
    """
    sorted_counts = counts.double().sort(descending=True).values
    if sorted_counts.sum() <= 0:
        raise ValueError("counts: got none above 0, must have at least one")
    rank = torch.arange(1, len(counts) + 1, dtype=torch.float64)
    share = sorted_counts / sorted_counts.sum()

    def likelihood(exponent: float, shift: float) -> float:
        log = (rank + shift).log()
        return float(-exponent * (share @ log) - (-exponent * log).logsumexp(0))

    def best(shift: float) -> float:
        return _largest(lambda s: likelihood(s, shift), 0.0, 20.0)

    shift = _largest(lambda q: likelihood(best(q), q), 0.0, 50.0, 40) if offset else 0.0
    return ZipfFit(best(shift), shift)


def zipf_regression(counts: Tensor) -> float:
    """The exponent by least squares of log frequency on log rank. The many rare ones of the tail overrule the rest."""
    found = counts[counts > 0].double().sort(descending=True).values
    return -_line(torch.arange(1, len(found) + 1, dtype=torch.float64).log(), found.log())[0]


def benford(counts: Tensor) -> tuple[Tensor, float]:
    """(9,) shares of the leading digits 1 .. 9 of ``counts``, and their total variation distance from Benford's law."""
    positive = counts[counts > 0].double()
    if not len(positive):
        raise ValueError("counts: got none above 0, must have at least one")
    digit = torch.tensor([int(str(int(one))[0]) for one in positive.tolist()])
    share = count_ids(digit - 1, 9).double() / len(digit)
    law = (1 + 1 / torch.arange(1, 10, dtype=torch.float64)).log10()
    return share, float((share - law).abs().sum() / 2)


# Innovation -----------------------------------------------------------------------------------------------------------


def heaps_curve(ids: Ids) -> Tensor:
    """(N,) int64: how many different ids there are among the first 1, 2, .. N of all sequences, one after another."""
    flat = torch.cat(list(ids))
    first = torch.full((int(flat.max()) + 1,), len(flat), dtype=torch.int64)
    first.scatter_reduce_(0, flat, torch.arange(len(flat)), "amin")
    new = torch.zeros(len(flat), dtype=torch.int64)
    new[first[first < len(flat)]] = 1
    return new.cumsum(0)


def heaps_fit(curve: Tensor) -> tuple[float, float]:
    """(k, b) of Heaps' law, distinct = k * seen ** b, by least squares on logarithms at evenly spaced log(seen)."""
    n = len(curve)
    points = torch.logspace(0, math.log10(n), min(n, 100), dtype=torch.float64).round().long().clamp(1, n)
    at = _distinct(points[:, None])[0][:, 0]
    b, log_k = _line(at.double().log(), curve[at - 1].double().log())
    return math.exp(log_k), b


# Predictability -------------------------------------------------------------------------------------------------------


def token_entropy(ids: Ids) -> float:
    """Entropy of single ids, in bits."""
    return float(entropy_bits(ngram_counts(ids).double()))


def conditional_entropy(ids: Ids, n: int) -> float:
    """Bits of an id once the ``n`` - 1 before it are known, as seen in the sample (too low where contexts are rare)."""
    grams, _, counts = _distinct(ngrams(ids, n))
    if n == 1:
        return float(entropy_bits(counts.double()))
    _, context, _ = _distinct(grams[:, :-1])
    of_context = counts.new_zeros(int(context.max()) + 1).index_add_(0, context, counts)
    each = (counts.double() / of_context[context]).log2()
    return float(-(counts * each).sum() / counts.sum())


def huffman_bits(counts: Tensor) -> float:
    """Mean bits an id of a Huffman code for ``counts``; 1 where there is but one id."""
    heap = [int(c) for c in counts.tolist() if c > 0]
    total, spent = sum(heap), 0
    if len(heap) < 2:
        return 1.0
    heapq.heapify(heap)
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        spent += both  # a merge adds one bit to all that lies below it
        heapq.heappush(heap, both)
    return spent / total


def compression_rate(ids: Ids, size: int) -> float:
    """Share of the raw bits, log2 ``size`` rounded up, that a Huffman code saves; its table is not counted."""
    return 1 - huffman_bits(ngram_counts(ids)) / bits_of(size)


def ngram_perplexity(train: Ids, test: Ids, n: int, size: int) -> float:
    """Perplexity of ``test`` under an n-gram model of ``train`` with Witten-Bell smoothing down to 1 / ``size``.

    2 to the mean bits of a token; the first tokens of a sequence have as much context as there is.
    """
    counts: Counter[tuple[int, ...]] = Counter()
    total: Counter[tuple[int, ...]] = Counter()
    kinds: Counter[tuple[int, ...]] = Counter()
    for row in (one.tolist() for one in train):
        for order in range(n):
            for i in range(order, len(row)):
                gram, context = tuple(row[i - order : i + 1]), tuple(row[i - order : i])
                kinds[context] += not counts[gram]
                counts[gram] += 1
                total[context] += 1
    bits, seen = 0.0, 0
    for row in (one.tolist() for one in test):
        for i in range(len(row)):
            p = 1 / size
            for order in range(min(n - 1, i) + 1):
                context = tuple(row[i - order : i])
                if total[context]:
                    p = (counts[(*context, row[i])] + kinds[context] * p) / (total[context] + kinds[context])
            bits, seen = bits - math.log2(p), seen + 1
    if not seen:
        raise ValueError("test: got no tokens, must have at least one")
    return float(2 ** (bits / seen))


# Meaning --------------------------------------------------------------------------------------------------------------


def purity(ids: Tensor, labels: Tensor) -> float:
    """Share of tokens whose label is the most frequent one of their id, in [0, 1]. Tokens of label -1 do not count."""
    here = labels >= 0
    if not bool(here.any()):
        raise ValueError("labels: got -1 throughout, must tell of at least one token")
    pairs, _, counts = _distinct(torch.stack([ids[here], labels[here]], 1))
    most = counts.new_zeros(int(pairs[:, 0].max()) + 1).scatter_reduce_(0, pairs[:, 0], counts, "amax")
    return int(most.sum()) / int(counts.sum())


def part_purity(ids: Ids, masks: Sequence[Tensor]) -> float:
    """``purity`` of maps of ids (h, w) by masks (H, W) of labels from 0 (-1: none), which may be of objects or parts.

    A token has the label of most of its pixels, of equally many the lower. H and W are multiples of h and w.
    """
    flat, labels = [], []
    for one, mask in zip(ids, masks, strict=True):
        (h, w), (height, width) = one.shape, mask.shape
        if height % h or width % w:
            raise ValueError(f"masks: got {height} x {width}, must be a multiple of the tokens' {h} x {w}")
        cells = mask.reshape(h, height // h, w, width // w).transpose(1, 2).reshape(h * w, -1)
        labels.append(cells.mode(1).values)
        flat.append(one.reshape(-1))
    return purity(torch.cat(flat), torch.cat(labels))


def cooccurrence_embeddings(ids: Ids, size: int, dim: int, window: int = 5) -> Tensor:
    """(``size``, ``dim``) float64: vectors of ids by what stands within ``window`` places of them.

    Positive pointwise mutual information, factorised: what GloVe and word2vec come to but for their weights.
    """
    together = torch.zeros(size, size, dtype=torch.float64)
    for one in ids:
        for step in range(1, min(window, len(one) - 1) + 1):
            together.index_put_((one[:-step], one[step:]), torch.ones(len(one) - step).double() / step, accumulate=True)
    together = together + together.t()
    chance = together.sum(1)[:, None] * together.sum(0) / together.sum().clamp_min(1e-12)
    information = torch.where(together > 0, (together / chance.clamp_min(1e-12)).log(), 0).clamp_min(0)
    values, vectors = torch.linalg.eigh(information)
    best = values.abs().argsort(descending=True)[:dim]
    found: Tensor = vectors[:, best] * values[best].abs().sqrt()
    return found


def procrustes_distance(a: Tensor, b: Tensor) -> float:
    """How far (N, D) is from (N, D') after the best shift, scale and rotation or reflection, in [0, 1].

    The sum of squares that is left of the two at unit size: 0 for a copy that was moved, turned, mirrored or scaled.
    """
    width = max(a.shape[1], b.shape[1])
    moved = []
    for one in (a, b):
        x = one.double() - one.double().mean(0)
        if not float(x.norm()):
            raise ValueError("a, b: got rows that are all equal, must differ")
        moved.append(torch.nn.functional.pad(x / x.norm(), (0, width - x.shape[1])))
    return float((1 - torch.linalg.svdvals(moved[0].t() @ moved[1]).sum().square()).clamp_min(0))


def _distinct(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The different rows of (M, n), which of them each row is, and how often each occurs."""
    found, which, counts = torch.unique(rows, dim=0, return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
    return found, which, counts


def _line(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Slope and intercept by least squares; slope 0 of a single point."""
    away = x - x.mean()
    slope = float((away * (y - y.mean())).sum() / away.square().sum()) if len(x) > 1 else 0.0
    return slope, float(y.mean()) - slope * float(x.mean())


def _largest(f: Callable[[float], float], low: float, high: float, steps: int = 60) -> float:
    """Where ``f``, which rises and then falls, is largest between ``low`` and ``high``: golden sections."""
    share = (math.sqrt(5) - 1) / 2
    a, b = high - share * (high - low), low + share * (high - low)
    fa, fb = f(a), f(b)
    for _ in range(steps):
        if fa >= fb:
            high, b, fb = b, a, fa
            a = high - share * (high - low)
            fa = f(a)
        else:
            low, a, fa = a, b, fb
            b = low + share * (high - low)
            fb = f(b)
    return low if low == 0 else (low + high) / 2  # the lower end itself, where it never moved
