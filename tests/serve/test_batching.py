"""The batcher with a made-up runner: nothing lost, nothing mixed, in order, within bounds, and no way to hang it."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vistok.serve.batching import (
    Batcher,
    BatcherClosed,
    DeadlineExceeded,
    End,
    Failed,
    Job,
    JobCancelled,
    JobFailed,
    Observer,
    Outcome,
    QueueFull,
)

SOON_S = 0.2
"""What the server promises for a place that a client left."""
LONG_S = 10.0
"""A test that waits this long has failed."""
Emit, Cancelled = Callable[[int, Any], None], Callable[[int], bool]


@dataclass(frozen=True)
class Ask:
    """What a job of these tests asks for."""

    name: int
    key: Hashable = "a"
    parts: int = 2
    how: str = "well"


class Fake:
    """A runner that answers with the job's name. It waits at the ``gate`` first, asking for cancelled rows."""

    def __init__(self) -> None:
        self.batches: list[list[Ask]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Event()
        self.patient = False
        """Whether it stays at a closed gate although nobody waits for any row."""
        self._at_work = threading.Lock()

    def __call__(self, asks: Sequence[Ask], emit: Emit, cancelled: Cancelled) -> None:
        assert self._at_work.acquire(blocking=False), "two batches at once"
        try:
            self.batches.append(list(asks))
            self.begun.set()
            while not self.gate.wait(0.002):
                if not self.patient and all(cancelled(row) for row in range(len(asks))):
                    return
            if any(ask.how == "raises" for ask in asks):
                raise RuntimeError("a bad one")
            for part in range(max(ask.parts for ask in asks)):
                for row, ask in enumerate(asks):
                    if part < ask.parts:
                        emit(row, (ask.name, part))
            if any(ask.how == "raises late" for ask in asks):
                raise RuntimeError("a bad one, late")
            for row, ask in enumerate(asks):
                if ask.how == "fails":
                    emit(row, Failed(LookupError(ask.name)))
                elif ask.how == "well":
                    emit(row, End(ask.name))
                if ask.how != "silent":
                    emit(row, "too late")
        finally:
            self._at_work.release()


class Tally(Observer):
    def __init__(self) -> None:
        self.outcomes: Counter[Outcome] = Counter()
        self.sizes: list[int] = []

    def batch(self, key: Hashable, size: int, seconds: float) -> None:
        assert seconds >= 0
        self.sizes.append(size)

    def over(self, key: Hashable, outcome: Outcome, waited_s: float, ran_s: float) -> None:
        assert waited_s >= 0 and ran_s >= 0
        self.outcomes[outcome] += 1


@contextmanager
def closed_gate(fake: Fake) -> Iterator[None]:
    fake.gate.clear()
    try:
        yield
    finally:
        fake.gate.set()


def put(batcher: Batcher[Ask], ask: Ask, deadline_s: float = LONG_S) -> Job[Ask]:
    return batcher.submit(ask, ask.key, deadline_s)


async def read(job: Job[Ask]) -> list[Any]:
    """All events; the error as the last one."""
    events = []
    try:
        async for event in job:
            events.append(event)
    except Exception as error:
        events.append(error)
    return events


async def until(true: Callable[[], object], seconds: float = LONG_S) -> float:
    """Wait until it is; how long that took."""
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < seconds, "waited in vain"
        await asyncio.sleep(0.001)
    return time.monotonic() - start


async def occupy(batcher: Batcher[Ask], fake: Fake) -> Job[Ask]:
    """A job of a key of its own that stands at the closed gate."""
    fake.begun.clear()
    job = put(batcher, Ask(-1, "occupied"))
    await until(fake.begun.is_set)
    return job


def answer(ask: Ask) -> list[Any]:
    return [*((ask.name, part) for part in range(ask.parts)), End(ask.name)]


def by_hand(asks: Sequence[Ask], max_batch: int) -> list[list[Ask]]:
    """The batches that a queue of ``asks`` is to fall into."""
    left, batches = list(asks), []
    while left:
        batch = [ask for ask in left if ask.key == left[0].key][:max_batch]
        left = [ask for ask in left if ask not in batch]
        batches.append(batch)
    return batches


HOW = st.sampled_from(["well", "well", "well", "raises", "fails", "silent"])
ASKS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 4), HOW), min_size=1, max_size=24)


