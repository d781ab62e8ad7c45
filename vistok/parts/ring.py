"""Attention over a sequence that is cut over processes: what travels round the ring, when, and who computes what.

A rank's side of a schedule is a program: a generator that says what it sends and receives, computes meanwhile, and then
takes what came. The same programs run in the processes of ``torch.distributed`` (``Group``: gloo, NCCL) and in turn in
a single one (``Alone``); both write down every message. Two schedules: ``rows_travel`` passes queries on and sends what
was computed with them straight back (TokenRing), ``keys_travel`` passes keys and values on (Ring Attention). What
travels is a tuple of tensors whose third axis is the tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

Tensors = tuple[Tensor, ...]
Schedule = Literal["ring", "bidirectional", "zigzag"]
""" "ring": keys and values travel; the others: rows do, of tokens in one run a rank or in two."""


@dataclass(frozen=True)
class Message:
    """What one rank sent to another in one exchange."""

    step: int
    source: int
    target: int
    what: str
    """ "on": with the ring, what is computed with; "back": what was computed."""
    elements: int


@dataclass
class Exchange:
    """What a rank sends and receives at once: (peer, "on" or "back", tensors), received ones to be filled."""

    step: int
    sends: list[tuple[int, str, Tensors]] = field(default_factory=list)
    receives: list[tuple[int, str, Tensors]] = field(default_factory=list)


Wait = Callable[[], dict[str, Tensors]]
"""What a program is given for an exchange: called once it needs what came, by "on" and "back"."""
Program = Generator[Exchange, Wait, Tensors]


@dataclass(frozen=True)
class Work:
    """A block of attention: rows of the queries' owner, keys of the other, and whether it lies on the diagonal."""

    rows: slice
    keys: slice
    causal: bool = False


@dataclass(frozen=True)
class Share:
    """How N tokens lie on ``size`` ranks: one run each, or if ``zigzag`` two, one from the front and one from the back,
    so that under a causal mask all have equally much to do."""

    size: int
    length: int
    """Tokens of a rank."""
    zigzag: bool = False
    causal: bool = False

    def __post_init__(self) -> None:
        if self.zigzag and self.length % 2:
            raise ValueError(f"length: got {self.length} tokens a rank, must be even for a zigzag")

    def positions(self) -> Tensor:
        """(size, length) int64: where the tokens of each rank stand in the sequence; rotary angles need it."""
        if not self.zigzag:
            return torch.arange(self.size * self.length).view(self.size, -1)
        chunks = torch.arange(self.size * self.length).view(2 * self.size, -1)
        return torch.cat([chunks[: self.size], chunks[self.size :].flip(0)], 1)

    def work(self, owner: int, holder: int) -> Work | None:
        """What the queries of ``owner`` see of the keys of ``holder``; None: nothing."""
        whole = slice(0, self.length)
        if not self.causal or owner == holder:
            return Work(whole, whole, self.causal)
        if not self.zigzag:
            return Work(whole, whole) if owner > holder else None
        half = self.length // 2
        # A later front chunk sees the front chunk alone, and so does any back chunk that is not later.
        return Work(whole, slice(0, half)) if owner > holder else Work(slice(half, self.length), whole)

    @property
    def direction(self) -> int:
        """Where rows travel: under a causal mask to earlier ranks first, after which fewer are needed, or none."""
        return -1 if self.causal else 1


def rows_travel(
    share: Share,
    rank: int,
    payload: Tensors,
    like: Tensors,
    compute: Callable[[Tensors, int, Work], Tensors],
    collect: Callable[[Tensors, slice], None],
) -> Program:
    """Rows go round; what ``compute`` makes of them, (rows, owner, work) to tensors ``like``, goes back to the owner a
    step later, while the next is computed; the owner ``collect``s it. After the last step one exchange more."""
    size, way = share.size, share.direction
    held, at = payload, slice(0, share.length)
    made: Tensors = ()

    def owner(step: int) -> int:
        return (rank - way * step) % size

    def holder(step: int) -> int:
        return (rank + way * step) % size

    for step in range(size + 1):
        exchange = Exchange(step)
        coming = share.work(owner(step + 1), rank) if step + 1 < size else None
        if step + 1 < size and (following := share.work(owner(step), holder(1))):
            offset = following.rows.start - at.start
            part = slice(offset, offset + following.rows.stop - following.rows.start)
            exchange.sends.append((holder(1), "on", _part(held, part)))
        if coming:
            exchange.receives.append((owner(1), "on", _empty(payload, coming.rows)))
        returned = share.work(rank, holder(step - 1)) if step > 1 else None
        if step > 1 and share.work(owner(step - 1), rank):
            exchange.sends.append((owner(step - 1), "back", _part(made, slice(None))))
        if returned:
            exchange.receives.append((holder(step - 1), "back", _empty(like, returned.rows)))
        wait = yield exchange
        work = share.work(owner(step), rank) if step < size else None
        made = compute(held, owner(step), work) if work else ()
        if step == 0 and work:
            collect(made, work.rows)
        came = wait()
        if coming:
            held, at = came["on"], coming.rows
        if returned:
            collect(came["back"], returned.rows)
    return ()


