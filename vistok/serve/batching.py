"""Jobs that arrive one by one, run in batches by a worker thread; each gets its own events back.

Nothing here knows of models. A ``Batcher`` is given ``run(payloads, emit, cancelled)``, which it calls in its thread:

- ``payloads``: what was submitted, at most ``max_batch`` jobs of one key.
- ``emit(row, event)``: to the job ``payloads[row]``. ``End(result)`` and ``Failed(error)`` are a job's last event;
  whatever else is passed on as it is. Rows may end at different times. Thread-safe, never blocks, never raises for a
  job that is over: what comes too late is dropped.
- ``cancelled(row)``: whether nobody waits for this row any more. To be asked at every step, so that the row's place is
  free soon after. Such a row needs no last event.

The life of a job:

1. *Waiting*, from ``submit`` on. The queue is bounded: beyond it ``submit`` raises ``QueueFull``.
2. *Running*, from when the worker takes it. Batches begin with the job that has waited longest, and take those of its
   key that came after it, oldest first. So jobs of one key keep their order, and a job begins at the latest after as
   many batches as jobs stood before it: no key starves another. The worker waits for more jobs of the key until
   ``max_wait_ms`` after the first one came; under load that time is over when a batch begins.
3. *Over*, once, by the first of: its ``End`` ("done"); ``Failed``, or an exception of ``run`` ("failed"); ``cancel``,
   or a closed event loop ("cancelled"); its deadline ("deadline"); the end of the batcher ("closed"). A waiting job
   leaves the queue in that moment. For a running one ``cancelled(row)`` turns true; its client does not wait for the
   runner to notice.

When ``run`` raises, those of its jobs that had no event yet are run again, each by itself, so that one bad job fails
alone; one that ran alone, or whose client has read a part of the answer, fails with ``JobFailed``. A job that ``run``
leaves without a last event fails too: nothing is lost in silence.

Threads: a lock guards the queue and the state of jobs. It is held for a few statements, never while ``run``, an
observer or an event loop is called, so it cannot be part of a deadlock. Events cross to the event loop of the job's
client by ``call_soon_threadsafe``; when that loop is closed, the job counts as cancelled. Every job has a deadline, so
also one that its client forgot ends.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Literal, Protocol, TypeVar

P = TypeVar("P")
P_contra = TypeVar("P_contra", contravariant=True)
Outcome = Literal["done", "failed", "cancelled", "deadline", "closed"]
_LOG = logging.getLogger(__name__)
_FIRST_GUESS_S, _LAST_WAIT_S = 1.0, 1.0
_MEMORY = 0.8
"""Share of the older batches in the running mean of seconds a job."""


class QueueFull(Exception):
    """As many jobs wait as may. ``retry_after_s``: about when those that wait now have been served, in seconds."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the queue is full, try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class DeadlineExceeded(Exception):
    """The job's time was over before its answer was complete."""


class BatcherClosed(Exception):
    """The batcher takes no more jobs, or ended before this one was complete."""


class JobCancelled(Exception):
    """Somebody called ``cancel`` while another read the job's events."""


class JobFailed(Exception):
    """The run of this job raised, or ended without its last event. The cause is in ``__cause__``, for the log."""


@dataclass(frozen=True)
class End:
    """The last event of a job that went well."""

    result: Any = None


@dataclass(frozen=True)
class Failed:
    """The last event of a job that did not: its client gets ``error`` raised."""

    error: Exception


class Run(Protocol[P_contra]):
    """What a batcher calls in its thread; see the module's text."""

    def __call__(
        self, payloads: Sequence[P_contra], emit: Callable[[int, Any], None], cancelled: Callable[[int], bool], /
    ) -> None: ...


class Observer:
    """What a batcher reports, for metrics; this one ignores it. Called from the worker's thread or an event loop."""

    def batch(self, key: Hashable, size: int, seconds: float) -> None:
        """A batch of ``size`` jobs has run for so many seconds."""

    def over(self, key: Hashable, outcome: Outcome, waited_s: float, ran_s: float) -> None:
        """A job is over, after so many seconds in the queue and in the runner (0 if it never ran)."""


