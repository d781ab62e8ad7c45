"""The engine of one machine: in the calling process, or in spawned processes that each have cores of their own.

A worker process has one pipe to the driver and nothing else in common with its siblings, so that any of them can be
killed at any time. It ends by itself when the driver dies, also in the middle of a cell.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from vistok.engine.cells import Resources
from vistok.engine.schedule import Engine, Event, Kind, Pool, Reply, attempt, in_words

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""What torch and the BLAS libraries read when they are imported."""
_GRACE = 5.0  # seconds that an idle worker has to leave


class LocalEngine(Engine):
    """Runs the cells on this machine.

    One worker runs in the calling process, where a debugger and a profiler reach it; a crash of the cell is then a
    crash of the caller. Several workers, or one with ``spawn=True``, are processes of their own: pinned to their own
    cores (where the system can), each with its own GPUs, replaced when they die. As with every spawned process, the
    caller's script must start its work under ``if __name__ == "__main__":``.
    """

    def __init__(self, workers: int | None = 1, *, spawn: bool = False) -> None:
        """``workers=None``: as many as the machine's cores, GPUs and memory allow. More than there are cores share.

        Raises:
            ValueError: fewer than one worker.
        """
        if workers is not None and workers < 1:
            raise ValueError(f"workers is {workers}; it is 1 or more, or None for as many as fit")
        self.workers, self.spawn = workers, spawn

    def _pool(self, fn: Callable[[Any, Any], Any], setup: Callable[[], Any], resources: Resources) -> Pool:
        workers, cores = self.workers, _cores()
        devices = _gpus() if resources.gpus else []
        most = {
            "cpus": len(cores) // resources.cpus,
            "gpus": _sharers(len(devices), resources.gpus),
            "memory": _memory() // resources.memory if resources.memory else sys.maxsize,
        }
        for name, fit in most.items():
            # Several workers may share a core, and wait for one another; GPUs and memory would be overfull.
            if fit < (1 if workers is None or name == "cpus" else workers):
                raise ValueError(
                    f"resources.{name} is {getattr(resources, name)}, for {workers or 1} worker(s); this machine has "
                    f"{len(cores)} cores, {len(devices)} GPUs counted, {_memory()} bytes of memory"
                )
        if workers == 1 and not self.spawn:
            return _Inline(fn, setup, resources.cpus)
        return _Processes(pickle.dumps((fn, setup)), resources, workers or min(most.values()), cores, devices)


class _Inline:
    """The one worker that is the calling process."""

    size = 1

    def __init__(self, fn: Callable[[Any, Any], Any], setup: Callable[[], Any], cpus: int) -> None:
        self.fn, self.setup, self.cpus = fn, setup, cpus
        self.state: Any = None
        self.next: Callable[[], Event] = self._set_up

    def start(self) -> int:
        self.next = self._set_up
        return 0

    def submit(self, worker: int, cell: Any) -> None:
        self.next = lambda: Event(worker, Kind.REPLY, self._call(self.fn, self.state, cell))

    def wait(self) -> list[Event]:
        """Does the work: a cell must not begin before the caller has the outcome of the one before."""
        return [self.next()]

    def _set_up(self) -> Event:
        self.state, error, trace = self._call(self.setup)
        return Event(0, Kind.UNREADY if error else Kind.READY, (None, error, trace))

    def close(self, kill: bool) -> None:
        self.state = None

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Reply:
        """With as many threads as a worker of its own would have: the sums come out the same."""
        torch = sys.modules.get("torch")
        if torch is None:
            return attempt(function, *arguments)
        before = torch.get_num_threads()
        torch.set_num_threads(self.cpus)
        try:
            return attempt(function, *arguments)
        finally:
            torch.set_num_threads(before)


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection
    slot: int
    ready: bool = False