def keys_travel(share: Share, rank: int, payload: Tensors, compute: Callable[[Tensors, int], Tensors]) -> Program:
    """Keys and values go round. What ``compute`` makes, (payload, owner) to tensors or (), is summed over the ranks
    that its payload passes, a step behind it, and is the owner's result in the end."""
    size, held = share.size, payload
    total: Tensors = ()
    if size == 1:
        return compute(payload, rank)
    ahead, behind = (rank + 1) % size, (rank - 1) % size
    for step in range(size + 1):
        exchange = Exchange(step)
        if step + 1 < size:
            exchange.sends.append((ahead, "on", _part(held, slice(None))))
            exchange.receives.append((behind, "on", _empty(payload, slice(0, share.length))))
        if total:
            exchange.sends.append((ahead, "back", _part(total, slice(None))))
            exchange.receives.append((behind, "back", _empty(total, slice(None))))
        wait = yield exchange
        made = compute(held, (rank - step) % size) if step < size else ()
        came = wait()
        held, before = came.get("on", held), came.get("back", ())
        total = tuple(a + b for a, b in zip(made, before, strict=True)) if made and before else made or before
    return total


def _part(tensors: Tensors, rows: slice) -> Tensors:
    return tuple(t[:, :, rows].contiguous() for t in tensors)


def _empty(tensors: Tensors, rows: slice) -> Tensors:
    return tuple(torch.empty_like(t[:, :, rows], memory_format=torch.contiguous_format) for t in tensors)


class World(Protocol):
    """Where programs run."""

    log: list[Message]
    """What was sent from here, in order."""

    @property
    def ranks(self) -> Sequence[int]:
        """Those that run here."""
        ...

    def run(self, programs: Sequence[Program]) -> list[Tensors]:
        """The results of the programs of ``ranks``."""
        ...


class Alone:
    """All ranks in this process, step by step. Raises RuntimeError for a message that nobody takes, or of a shape that
    its receiver does not expect."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"size: got {size}, must be 1 or more")
        self.size, self.ranks = size, range(size)
        self.log: list[Message] = []

    def run(self, programs: Sequence[Program]) -> list[Tensors]:
        replies: list[Wait | None] = [None] * self.size
        while True:
            exchanges, results = [], []
            for program, reply in zip(programs, replies, strict=True):
                try:
                    exchanges.append(program.send(reply))  # type: ignore[arg-type]
                except StopIteration as end:
                    results.append(end.value)
            if not exchanges:
                return results
            if results:
                raise RuntimeError("a rank ended before the others")
            replies = [*self._deliver(exchanges)]

    def _deliver(self, exchanges: Sequence[Exchange]) -> list[Wait]:
        post = {}
        for rank, exchange in enumerate(exchanges):
            for peer, what, tensors in exchange.sends:
                post[rank, peer, what] = tensors
                self.log.append(_message(exchange.step, rank, peer, what, tensors))
        came: list[dict[str, Tensors]] = [{} for _ in exchanges]
        for rank, exchange in enumerate(exchanges):
            for peer, what, wanted in exchange.receives:
                sent = post.pop((peer, rank, what), ())
                if [(t.shape, t.dtype) for t in sent] != [(t.shape, t.dtype) for t in wanted]:
                    raise RuntimeError(f"step {exchange.step}: rank {rank} was not sent what it expects of {peer}")
                came[rank][what] = sent
        if post:
            raise RuntimeError(f"nobody took {sorted(post)}")
        return [partial(dict, each) for each in came]


class Group:
    """The processes of ``group`` of ``torch.distributed``, one rank each (None: all; a single one if there is none).

    Messages of an exchange are posted at once, which neither gloo nor NCCL can deadlock on, and overlap with what is
    computed until they are needed.
    """

    def __init__(self, group: Any = None) -> None:
        there = dist.is_available() and dist.is_initialized()
        self.group = group
        self.size = dist.get_world_size(group) if there else 1
        self.ranks = [dist.get_rank(group) if there else 0]
        self.log: list[Message] = []

    def run(self, programs: Sequence[Program]) -> list[Tensors]:
        (program,) = programs
        reply: Any = None
        while True:
            try:
                exchange = program.send(reply)
            except StopIteration as end:
                return [end.value]
            for peer, what, tensors in exchange.sends:
                self.log.append(_message(exchange.step, self.ranks[0], peer, what, tensors))
            posted = [self._post(dist.isend, *each) for each in exchange.sends]
            posted += [self._post(dist.irecv, *each) for each in exchange.receives]
            ops = [op for each in posted for op in each]
            works = dist.batch_isend_irecv(ops) if ops else []
            reply = partial(self._wait, works, exchange)

    def _post(self, how: Any, peer: int, what: str, tensors: Tensors) -> list[Any]:
        to = peer if self.group is None else dist.get_global_rank(self.group, peer)
        first = 0 if what == "on" else 8
        return [dist.P2POp(how, t, to, self.group, first + i) for i, t in enumerate(tensors)]

    @staticmethod
    def _wait(works: Sequence[Any], exchange: Exchange) -> dict[str, Tensors]:
        for work in works:
            work.wait()
        return {what: tensors for _, what, tensors in exchange.receives}


def _message(step: int, source: int, target: int, what: str, tensors: Tensors) -> Message:
    return Message(step, source, target, what, sum(t.numel() for t in tensors))


def busiest(log: Sequence[Message]) -> int:
    """Elements of the largest load that a rank sends in one direction in one exchange; 0 if nothing was sent."""
    load: dict[tuple[int, int, str], int] = defaultdict(int)
    for m in log:
        load[m.step, m.source, m.what] += m.elements
    return max(load.values(), default=0)
