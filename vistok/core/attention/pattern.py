"""Which keys each query sees: one object for every sparse attention, with a dense oracle and a way to run it in tiles.

A pattern is written once, as ``allows``: may query q see key k. From it come the dense mask that every executor is held
against, and the masks inside tiles. ``tiles`` cuts the pattern into dense problems: queries that share their keys.
Patterns hold integers and index tensors, no weights; grids are in ``vistok.core.attention.grid``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vistok.core.attention.tiles import Runs, Tiles

QUERIES = 128
"""Queries of a tile where the pattern does not say which share keys: fewer waste time, more waste memory."""


class Pattern(ABC):
    """Which of Nk keys each of Nq queries sees, in every picture and head alike or in each its own way."""

    @property
    @abstractmethod
    def dense_shape(self) -> tuple[int, int, int, int]:
        """(B or 1, H or 1, Nq, Nk): the shape of ``to_dense``; 1 where all pictures, or all heads, are alike."""

    @abstractmethod
    def allows(self, picture: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """bool: whether ``query`` sees ``key``; all int64, broadcast to one another. This is the definition."""

    @property
    @abstractmethod
    def pairs(self) -> float:
        """Allowed pairs of query and key, mean over pictures and heads."""

    @abstractmethod
    def tiles(self, size: int | Sequence[int] | None = None) -> list[Tiles]:
        """The pattern as dense problems. ``size``: queries of a tile, by axis on a grid; None: what is fastest."""

    def groups(self) -> list[Tiles]:
        """Tiles of queries that see the very same keys (but for causal masks): no pair is computed in vain."""
        return self.tiles()

    @property
    def density(self) -> float:
        """Share of all pairs that is allowed, in [0, 1]."""
        nq, nk = self.dense_shape[2:]
        return self.pairs / (nq * nk)

    def flops(self, heads: int, head_dim: int) -> int:
        """Of Q K^T and P V over the allowed pairs of one picture (counted as in ``vistok.core.flops``)."""
        return round(4 * self.pairs * heads * head_dim)

    def to_dense(self, device: torch.device | str | None = None) -> Tensor:
        """(B or 1, H or 1, Nq, Nk) bool, True where a query sees a key."""
        b, h, q, k = (torch.arange(n, device=device) for n in self.dense_shape)
        return self.allows(b[:, None, None, None], h[:, None, None], q[:, None], k).expand(self.dense_shape)


@dataclass(frozen=True)
class Dense(Pattern):
    """All keys, or if ``causal`` those up to the query, the last query standing at the last key."""

    num_queries: int
    num_keys: int
    causal: bool = False

    def __post_init__(self) -> None:
        _check_causal(self.causal, self.num_queries, self.num_keys)

    @property
    def dense_shape(self) -> tuple[int, int, int, int]:
        return 1, 1, self.num_queries, self.num_keys

    @property
    def pairs(self) -> float:
        hidden = self.num_queries * (self.num_queries - 1) / 2 if self.causal else 0
        return self.num_queries * self.num_keys - hidden

    def allows(self, picture: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key <= query + (self.num_keys - self.num_queries)
        return seen if self.causal else torch.ones_like(seen)

    def tiles(self, size: int | Sequence[int] | None = None) -> list[Tiles]:
        step = _one(size)
        found = []
        for start in range(0, self.num_queries, step):
            end = min(start + step, self.num_queries)
            seen = end + self.num_keys - self.num_queries if self.causal else self.num_keys
            queries = Runs.of(torch.tensor([[start]]), torch.arange(end - start))
            found.append(Tiles(queries, Runs.of(torch.tensor([[0]]), torch.arange(seen)), masked=self.causal))
        return found


@dataclass(frozen=True, eq=False)
class TokenIndex(Pattern):
    """Keys by their positions: one list for all queries, or a list a query.

    ``index`` (B or 1, H or 1, K) or (B or 1, H or 1, Nq, K) int64, no position twice in a list, -1 for "none". If
    ``causal`` a query sees only the keys of its list up to itself, the last query standing at the last key.
    """

    index: Tensor
    num_queries: int
    num_keys: int
    causal: bool = False

    def __post_init__(self) -> None:
        index = self.index
        if index.dim() not in (3, 4) or (index.dim() == 4 and index.shape[2] != self.num_queries):
            raise ValueError(f"index: got {tuple(index.shape)}, must be (B, H, K) or (B, H, {self.num_queries}, K)")
        if index.numel() and not (int(index.min()) >= -1 and int(index.max()) < self.num_keys):
            raise ValueError(f"index: got {int(index.min())}..{int(index.max())}, must be in -1..{self.num_keys - 1}")
        _check_causal(self.causal, self.num_queries, self.num_keys)

    @property
    def dense_shape(self) -> tuple[int, int, int, int]:
        return self.index.shape[0], self.index.shape[1], self.num_queries, self.num_keys

    @cached_property
    def pairs(self) -> float:
        lists = self._lists
        behind = self.num_keys - self.num_queries if self.causal else self.num_keys
        first = (lists - behind).clamp_min(0)  # the first query that sees each key
        query = torch.arange(self.num_queries, device=lists.device)[:, None]
        seen = first <= query if lists.shape[2] > 1 else self.num_queries - first
        return (seen * (lists >= 0)).sum().item() / (lists.shape[0] * lists.shape[1])

    @property
    def _lists(self) -> Tensor:
        """(B or 1, H or 1, Nq or 1, K)"""
        return self.index if self.index.dim() == 4 else self.index[:, :, None]

    @cached_property
    def _listed(self) -> Tensor:
        """(B or 1, H or 1, Nq or 1, Nk) bool"""
        lists = self._lists
        at = torch.where(lists < 0, self.num_keys, lists)
        table = torch.zeros(*lists.shape[:3], self.num_keys + 1, dtype=torch.bool, device=lists.device)
        return table.scatter(3, at, True)[..., : self.num_keys]

    def allows(self, picture: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        b, h, n, _ = self._listed.shape
        seen = self._listed[picture * (b > 1), head * (h > 1), query * (n > 1), key]
        return seen & (key <= query + (self.num_keys - self.num_queries)) if self.causal else seen

    def tiles(self, size: int | Sequence[int] | None = None) -> list[Tiles]:
        lists = self._lists
        b, h, n, _ = lists.shape
        count = (lists >= 0).sum(3)
        found = []
        for c in count.unique().tolist():  # type: ignore[no-untyped-call]
            which = (count == c).nonzero()
            if not c:
                continue
            keys = lists[which[:, 0], which[:, 1], which[:, 2]].sort(1, descending=True).values[:, :c]
            picture, head = (which[:, i] if own > 1 else None for i, own in enumerate((b, h)))
            spans = [(0, 1)] if n > 1 else _spans(self.num_queries, _one(size))
            for start, end in spans:
                queries = which[:, 2:] if n > 1 else torch.full_like(which[:, 2:], start)
                offset = torch.arange(end - start, device=lists.device)
                rows = Runs.of(queries, offset), Runs.of(keys, offset[:1])
                found.append(Tiles(*rows, masked=self.causal, picture=picture, head=head))
        return found


@dataclass(frozen=True, eq=False)
class BlockMask(Pattern):
    """Blocks of queries see blocks of keys. ``mask`` (B or 1, H or 1, ceil(Nq / bq), ceil(Nk / bk)) bool, ``block`` =
    (bq, bk); the last block of each is what is left."""

    mask: Tensor
    num_queries: int
    num_keys: int
    block: tuple[int, int]

    def __post_init__(self) -> None:
        wanted = (math.ceil(self.num_queries / self.block[0]), math.ceil(self.num_keys / self.block[1]))
        if self.mask.dim() != 4 or self.mask.shape[2:] != wanted or self.mask.dtype != torch.bool:
            got = f"{tuple(self.mask.shape)} {self.mask.dtype}"
            raise ValueError(f"mask: got {got}, must be (B, H, {wanted[0]}, {wanted[1]}) bool")

    @classmethod
    def from_index(cls, index: Tensor, num_queries: int, num_keys: int, block: tuple[int, int]) -> BlockMask:
        """``index`` (B or 1, H or 1, blocks of queries, K) int64: which blocks of keys each block of queries sees."""
        blocks = math.ceil(num_keys / block[1])
        mask = torch.zeros(*index.shape[:3], blocks, dtype=torch.bool, device=index.device).scatter(3, index, True)
        return cls(mask, num_queries, num_keys, block)

    @property
    def dense_shape(self) -> tuple[int, int, int, int]:
        return self.mask.shape[0], self.mask.shape[1], self.num_queries, self.num_keys

    @cached_property
    def pairs(self) -> float:
        rows, columns = (
            torch.tensor([end - start for start, end in _spans(n, step)], dtype=torch.float64, device=self.mask.device)
            for n, step in zip((self.num_queries, self.num_keys), self.block, strict=True)
        )
        return (rows @ (self.mask.double() @ columns).flatten(0, 1).T).mean().item()

    def allows(self, picture: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        b, h = self.mask.shape[:2]
        return self.mask[picture * (b > 1), head * (h > 1), query // self.block[0], key // self.block[1]]

    def tiles(self, size: int | Sequence[int] | None = None) -> list[Tiles]:
        """One tile a block of queries (``size`` is not used), in groups that see equally many keys."""
        return self._tiles

    @cached_property
    def _tiles(self) -> list[Tiles]:
        (bq, bk), device = self.block, self.mask.device
        b, h, rows, columns = self.mask.shape
        missing = columns * bk - self.num_keys
        keys = self.mask.sum(3) * bk - self.mask[..., -1] * missing
        last = torch.arange(rows, device=device) == rows - 1
        queries = torch.where(last, self.num_queries - (rows - 1) * bq, bq).expand_as(keys)
        found = []
        for q, k in torch.stack([queries, keys], 3).flatten(0, 2).unique(dim=0).tolist():  # type: ignore[no-untyped-call]
            if not k:
                continue
            which = ((queries == q) & (keys == k)).nonzero()
            seen = self.mask[which[:, 0], which[:, 1], which[:, 2]].nonzero()[:, 1].view(len(which), -1)
            found.append(
                Tiles(
                    Runs.of(which[:, 2:] * bq, torch.arange(q, device=device)),
                    Runs.of(seen * bk, torch.arange(bk, device=device), k),
                    picture=which[:, 0] if b > 1 else None,
                    head=which[:, 1] if h > 1 else None,
                )
            )
        return found


@dataclass(frozen=True, eq=False)
class CoarseKV(Pattern):
    """One softmax over several sets of keys: fine tokens, pooled ones, a prompt; each set with a pattern of its own.

    ``k`` and ``v`` hold the sets one after another, in the order of ``levels``. ``log_weights``: added to every logit
    of a set; a key that stands for n tokens counts n times with log n. Weights by key are the ``bias`` of ``attend``.
    """

    levels: tuple[Pattern, ...]
    log_weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.levels or len(self.levels) != len(self.log_weights):
            raise ValueError(
                f"log_weights: got {len(self.log_weights)} for {len(self.levels)} levels, must be one each"
            )
        if any(isinstance(level, CoarseKV) for level in self.levels):
            raise ValueError("levels: got a CoarseKV, must be patterns of one set of keys each")
        queries = {level.dense_shape[2] for level in self.levels}
        if len(queries) > 1:
            raise ValueError(f"levels: got {sorted(queries)} queries, must be of the same queries")

    @property
    def dense_shape(self) -> tuple[int, int, int, int]:
        b, h, q, k = zip(*(level.dense_shape for level in self.levels), strict=True)
        return max(b), max(h), q[0], sum(k)

    @property
    def pairs(self) -> float:
        return sum(level.pairs for level in self.levels)

    @property
    def splits(self) -> list[int]:
        """Keys of each level."""
        return [level.dense_shape[3] for level in self.levels]

    def allows(self, picture: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = torch.zeros_like(picture + head + query + key, dtype=torch.bool)
        start = 0
        for level, keys in zip(self.levels, self.splits, strict=True):
            inside = (key >= start) & (key < start + keys)
            b, h = level.dense_shape[:2]
            own = (key - start).clamp(0, keys - 1)
            seen = seen | (inside & level.allows(picture * (b > 1), head * (h > 1), query, own))
            start += keys
        return seen

    def log_bias(self, device: torch.device | str | None = None) -> Tensor:
        """(Nk,) float32: the log-weight of each key."""
        return torch.repeat_interleave(
            torch.tensor(self.log_weights, device=device), torch.tensor(self.splits, device=device)
        )

    def tiles(self, size: int | Sequence[int] | None = None) -> list[Tiles]:
        raise ValueError("pattern: got CoarseKV, whose levels are tiled one by one: level.tiles()")


def _one(size: int | Sequence[int] | None) -> int:
    """``size`` where there is one axis."""
    if size is None:
        return QUERIES
    (one,) = (size,) if isinstance(size, int) else size
    return one


def _check_causal(causal: bool, queries: int, keys: int) -> None:
    if causal and queries > keys:
        raise ValueError(f"num_queries: got {queries}, must be at most the {keys} keys if causal")


def _spans(n: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, n)) for start in range(0, n, step)]