class _Processes:
    """Spawned workers; the slot of a dead one, with its cores and GPUs, goes to the next."""

    def __init__(
        self, job: bytes, resources: Resources, size: int, cores: Sequence[int], devices: Sequence[str]
    ) -> None:
        self.size = size
        self.job, self.resources, self.cores, self.devices = job, resources, cores, devices
        self.context = multiprocessing.get_context("spawn")
        self.workers: dict[int, _Worker] = {}
        self.started = 0

    def start(self) -> int:
        slot = min(set(range(self.size)) - {worker.slot for worker in self.workers.values()})
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_serve, args=(theirs, self.job), name=f"vistok-worker-{slot}")
        variables = dict.fromkeys(THREADS, str(self.resources.cpus))
        if self.resources.gpus:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(share_of(self.devices, self.resources.gpus, slot))
        first = slot * self.resources.cpus
        cores = {self.cores[i % len(self.cores)] for i in range(first, first + self.resources.cpus)}
        with _inherited(variables, cores):
            process.start()
        theirs.close()  # the worker's end is then open in the worker only: its death ends the pipe
        self.started += 1
        self.workers[self.started] = _Worker(process, ours, slot)
        return self.started

    def submit(self, worker: int, cell: Any) -> None:
        data = pickle.dumps(cell)
        with contextlib.suppress(OSError):  # dead already: ``wait`` will say so
            self.workers[worker].pipe.send_bytes(data)

    def wait(self) -> list[Event]:
        # A worker's own children may keep its pipe open after its death, so that both are watched.
        watched: dict[Any, int] = {}
        for number, worker in self.workers.items():
            watched[worker.pipe] = watched[worker.process.sentinel] = number
        return [self._event(number) for number in dict.fromkeys(watched[thing] for thing in wait(list(watched)))]

    def _event(self, number: int) -> Event:
        worker = self.workers[number]
        try:
            if not worker.pipe.poll():  # only the process ended
                raise EOFError
            data = worker.pipe.recv_bytes()
        except (EOFError, OSError):
            del self.workers[number]
            worker.pipe.close()
            worker.process.join(_GRACE)
            worker.process.kill()
            worker.process.join()
            return Event(number, Kind.DIED, how=_how(worker.process.exitcode))
        try:
            reply = pickle.loads(data)
        except Exception as error:
            reply = (None, *in_words(error, error.__traceback__))
        if worker.ready:
            return Event(number, Kind.REPLY, reply)
        worker.ready = True
        return Event(number, Kind.UNREADY if reply[1] else Kind.READY, reply)

    def close(self, kill: bool) -> None:
        deadline = time.monotonic() + (0.0 if kill else _GRACE)
        for worker in self.workers.values():
            worker.pipe.close()  # an idle worker leaves at this
            if kill:
                worker.process.kill()
        for worker in self.workers.values():
            worker.process.join(max(0.0, deadline - time.monotonic()))
            worker.process.kill()
            worker.process.join()
        self.workers.clear()


def _serve(pipe: Connection, job: bytes) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the driver decides
    threading.Thread(target=_die_with_driver, daemon=True).start()
    pair, error, trace = attempt(pickle.loads, job)  # torch may be imported here, and not before
    state = None
    if not error:
        fn, setup = pair
        state, error, trace = attempt(setup)
    with contextlib.suppress(EOFError, OSError):  # the driver is gone or has no more cells
        pipe.send_bytes(pickle.dumps((None, error, trace)))
        while not error:
            data = pipe.recv_bytes()
            pipe.send_bytes(attempt_pickled(fn, state, data))


def attempt_pickled(fn: Callable[[Any, Any], Any], state: Any, cell: bytes) -> bytes:
    """``attempt`` on a pickled cell; what cannot be pickled or unpickled is an error of that cell like any other."""
    value, error, trace = attempt(pickle.loads, cell)
    reply = (None, error, trace) if error else attempt(fn, state, value)
    data, error, trace = attempt(pickle.dumps, reply)
    return pickle.dumps((None, error, trace)) if error else data


def _die_with_driver() -> None:
    """End this process when its driver ends: what it works on belongs to nobody then, and the next driver redoes it."""
    driver = multiprocessing.parent_process()
    if driver is not None:
        driver.join()
        os._exit(1)


@contextlib.contextmanager
def _inherited(variables: dict[str, str], cores: set[int]) -> Iterator[None]:
    """What a process started inside the ``with`` has from its first instruction on, before it imports anything."""
    before = {name: os.environ.get(name) for name in variables}
    pinned = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    os.environ.update(variables)
    try:
        if pinned:
            os.sched_setaffinity(0, cores)
        yield
    finally:
        if pinned:
            os.sched_setaffinity(0, pinned)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def share_of(devices: Sequence[str], gpus: float, slot: int) -> Sequence[str]:
    """The GPUs of worker ``slot``: the next ``gpus`` of them, or the one that it shares with its neighbours."""
    if gpus >= 1:
        return devices[slot * int(gpus) : (slot + 1) * int(gpus)]
    first = slot // math.floor(1 / gpus)
    return devices[first : first + 1]


def _sharers(devices: int, gpus: float) -> int:
    """How many workers with ``gpus`` each so many devices carry."""
    if not gpus:
        return sys.maxsize
    return devices // int(gpus) if gpus >= 1 else devices * math.floor(1 / gpus)


def _cores() -> list[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _gpus() -> list[str]:
    """The CUDA devices that this process may use, as names for CUDA_VISIBLE_DEVICES."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def _memory() -> int:
    """Bytes of main memory; without a limit where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return sys.maxsize


def _how(code: int | None) -> str:
    """How a process ended, in words."""
    if code is None or code >= 0:
        return f"exited with status {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