class Job(Generic[P]):
    """One submitted job: an async iterator of its events, made by ``Batcher.submit``.

        async with batcher.submit(payload, key, deadline_s=30) as job:
            async for event in job:
                ...

    The iteration ends after ``End``, which it yields; it raises what ``Failed`` held, or ``JobFailed``,
    ``DeadlineExceeded``, ``BatcherClosed``, or ``JobCancelled`` if somebody else called ``cancel``. Leaving the
    ``async with`` cancels what is not over. One reader only, on the event loop that submitted the job.
    """

    def __init__(self, batcher: Batcher[P], payload: P, key: Hashable, number: int, deadline_s: float) -> None:
        self.key = key
        self.outcome: Outcome | None = None
        """How it went; None until it is over."""
        self._batcher, self._number = batcher, number
        self._payload: P | None = payload
        self._since = time.monotonic()
        self._began: float | None = None
        self._until = self._since + deadline_s
        self._answered = False
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._events: deque[Any] = deque()
        self._read_all = False
        self._timer: asyncio.TimerHandle | None = None

    def cancel(self) -> None:
        """Nobody waits for it any more. From any thread, any number of times; nothing happens if it is over."""
        self._batcher._end(self, "cancelled", Failed(JobCancelled("the job was cancelled")))

    async def __aenter__(self) -> Job[P]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    def __aiter__(self) -> Job[P]:
        return self

    async def __anext__(self) -> Any:
        while not self._events:
            if self._read_all:
                raise StopAsyncIteration
            # Cleared before the second look: an event that comes after it sets the flag again.
            self._ready.clear()
            if not self._events:
                await self._ready.wait()
        event = self._events.popleft()
        self._read_all = isinstance(event, (End, Failed))
        if isinstance(event, Failed):
            raise event.error
        return event

    def _expire(self) -> None:
        self._batcher._end(self, "deadline", Failed(DeadlineExceeded("the request's time is over")))

    def _wake(self) -> None:
        """Let the reader know of new events; from any thread, without the lock."""
        # A flag that is set is still to be cleared by the reader, who then looks again: it needs no second call.
        if self.outcome is None and self._ready.is_set():
            return
        try:
            self._loop.call_soon_threadsafe(self._ready.set if self.outcome is None else self._finish)
        except RuntimeError:  # the loop is closed: nobody reads
            self.cancel()

    def _finish(self) -> None:
        """After the last event, on the event loop."""
        if self._timer is not None:
            self._timer.cancel()
        self._ready.set()