@settings(max_examples=60)
@given(ASKS, st.integers(1, 5), st.integers(1, 24))
def test_every_job_gets_its_own_answer_in_order(
    drawn: list[tuple[str, int, str]], max_batch: int, queue_length: int
) -> None:
    asks = [Ask(name, key, parts, how) for name, (key, parts, how) in enumerate(drawn)]
    fake, tally = Fake(), Tally()

    async def scenario() -> tuple[list[list[Any]], int]:
        batcher = Batcher(fake, max_batch=max_batch, max_wait_ms=0, queue_length=queue_length, observer=tally)
        refused, jobs = 0, []
        with closed_gate(fake):
            first = await occupy(batcher, fake)
            for ask in asks:
                try:
                    jobs.append(put(batcher, ask))
                except QueueFull as full:
                    assert full.retry_after_s > 0
                    refused += 1
            assert batcher.waiting == len(jobs) and batcher.running == 1
        got = await asyncio.gather(*(read(job) for job in [first, *jobs]))
        assert await batcher.close()
        assert [job.outcome for job in jobs] == ["done" if ask.how == "well" else "failed" for ask in asks[: len(jobs)]]
        return got[1:], refused

    got, refused = asyncio.run(asyncio.wait_for(scenario(), LONG_S))
    taken = asks[:queue_length]
    assert refused == len(asks) - len(taken) and len(got) == len(taken)
    for ask, events in zip(taken, got, strict=True):
        *parts, last = events
        if ask.how == "well":
            assert events == answer(ask)
        elif ask.how == "fails":
            assert parts == answer(ask)[:-1] and isinstance(last, LookupError) and last.args == (ask.name,)
        else:
            assert isinstance(last, JobFailed)
            assert parts == ([] if ask.how == "raises" else answer(ask)[:-1])
    expected = []
    for batch in by_hand(taken, max_batch):
        expected.append(batch)
        if len(batch) > 1 and any(ask.how == "raises" for ask in batch):
            expected += [[ask] for ask in batch]
    assert fake.batches[1:] == expected
    assert tally.sizes == [len(batch) for batch in fake.batches]
    assert tally.outcomes.total() == len(taken) + 1


@settings(max_examples=60)
@given(st.lists(st.sampled_from("abcd"), max_size=30), st.integers(1, 5))
def test_a_job_begins_after_as_many_batches_as_stood_before_it(keys: list[str], max_batch: int) -> None:
    """The oracle of the test above starves nobody, and keeps the order of a key."""
    asks = [Ask(name, key) for name, key in enumerate(keys)]
    batches = by_hand(asks, max_batch)
    for number, batch in enumerate(batches):
        assert all(ask.name >= number for ask in batch)
    for key in set(keys):
        order = [ask.name for batch in batches for ask in batch if ask.key == key]
        assert order == sorted(order)


@pytest.mark.parametrize("seed", range(6))
def test_in_a_crowd_that_comes_and_goes(seed: int) -> None:
    """Clients that come at any time, read slowly, go away, or ask for too short a time."""
    dice, tally, fake = random.Random(seed), Tally(), Fake()

    def slow(asks: Sequence[Ask], emit: Emit, cancelled: Cancelled) -> None:
        time.sleep(0.001)
        fake(asks, emit, cancelled)

    async def client(batcher: Batcher[Ask], ask: Ask) -> Outcome | None:
        await asyncio.sleep(dice.random() * 0.1)
        leaves, deadline_s = dice.random() < 0.3, dice.choice([0.002, LONG_S, LONG_S])
        try:
            async with put(batcher, ask, deadline_s) as job:
                events = []
                try:
                    async for event in job:
                        events.append(event)
                        if leaves:
                            break
                        await asyncio.sleep(dice.random() * 0.002)
                except (DeadlineExceeded, JobFailed) as error:
                    events.append(error)
                known = answer(ask)
                assert events == known[: len(events)] or (
                    isinstance(events[-1], Exception) and events[:-1] == known[: len(events) - 1]
                )
            return job.outcome
        except QueueFull:
            return None

    async def scenario() -> list[Outcome | None]:
        batcher = Batcher(slow, max_batch=4, max_wait_ms=1, queue_length=12, observer=tally)
        hows = ["well"] * 9 + ["raises", "raises late", "silent"]
        asks = [Ask(name, dice.choice("ab"), dice.randrange(1, 5), dice.choice(hows)) for name in range(80)]
        outcomes = await asyncio.wait_for(asyncio.gather(*(client(batcher, ask) for ask in asks)), LONG_S)
        assert await batcher.close()
        assert batcher.waiting == batcher.running == 0
        return outcomes

    outcomes = asyncio.run(scenario())
    told = Counter(outcome for outcome in outcomes if outcome is not None)
    assert told == tally.outcomes, "a job is over once, as its client sees it"
    assert told["done"] > 10


