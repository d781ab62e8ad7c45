"""The engine of a Ray cluster: each worker is an actor, placed by Ray, that ran ``setup()`` once.

Placement, transport and the news that a node died are Ray's; which cell goes where, retries and claims are the loop of
``vistok.engine.schedule``, as on one machine. All machines must have vistok and the module of ``fn`` installed, and a
shared ``folder`` must be one that the driver sees: it alone takes claims. Ray ends the actors of a driver that was
killed or cancelled on its own time, usually within a second, after the claims of their cells are free.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

from vistok.engine.cells import Resources
from vistok.engine.local import THREADS
from vistok.engine.schedule import Engine, Event, Kind, Pool, Reply, attempt, in_words


class RayEngine(Engine):
    """Runs the cells as tasks of Ray actors."""

    def __init__(self, address: str | None = None, workers: int | None = None) -> None:
        """Connects when the first cell is asked for, to the Ray that this process is connected to already, else to
        ``address``, and then disconnects at the end.

        Args:
            address: as for ``ray.init``: "auto", "host:port", "ray://host:port", "local" for a new Ray on this machine;
                None: the one that RAY_ADDRESS names or that was last started here, else a new one.
            workers: actors; None: as many as the cluster has room for when the map starts. Those that find no room
                wait for it, which tells a cluster that can grow to grow.

        Raises:
            ImportError: ray is not installed.
            ValueError: fewer than one worker.
        """
        if workers is not None and workers < 1:
            raise ValueError(f"workers is {workers}; it is 1 or more, or None for as many as fit")
        try:
            import ray
        except ImportError as error:
            raise ImportError("the Ray engine needs ray: pip install 'vistok[ray]'") from error
        self._ray: Any = ray
        self.address, self.workers = address, workers

    def _pool(self, fn: Callable[[Any, Any], Any], setup: Callable[[], Any], resources: Resources) -> Pool:
        ray = self._ray
        connect = not ray.is_initialized()
        try:
            if connect:
                os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # vistok reports to nobody
                ray.init(address=self.address, include_dashboard=False, log_to_driver=False, logging_level="warning")
            size = self.workers or _room(ray.cluster_resources(), resources)
            return _Actors(ray, (fn, setup), resources, size, connect)
        except BaseException:
            if connect:
                ray.shutdown()
            raise


class _Actors:
    """The actors of one map, and one call of each that is on its way."""

    def __init__(self, ray: Any, job: Any, resources: Resources, size: int, disconnect: bool) -> None:
        self.ray, self.size, self.disconnect = ray, size, disconnect
        # In a list, Ray hands the reference on as it is, and the actor unpacks it when its threads are set.
        self.arguments = ([ray.put(job)], resources.cpus)
        # A dead actor is replaced by the loop, which also counts the tries of its cell.
        self.kind = ray.remote(_Worker).options(
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            memory=resources.memory or None,
            max_restarts=0,
            max_task_retries=0,
        )
        self.actors: dict[int, Any] = {}
        self.calls: dict[Any, tuple[int, bool]] = {}  # reference of the reply -> worker, whether it is of setup
        self.started = 0
        errors = ray.exceptions
        self.deaths = (
            errors.RayActorError,
            errors.WorkerCrashedError,
            errors.NodeDiedError,
            errors.OutOfMemoryError,
            errors.ObjectLostError,
        )

    def start(self) -> int:
        self.started += 1
        actor = self.actors[self.started] = self.kind.remote(*self.arguments)
        self.calls[actor.ready.remote()] = (self.started, True)
        return self.started

    def submit(self, worker: int, cell: Any) -> None:
        self.calls[self.actors[worker].run.remote(cell)] = (worker, False)

    def wait(self) -> list[Event]:
        ended, others = self.ray.wait(list(self.calls), num_returns=1)
        if others:  # all that have ended by now: a look at each of a thousand workers for every cell would add up
            ended, _ = self.ray.wait(list(self.calls), num_returns=len(self.calls), timeout=0)
        return [self._event(call) for call in ended]

    def _event(self, call: Any) -> Event:
        worker, of_setup = self.calls.pop(call)
        try:
            reply: Reply = self.ray.get(call)
        except self.deaths as error:
            with contextlib.suppress(Exception):  # out of reach is not dead yet
                self.ray.kill(self.actors.pop(worker))
            return Event(worker, Kind.DIED, how=f"ended with {type(error).__name__}: {error}".strip())
        except Exception as error:  # the cell or its value did not survive the journey
            reply = (None, *in_words(error, error.__traceback__))
        if of_setup:
            return Event(worker, Kind.UNREADY if reply[1] else Kind.READY, reply)
        return Event(worker, Kind.REPLY, reply)

    def close(self, kill: bool) -> None:
        for actor in self.actors.values():
            with contextlib.suppress(Exception):  # the cluster may be gone
                self.ray.kill(actor)
        self.actors.clear()
        self.calls.clear()
        if self.disconnect:
            self.ray.shutdown()


class _Worker:
    """What runs in an actor's process."""

    def __init__(self, job: list[Any], cpus: int) -> None:
        os.environ.update(dict.fromkeys(THREADS, str(cpus)))  # before ``job`` is unpacked, which may import torch
        self.cpus = cpus
        self.fn: Any = None
        self.state, self.error, self.trace = attempt(self._load, job[0])

    def _load(self, job: Any) -> Any:
        import ray

        self.fn, setup = ray.get(job)
        torch = sys.modules.get("torch")
        if torch is not None:
            torch.set_num_threads(self.cpus)
        return setup()

    def ready(self) -> Reply:
        """An error if setup failed."""
        return None, self.error, self.trace

    def run(self, cell: Any) -> Reply:
        return attempt(self.fn, self.state, cell)


def _room(cluster: dict[str, float], resources: Resources) -> int:
    """How many workers the cluster has room for.

    Raises:
        ValueError: not for one.
    """
    needs = {"CPU": resources.cpus, "GPU": resources.gpus, "memory": resources.memory}
    room = min(int(cluster.get(name, 0) / need) for name, need in needs.items() if need)
    if room < 1:
        has = ", ".join(f"{name} {cluster.get(name, 0):g}" for name in needs)
        raise ValueError(f"resources is {resources}, and the Ray cluster has {has}: not enough for one worker")
    return room