class Batcher(Generic[P]):
    """Runs jobs in batches, in a thread of its own. One for each model: their queues and threads are apart.

    ``max_batch``: jobs of a batch; ``max_wait_ms``: how long a job waits for others of its key while the worker is
    idle; ``queue_length``: jobs that may wait. Raises ValueError for numbers that make no sense. ``close`` it: the
    thread is a daemon, so a process that forgets to is not held up, but what runs is then lost.
    """

    def __init__(
        self,
        run: Run[P],
        *,
        max_batch: int = 8,
        max_wait_ms: float = 5.0,
        queue_length: int = 256,
        observer: Observer | None = None,
    ) -> None:
        for name, value, least in (
            ("max_batch", max_batch, 1),
            ("max_wait_ms", max_wait_ms, 0),
            ("queue_length", queue_length, 1),
        ):
            if not least <= value < float("inf"):
                raise ValueError(f"{name}: got {value}, must be at least {least} and finite")
        self._run, self._observer = run, observer or Observer()
        self._max_batch, self._max_wait_s, self._queue_length = max_batch, max_wait_ms / 1e3, queue_length
        self._changed = threading.Condition()
        self._waiting: dict[int, Job[P]] = {}
        self._running: list[Job[P]] = []
        self._numbers = itertools.count()
        self._closing = False
        self._seconds_a_job: float | None = None
        self._ended: Future[None] = Future()
        self._thread = threading.Thread(target=self._work, name="vistok-batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Places of the present batch that are taken: its jobs that are not over, and 1 at least until ``run`` has
        come back from a batch that is."""
        jobs = self._running
        return max(1, sum(job.outcome is None for job in jobs)) if jobs else 0

    @property
    def retry_after_s(self) -> float:
        """About how many seconds it takes to serve those who wait now, by the mean of the last batches; above 0."""
        each = self._seconds_a_job
        return _FIRST_GUESS_S if each is None else max(1e-3, each * max(1, self.waiting))

    def submit(self, payload: P, key: Hashable, deadline_s: float) -> Job[P]:
        """Put a job into the queue; to be called on the event loop that will read its events.

        Jobs of equal ``key`` may share a batch. ``deadline_s``: seconds from now until it is given up. Raises
        QueueFull, BatcherClosed, and ValueError for a deadline that is not above 0 and finite.
        """
        if not 0 < deadline_s < float("inf"):
            raise ValueError(f"deadline_s: got {deadline_s}, must be above 0 and finite")
        job = Job(self, payload, key, next(self._numbers), deadline_s)
        with self._changed:
            if self._closing:
                raise BatcherClosed("the server is shutting down")
            if len(self._waiting) >= self._queue_length:
                raise QueueFull(self.retry_after_s)
            self._waiting[job._number] = job
            self._changed.notify_all()
        # The worker may be done with it already; what stops the timer is then still to run on this event loop.
        job._timer = job._loop.call_later(deadline_s, job._expire)
        return job

    async def close(self, grace_s: float = 30.0) -> bool:
        """Take no more jobs, finish those that run or wait, and end the thread. Whether all of it was in time.

        After ``grace_s`` seconds the jobs that are left end with ``BatcherClosed``, and the runner, if it asks
        ``cancelled``, comes back; one that has not after another second is left behind.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        ended = asyncio.wrap_future(self._ended)
        # asyncio.wait leaves the future alone when its own task is cancelled; the worker sets it later.
        in_time, _ = await asyncio.wait({ended}, timeout=grace_s)
        if not in_time:
            self._end_all()
            await asyncio.wait({ended}, timeout=_LAST_WAIT_S)
        return bool(in_time)

    # The state of jobs -------------------------------------------------------------------------------------------

    def _end(self, job: Job[P], outcome: Outcome, last: End | Failed) -> None:
        """Make ``job`` over, if it is not; from any thread."""
        with self._changed:
            if job.outcome is not None:
                return
            job.outcome, job._payload = outcome, None
            job._events.append(last)
            if self._waiting.pop(job._number, None) is not None:
                self._changed.notify_all()
            now = time.monotonic()
            began = now if job._began is None else job._began
        job._wake()
        self._tell(self._observer.over, job.key, outcome, began - job._since, now - began)

    def _end_all(self) -> None:
        with self._changed:
            jobs = [*self._waiting.values(), *self._running]
        for job in jobs:
            self._end(job, "closed", Failed(BatcherClosed("the server is shutting down")))

    def _emit(self, job: Job[P], event: Any) -> None:
        if isinstance(event, (End, Failed)):
            self._end(job, "done" if isinstance(event, End) else "failed", event)
            return
        with self._changed:
            if job.outcome is not None:
                return
            job._answered = True
            job._events.append(event)
        job._wake()

    def _gone(self, job: Job[P]) -> bool:
        """Whether nobody waits for ``job``; one whose event loop is closed, or whose loop was too busy to end it in
        time, ends here."""
        if job.outcome is None and job._loop.is_closed():
            job.cancel()
        elif job.outcome is None and time.monotonic() >= job._until:
            job._expire()
        return job.outcome is not None

    def _tell(self, report: Callable[..., None], *what: Any) -> None:
        try:
            report(*what)
        except Exception:  # metrics must not end a job or the worker
            _LOG.exception("the batcher's observer raised")

    # The worker's thread -----------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while batch := self._next():
                self._run_batch(batch)
                with self._changed:
                    self._running = []
        finally:  # also when a key's comparison raised: nobody must wait for a thread that is gone
            with self._changed:
                self._closing = True
            self._end_all()
            self._ended.set_result(None)

    def _next(self) -> list[Job[P]]:
        """The next batch, waited for; [] when the batcher is closed and nothing waits."""
        with self._changed:
            while True:
                if not self._waiting:
                    if self._closing:
                        return []
                    self._changed.wait()
                    continue
                first = next(iter(self._waiting.values()))
                batch = [job for job in self._waiting.values() if job.key == first.key][: self._max_batch]
                left = first._since + self._max_wait_s - time.monotonic()
                if len(batch) < self._max_batch and left > 0 and not self._closing:
                    self._changed.wait(left)
                    continue
                now = time.monotonic()
                for job in batch:
                    del self._waiting[job._number]
                    job._began = now
                self._running = batch
                return batch

    def _run_batch(self, batch: list[Job[P]]) -> None:
        """Run ``batch``, and if that raises those of its jobs again that have no event yet, one by one."""
        error = self._attempt(batch)
        again = [job for job in batch if error is not None and len(batch) > 1 and not job._answered]
        for job in batch:
            if job not in again:
                self._fail(job, error)
        for job in again:
            self._fail(job, self._attempt([job]))

    def _attempt(self, batch: list[Job[P]]) -> BaseException | None:
        """Run those of ``batch`` that somebody waits for; what ``run`` raised."""
        jobs = [job for job in batch if not self._gone(job)]
        with self._changed:  # a job that ends now gives up its payload
            pairs = [(job, job._payload) for job in jobs if job.outcome is None]
        if not pairs:
            return None
        jobs, payloads = [job for job, _ in pairs], [payload for _, payload in pairs]
        start = time.monotonic()
        try:
            self._run(
                payloads,  # type: ignore[arg-type]  # None only where P has it
                lambda row, event: self._emit(jobs[row], event),
                lambda row: self._gone(jobs[row]),
            )
        except BaseException as error:  # SystemExit too: the thread serves others
            _LOG.warning("a batch of %d raised", len(jobs), exc_info=True)
            return error
        finally:
            seconds = time.monotonic() - start
            each, before = seconds / len(jobs), self._seconds_a_job
            self._seconds_a_job = each if before is None else _MEMORY * before + (1 - _MEMORY) * each
            self._tell(self._observer.batch, jobs[0].key, len(jobs), seconds)
        return None

    def _fail(self, job: Job[P], error: BaseException | None) -> None:
        """End ``job`` if it is not over: ``error``, or nothing, is what its run came to."""
        failure = JobFailed("the run of this job failed" if error else "the run left this job without an end")
        failure.__cause__ = error
        self._end(job, "failed", Failed(failure))


__all__ = [
    "Batcher",
    "BatcherClosed",
    "DeadlineExceeded",
    "End",
    "Failed",
    "Job",
    "JobCancelled",
    "JobFailed",
    "Observer",
    "Outcome",
    "QueueFull",
    "Run",
]
