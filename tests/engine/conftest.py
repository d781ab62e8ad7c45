"""Bounded time for every test, and one small Ray for those that need it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vistok.engine import LocalEngine, RayEngine


@pytest.fixture(autouse=True)
def bounded():
    """A scheduler that is wrong waits for ever: no test may."""

    def stop(number, frame):
        raise TimeoutError("the test took more than 180 s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(180)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def small_ray():
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'vistok[ray]'")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=80 * 1024**2,
    )
    yield ray
    ray.shutdown()


@pytest.fixture(params=["in this process", "one process", "two processes", "ray"])
def engine(request):
    """Each way to run cells."""
    if request.param == "ray":
        request.getfixturevalue("small_ray")
        return RayEngine(workers=2)
    workers = 2 if request.param == "two processes" else 1
    return LocalEngine(workers, spawn=request.param == "one process")


@pytest.fixture(params=["two processes", "ray"])
def processes(request):
    """Engines whose workers can be killed."""
    if request.param == "ray":
        request.getfixturevalue("small_ray")
        return RayEngine(workers=2)
    return LocalEngine(2)


@pytest.fixture
def drive(tmp_path):
    """Start drivers on ``tmp_path``, in sessions of their own; what is left of them is killed after the test."""
    started = []

    def start(*options: str) -> subprocess.Popen:
        driver = subprocess.Popen(
            [sys.executable, "-m", "tests.engine.driver", str(tmp_path), *options],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(driver)
        return driver

    yield start
    for driver in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
        driver.communicate()
