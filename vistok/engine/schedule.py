"""The loop that hands out cells, the same on every engine: claims, retries, outcomes, the end.

Each worker has one cell at a time and is handed the next before the caller sees the outcome of the last, so that it
works while the caller writes. A cell whose worker died is tried again, on another worker. A cell that another driver
holds is put last and looked at once more when all others have ended: that driver may have died.
"""

from __future__ import annotations

import atexit
import pickle
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from vistok.engine.cells import Cell, Outcome, Resources, Result, SetupError, Status, check_key
from vistok.engine.claims import Claim, claim, owner_of

AnyCell = TypeVar("AnyCell", bound=Cell)

OnDone = Callable[[Outcome[Any], int, int], object]
Reply = tuple[Any, str, str]
"""Value, error, traceback; the error is empty where there is a value."""


class Kind(Enum):
    """What a worker has to say."""

    READY = auto()
    """``setup()`` has run."""
    UNREADY = auto()
    """``setup()`` raised: ``reply``."""
    REPLY = auto()
    """Its cell has ended: ``reply``."""
    DIED = auto()
    """Its process is gone: ``how``."""


@dataclass(frozen=True)
class Event:
    """Something that happened to a worker."""

    worker: int
    kind: Kind
    reply: Reply = (None, "", "")
    how: str = ""


class Pool(Protocol):
    """The workers of one ``map``. A worker is known by the number that ``start`` gave."""

    @property
    def size(self) -> int:
        """How many workers there may be at once."""
        ...

    def start(self) -> int:
        """Start one more worker; READY, UNREADY or DIED follows."""
        ...

    def submit(self, worker: int, cell: Any) -> None:
        """Hand a cell to a ready worker; REPLY or DIED follows. Raises whatever pickling the cell raises."""
        ...

    def wait(self) -> Iterable[Event]:
        """Wait until there is at least one event."""
        ...

    def close(self, kill: bool) -> None:
        """End all workers: idle ones in peace, or all at once whatever they are at."""
        ...


class Engine(ABC):
    """Something that runs cells."""

    @abstractmethod
    def _pool(self, fn: Callable[[Any, Any], Any], setup: Callable[[], Any], resources: Resources) -> Pool: ...

    def map(
        self,
        cells: Iterable[AnyCell],
        fn: Callable[[Any, AnyCell], Result],
        *,
        setup: Callable[[], Any] | None = None,
        resources: Resources | None = None,
        retries: int = 1,
        on_done: OnDone | None = None,
        folder: str | Path | None = None,
        done: Callable[[str], bool] | None = None,
    ) -> Generator[Outcome[Result], None, None]:
        """Run ``fn(state, cell)`` for every cell; one outcome a cell, in the order in which they end.

        Work starts with the first ``next``. Closing the iterator kills the workers; so do Ctrl-C while it waits, and
        the end of the process. An exception in ``fn`` is the outcome of that cell and is not tried again.

        Args:
            cells: picklable, with keys that differ.
            fn: a function of a module (or a ``functools.partial`` of one), picklable.
            setup: likewise; run once in each worker, its result is ``state``. Without it ``state`` is None.
            resources: what each worker needs; default one core.
            retries: how often a cell is tried again after its worker died.
            on_done: called as ``on_done(outcome, ended, total)`` before the outcome is handed out.
            folder: drivers with the same folder share the work through the claims in it (see ``vistok.engine.claims``);
                a cell that another driver holds has the outcome HELD. ``fn`` must write the result before it returns.
            done: whether the result of a key is there already; such a cell has the outcome PRESENT.

        Raises:
            ValueError: a key that is no file name or comes twice, negative retries, a function that no other process
                could import, or more than the machine has.
            SetupError: ``setup`` raised, or kept killing its process.
        """
        todo: dict[str, AnyCell] = {}
        for cell in cells:
            key = check_key(cell.key)  # asked for once: a hash of the content takes longer than all else here
            if key in todo:
                raise ValueError(f"cells holds the key {key!r} twice; a cell is run once")
            todo[key] = cell
        if retries < 0:
            raise ValueError(f"retries is {retries}; it is 0 or more")
        first = setup or no_setup
        for name, function in (("fn", fn), ("setup", first)):
            try:
                pickle.dumps(function)
            except Exception as error:
                raise ValueError(
                    f"{name} is {function!r}, which no worker could import ({error}); "
                    "pass a function defined at the top of a module"
                ) from error
        sweep = _Sweep(todo, retries, on_done, folder, done)
        return sweep.run(lambda: self._pool(fn, first, resources or Resources()))


def no_setup() -> None:
    """The state of workers that need none."""


def attempt(fn: Callable[..., Any], *arguments: Any) -> Reply:
    """Call the user's function; whatever it raises becomes words, but Ctrl-C in the calling process goes through."""
    try:
        return fn(*arguments), "", ""
    except (Exception, SystemExit) as error:
        return None, *in_words(error, error.__traceback__.tb_next if error.__traceback__ else None)


def in_words(error: BaseException, frames: Any = None) -> tuple[str, str]:
    """The exception as one text, and with the frames that led to it."""
    text = "".join(traceback.format_exception_only(error)).strip()
    return text, "".join(traceback.format_exception(type(error), error, frames)) if frames else text


@dataclass
class _Task(Generic[AnyCell]):
    """A cell on its way."""

    key: str
    cell: AnyCell
    claim: Claim | None = None
    tries: int = 0

    def end(self, status: Status, **fields: Any) -> Outcome[Any]:
        """The outcome; the claim is given back, as the result is written by now."""
        if self.claim:
            self.claim.release()
            self.claim = None
        return Outcome(self.key, status, tries=self.tries, **fields)

    def fail(self, error: str, trace: str = "") -> Outcome[Any]:
        return self.end(Status.FAILED, error=f"cell {self.key}: {error}", traceback=trace)