def test_parts_come_before_the_end_and_a_short_answer_before_a_long_one() -> None:
    more = threading.Event()

    def run(asks: Sequence[Ask], emit: Emit, cancelled: Cancelled) -> None:
        emit(0, "short")
        emit(0, End())
        emit(1, "long")
        assert more.wait(LONG_S)
        emit(1, End())

    async def scenario() -> None:
        batcher = Batcher(run, max_batch=2, max_wait_ms=1e3 * LONG_S)
        short, long = put(batcher, Ask(0)), put(batcher, Ask(1))
        assert await read(short) == ["short", End()]
        assert await anext(long) == "long" and long.outcome is None and batcher.running == 1
        more.set()
        assert await read(long) == [End()]
        await batcher.close()

    asyncio.run(asyncio.wait_for(scenario(), LONG_S))


def test_no_event_is_lost_between_the_threads() -> None:
    def run(asks: Sequence[Ask], emit: Emit, cancelled: Cancelled) -> None:
        for part in range(5000):
            emit(0, part)
            if part % 700 == 0:
                time.sleep(0.001)
        emit(0, End())

    async def scenario() -> None:
        batcher = Batcher(run, max_wait_ms=0)
        assert await read(put(batcher, Ask(0))) == [*range(5000), End()]
        await batcher.close()

    asyncio.run(asyncio.wait_for(scenario(), LONG_S))


def test_an_event_that_comes_just_as_the_reader_goes_to_sleep() -> None:
    """Between its look at the events and its clearing of the flag that says there are new ones."""
    emits: list[Emit] = []
    finish = threading.Event()

    def run(asks: Sequence[Ask], emit: Emit, cancelled: Cancelled) -> None:
        emits.append(emit)
        assert finish.wait(LONG_S)
        emit(0, End())

    class Late(asyncio.Event):
        def clear(self) -> None:
            emits.pop()(0, "just now")
            super().clear()

    async def scenario() -> None:
        batcher = Batcher(run, max_wait_ms=0)
        job = put(batcher, Ask(0))
        await until(lambda: emits)
        job._ready = Late()
        job._ready.set()
        try:
            assert await asyncio.wait_for(anext(job), 1) == "just now"
        finally:
            finish.set()
            await batcher.close()

    asyncio.run(asyncio.wait_for(scenario(), LONG_S))


def test_a_waiting_job_that_is_cancelled_leaves_the_queue_at_once() -> None:
    fake = Fake()

    async def scenario() -> None:
        batcher = Batcher(fake, queue_length=1)
        with closed_gate(fake):
            first = await occupy(batcher, fake)
            gone = put(batcher, Ask(0))
            with pytest.raises(QueueFull):
                put(batcher, Ask(1))
            gone.cancel()
            gone.cancel()
            stays = put(batcher, Ask(2))
        assert isinstance((await read(gone))[-1], JobCancelled) and gone.outcome == "cancelled"
        assert await read(stays) == answer(Ask(2)) and (await read(first))[-1] == End(-1)
        await batcher.close()
        assert [ask.name for batch in fake.batches for ask in batch] == [-1, 2]

    asyncio.run(asyncio.wait_for(scenario(), LONG_S))


def test_a_running_job_that_is_cancelled_frees_its_place_soon() -> None:
    """As a server does it: the task that reads is cancelled when the client goes away."""
    fake = Fake()

    async def client(batcher: Batcher[Ask]) -> None:
        async with put(batcher, Ask(0)) as job:
            await read(job)

    async def scenario() -> None:
        batcher = Batcher(fake)
        with closed_gate(fake):
            task = asyncio.create_task(client(batcher))
            await until(fake.begun.is_set)
            assert batcher.running == 1
            task.cancel()
            await until(lambda: batcher.running == 0, SOON_S)
            with pytest.raises(asyncio.CancelledError):
                await task
        assert await read(put(batcher, Ask(1))) == answer(Ask(1))
        await batcher.close()

    asyncio.run(asyncio.wait_for(scenario(), LONG_S))


def test_a_deadline_holds_for_jobs_that_wait_and_for_a_runner_that_does_not_look() -> None:
    fake = Fake()
    fake.patient = True

    async def scenario() -> None:
        batcher = Batcher(fake, queue_length=1)
        with closed_gate(fake):
            running = put(batcher, Ask(0), deadline_s=0.05)
            await until(fake.begun.is_set)
            waiting = put(batcher, Ask(1), deadline_s=0.02)
            start = time.monotonic()
            assert isinstance((await read(waiting))[-1], DeadlineExceeded) and batcher.waiting == 0
            assert isinstance((await read(running))[-1], DeadlineExceeded)
            assert 0.02 < time.monotonic() - start < 1
            assert batcher.running == 1, "the runner has not come back"
        assert await read(put(batcher, Ask(2))) == answer(Ask(2))
        assert await batcher.close()
        assert [ask.name for batch in fake.batches for ask in batch] == [0, 2]

    asyncio.run(asyncio.wait_for(scenario(), LONG_S))


def test_the_runner_learns_of_a_deadline_although_the_event_loop_is_busy() -> None:
    seen = threading.Event()

    def run(asks: Sequence[Ask], emit: Emit, cancelled: Cancelled) -> None:
        while not cancelled(0):
            time.sleep(0.001)
        seen.set()

    async def scenario() -> None:
        batcher = Batcher(run, max_wait_ms=0)
        job = put(batcher, Ask(0), deadline_s=0.02)
        assert seen.wait(LONG_S), "this blocks the loop"
        assert isinstance((await read(job))[-1], DeadlineExceeded)
        await batcher.close()

    asyncio.run(scenario())


def test_a_job_whose_client_has_read_a_part_is_not_run_again() -> None:
    fake = Fake()

    async def scenario() -> None:
        batcher = Batcher(fake, max_batch=3, max_wait_ms=1e3 * LONG_S)
        asks = [Ask(0, parts=1), Ask(1, how="raises late"), Ask(2, parts=0)]
        got = await asyncio.gather(*(read(put(batcher, ask)) for ask in asks))
        assert got[0][0] == (0, 0) and isinstance(got[0][1], JobFailed)
        assert isinstance(got[1][-1], JobFailed) and str(got[1][-1].__cause__) == "a bad one, late"
        assert got[2] == [End(2)]
        assert [[ask.name for ask in batch] for batch in fake.batches] == [[0, 1, 2], [2]]
        await batcher.close()

    asyncio.run(asyncio.wait_for(scenario(), LONG_S))


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_no_exception_ends_the_worker(error: type[BaseException]) -> None:
    def run(asks: Sequence[Ask], emit: Emit, cancelled: Cancelled) -> None:
        if asks[0].how == "raises":
            raise error
        emit(0, End())

    async def scenario() -> None:
        batcher = Batcher(run, max_wait_ms=0)
        (failed,) = await read(put(batcher, Ask(0, how="raises")))
        assert isinstance(failed, JobFailed) and isinstance(failed.__cause__, error)
        assert await read(put(batcher, Ask(1))) == [End()]
        await batcher.close()

    asyncio.run(asyncio.wait_for(scenario(), LONG_S))