class _Sweep:
    """The state of one ``map``."""

    def __init__(
        self,
        cells: Mapping[str, Cell],
        retries: int,
        on_done: OnDone | None,
        folder: str | Path | None,
        done: Callable[[str], bool] | None,
    ) -> None:
        self.total = len(cells)
        self.retries, self.on_done, self.folder, self.done = retries, on_done, folder, done
        self.queue = deque(_Task(key, cell) for key, cell in cells.items())
        self.held: deque[_Task[Any]] = deque()
        self.last_look = False
        self.waiting: deque[_Task[Any]] = deque()  # claimed, for the next idle worker
        self.busy: dict[int, _Task[Any]] = {}
        self.idle: list[int] = []
        self.starting: set[int] = set()
        self.lost = 0  # workers that died in setup, since one was ready
        self.ended: deque[Outcome[Any]] = deque()

    def run(self, connect: Callable[[], Pool]) -> Generator[Outcome[Any], None, None]:
        if not self.total:
            return
        pool = connect()

        def kill() -> None:  # the process ends while the caller still has the iterator
            pool.close(kill=True)

        atexit.register(kill)
        finished = False
        try:
            count = 0
            while self._step(pool):
                while self.ended:
                    outcome = self.ended.popleft()
                    count += 1
                    if self.on_done:
                        self.on_done(outcome, count, self.total)
                    yield outcome
            finished = True
        finally:
            atexit.unregister(kill)
            try:
                pool.close(kill=not finished)
            finally:  # after the workers: a cell that is free may not be at work any more
                for task in (*self.waiting, *self.busy.values()):
                    if task.claim:
                        task.claim.release()

    def _step(self, pool: Pool) -> bool:
        """Until some cells have ended, with what is next already handed out. False when there are none left."""
        self._hand_out(pool)
        if not self.ended and (self.waiting or self.busy):
            for event in pool.wait():
                self._take(event, pool.size)
            self._hand_out(pool)
        if not (self.ended or self.waiting or self.busy):
            if self.last_look or not self.held:
                return False
            self.queue, self.held, self.last_look = self.held, self.queue, True
        return True

    def _hand_out(self, pool: Pool) -> None:
        """Give every worker that there may be a cell, or stop at the first cell that is left alone."""
        ended = len(self.ended)
        while self.queue and len(self.ended) == ended and len(self.waiting) + len(self.busy) < pool.size:
            self._admit(self.queue.popleft())
        while len(self.idle) + len(self.starting) < len(self.waiting):
            self.starting.add(pool.start())
        while self.waiting and self.idle:
            self._submit(pool, self.idle.pop(), self.waiting.popleft())

    def _admit(self, task: _Task[Any]) -> None:
        """See whether the cell is to be run here, and claim it."""
        try:
            # Asked before the claim to leave finished cells without a lock file, and under it to be sure.
            if self.done and self.done(task.key):
                self.ended.append(task.end(Status.PRESENT))
                return
            if self.folder is not None:
                task.claim = claim(self.folder, task.key)
                if task.claim is None and self.last_look:
                    self.ended.append(task.end(Status.HELD, owner=owner_of(self.folder, task.key)))
                    return
                if task.claim is None:
                    self.held.append(task)
                    return
                if self.done and self.done(task.key):
                    self.ended.append(task.end(Status.PRESENT))
                    return
        except Exception as error:
            self.ended.append(task.fail(*in_words(error, error.__traceback__)))
            return
        self.waiting.append(task)

    def _is_there(self, task: _Task[Any]) -> bool:
        """Whether the result is there; if that cannot be told, it is not."""
        try:
            return self.done is not None and self.done(task.key)
        except Exception:
            return False

    def _submit(self, pool: Pool, worker: int, task: _Task[Any]) -> None:
        task.tries += 1
        self.busy[worker] = task  # before the cell is sent: a stop from here on gives the claim back
        try:
            pool.submit(worker, task.cell)
        except Exception as error:  # the cell cannot be pickled
            del self.busy[worker]
            self.idle.append(worker)
            self.ended.append(task.fail(*in_words(error, error.__traceback__)))

    def _take(self, event: Event, size: int) -> None:
        worker = event.worker
        value, error, trace = event.reply
        if event.kind is Kind.READY:
            self.starting.discard(worker)
            self.idle.append(worker)
            self.lost = 0
        elif event.kind is Kind.UNREADY:
            raise SetupError(f"setup failed, so no cell can run: {error}\n{trace}")
        elif event.kind is Kind.REPLY:
            task = self.busy.pop(worker)
            self.idle.append(worker)
            self.ended.append(task.fail(error, trace) if error else task.end(Status.DONE, value=value))
        elif worker in self.starting:
            self.starting.discard(worker)
            self.lost += 1
            if self.lost > max(size, self.retries):
                raise SetupError(f"{self.lost} workers in a row died in setup; the last one {event.how}")
        elif worker in self.busy:
            task = self.busy.pop(worker)
            if self._is_there(task):  # it wrote the result and died before it could say so
                self.ended.append(task.end(Status.PRESENT))
            elif task.tries <= self.retries:
                self.waiting.appendleft(task)
            else:
                self.ended.append(task.fail(f"its worker died in try {task.tries} of {task.tries}; it {event.how}"))
        else:
            self.idle.remove(worker)