def test_an_event_loop_that_closes_leaves_nothing_behind() -> None:
    fake, tally = Fake(), Tally()
    batcher = Batcher(fake, max_wait_ms=0, observer=tally)

    async def leaves() -> None:
        put(batcher, Ask(0))
        await until(fake.begun.is_set)
        put(batcher, Ask(1))

    async def comes() -> None:
        assert await read(put(batcher, Ask(2))) == answer(Ask(2))
        assert await batcher.close()

    with closed_gate(fake):
        asyncio.run(leaves())
        start = time.monotonic()
        while batcher.running or batcher.waiting:
            assert time.monotonic() - start < LONG_S
            time.sleep(0.001)
    asyncio.run(asyncio.wait_for(comes(), LONG_S))
    assert tally.outcomes == {"cancelled": 2, "done": 1}


def test_an_event_loop_that_closes_while_parts_arrive() -> None:
    closed, emitted = threading.Event(), threading.Event()

    def run(asks: Sequence[Ask], emit: Emit, cancelled: Cancelled) -> None:
        emit(0, "first")
        assert closed.wait(LONG_S)
        emit(0, "second")
        assert cancelled(0)
        emitted.set()

    batcher = Batcher(run, max_wait_ms=0)

    async def leaves() -> None:
        assert await anext(put(batcher, Ask(0))) == "first"

    async def ends() -> None:
        assert await batcher.close()

    asyncio.run(leaves())
    closed.set()
    assert emitted.wait(LONG_S)
    asyncio.run(ends())


def test_closing_finishes_what_runs_and_what_waits() -> None:
    fake = Fake()

    async def scenario() -> None:
        batcher = Batcher(fake, max_batch=2, max_wait_ms=1e3 * LONG_S)
        with closed_gate(fake):
            jobs = [put(batcher, Ask(name)) for name in range(3)]
            await until(fake.begun.is_set)
            closing = asyncio.create_task(batcher.close())
            await asyncio.sleep(0.01)
            with pytest.raises(BatcherClosed):
                put(batcher, Ask(3))
            assert not closing.done()
        assert await closing
        assert [await read(job) for job in jobs] == [answer(Ask(name)) for name in range(3)]
        assert await batcher.close(), "a second time is no harm"

    asyncio.run(asyncio.wait_for(scenario(), LONG_S))


@pytest.mark.parametrize("patient", [False, True])
def test_closing_has_a_bound(patient: bool) -> None:
    fake, tally = Fake(), Tally()
    fake.patient = patient

    async def scenario() -> None:
        batcher = Batcher(fake, max_wait_ms=0, observer=tally)
        with closed_gate(fake):
            running = await occupy(batcher, fake)
            waiting = put(batcher, Ask(0))
            start = time.monotonic()
            assert not await batcher.close(grace_s=0.05)
            took = time.monotonic() - start
            assert (took < 0.9) != patient and took < 3
            for job in (running, waiting):
                assert isinstance((await read(job))[-1], BatcherClosed)
        assert await batcher.close(), "the thread ends when the runner comes back"

    asyncio.run(asyncio.wait_for(scenario(), LONG_S))
    assert len(fake.batches) == 1 and tally.outcomes == {"closed": 2}


def test_close_that_is_cancelled_can_be_called_again() -> None:
    fake = Fake()

    async def scenario() -> None:
        batcher = Batcher(fake)
        with closed_gate(fake):
            job = await occupy(batcher, fake)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(batcher.close(), 0.02)
        assert await batcher.close() and (await read(job))[-1] == End(-1)

    asyncio.run(asyncio.wait_for(scenario(), LONG_S))


def test_how_long_a_job_waits_for_others() -> None:
    fake = Fake()

    async def alone() -> None:
        batcher = Batcher(fake, max_batch=2, max_wait_ms=100)
        start = time.monotonic()
        await read(put(batcher, Ask(0)))
        assert 0.1 <= time.monotonic() - start < 1, "alone it waits as long as may be"
        await batcher.close()

    async def together() -> None:
        batcher = Batcher(fake, max_batch=2, max_wait_ms=1e3 * LONG_S)
        jobs = [put(batcher, Ask(1)), put(batcher, Ask(2, "b"))]
        await asyncio.sleep(0.02)
        assert len(fake.batches) == 1
        jobs.append(put(batcher, Ask(3)))
        await read(jobs[-1])  # a full batch begins at once
        assert [[ask.name for ask in batch] for batch in fake.batches] == [[0], [1, 3]]
        await batcher.close()
        assert await read(jobs[1]) == answer(Ask(2))

    asyncio.run(alone())
    asyncio.run(asyncio.wait_for(together(), LONG_S / 2))


def test_retry_after_grows_with_the_queue() -> None:
    fake = Fake()

    def run(asks: Sequence[Ask], emit: Emit, cancelled: Cancelled) -> None:
        time.sleep(0.02)
        fake(asks, emit, cancelled)

    async def scenario() -> None:
        batcher = Batcher(run, max_batch=1, max_wait_ms=0, queue_length=10)
        assert batcher.retry_after_s == 1.0, "nothing is known yet"
        for name in range(3):
            await read(put(batcher, Ask(name)))
        one = batcher.retry_after_s
        assert 0.02 <= one < 1
        with closed_gate(fake):
            jobs = [await occupy(batcher, fake), *(put(batcher, Ask(name)) for name in range(10))]
            with pytest.raises(QueueFull) as full:
                put(batcher, Ask(99))
            assert full.value.retry_after_s == pytest.approx(10 * one)
        await asyncio.gather(*(read(job) for job in jobs))
        await batcher.close()

    asyncio.run(asyncio.wait_for(scenario(), LONG_S))


def test_an_observer_that_raises_harms_nobody() -> None:
    class Broken(Observer):
        def batch(self, key: Hashable, size: int, seconds: float) -> None:
            raise RuntimeError("batch")

        def over(self, key: Hashable, outcome: Outcome, waited_s: float, ran_s: float) -> None:
            raise RuntimeError("over")

    async def scenario() -> None:
        batcher = Batcher(Fake(), max_wait_ms=0, observer=Broken())
        for name in range(2):
            assert await read(put(batcher, Ask(name))) == answer(Ask(name))
        await batcher.close()

    asyncio.run(asyncio.wait_for(scenario(), LONG_S))


def test_a_worker_that_breaks_leaves_nobody_waiting() -> None:
    class Key:
        __hash__ = object.__hash__

        def __eq__(self, other: object) -> bool:
            raise RuntimeError("cannot be compared")

    async def scenario() -> None:
        batcher = Batcher(Fake(), max_wait_ms=0)
        jobs = [put(batcher, Ask(0, Key()))]
        (last,) = await read(jobs[0])
        assert isinstance(last, BatcherClosed)
        with pytest.raises(BatcherClosed):
            put(batcher, Ask(1))
        assert await batcher.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", lambda args: None)
        asyncio.run(asyncio.wait_for(scenario(), LONG_S))


def test_a_job_that_is_over_lets_go_of_what_it_carried() -> None:
    import gc
    import weakref

    class Heavy:
        pass

    def run(things: Sequence[Heavy], emit: Emit, cancelled: Cancelled) -> None:
        emit(0, End())

    async def scenario() -> None:
        batcher: Batcher[Heavy] = Batcher(run, max_wait_ms=0)
        heavy = Heavy()
        watched = weakref.ref(heavy)
        job = batcher.submit(heavy, "a", LONG_S)
        del heavy
        async for event in job:
            assert event == End()
        await until(lambda: batcher.running == 0)
        gc.collect()
        assert watched() is None and job.outcome == "done"
        await batcher.close()

    asyncio.run(asyncio.wait_for(scenario(), LONG_S))


@pytest.mark.parametrize(
    "wrong", [{"max_batch": 0}, {"max_wait_ms": -1.0}, {"max_wait_ms": float("nan")}, {"queue_length": 0}]
)
def test_wrong_numbers(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Batcher(Fake(), **wrong)


@pytest.mark.parametrize("deadline_s", [0.0, -1.0, float("inf"), float("nan")])
def test_wrong_deadlines(deadline_s: float) -> None:
    async def scenario() -> None:
        batcher = Batcher(Fake())
        with pytest.raises(ValueError, match="deadline_s"):
            put(batcher, Ask(0), deadline_s)
        assert batcher.waiting == 0
        await batcher.close()

    asyncio.run(scenario())
