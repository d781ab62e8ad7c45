"""Faults under ``vistok bench run``: real sweeps of a small model, in processes that are killed, crossed and cut short.

Whatever happens, every cell is in the results once at the end, no other cell suffers, and nothing is measured again
that was there. The tests in this process are quick; those of real processes import torch several times and are slow.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.engine.work import alive, until
from tests.small import save_small_model
from vistok.bench import packs, rows
from vistok.bench import run as measuring
from vistok.bench.sweep import Sweep
from vistok.cli.app import app

ROOT = Path(__file__).parents[2]
LIMIT = 480
"""Seconds that a test may take on a busy machine."""
START = 300
"""Seconds of it until the first result is there."""


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    def stop(number, frame):
        raise TimeoutError(f"the test took more than {LIMIT} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("small"))


def sweep_of(folder: Path, model: Path, keep: str = "[0.25]", n: int = 2) -> Path:
    """A file of 3 checks and 1 + 3 cells a count."""
    path = folder / "few.toml"
    path.write_text(f'models = ["{model}"]\nmethods = ["holov"]\nkeep = {keep}\ntasks = ["scenes"]\nn = {n}\n')
    return path


def keys_of(sweep: Path) -> list[str]:
    return [cell.key for cell in Sweep.read(sweep).cells()]


def complete(folder: Path, sweep: Path) -> bool:
    """Whether every cell of the sweep is there, with each of its questions once."""
    cells = Sweep.read(sweep).cells()
    packs._indices.clear()
    found = rows.read(folder)
    counts = dict(found.group_by("cell").len().iter_rows())
    assert not found.select("cell", "question").is_duplicated().any()
    return counts == {cell.key: cell.n for cell in cells} and all(rows.done(folder, cell.key) for cell in cells)


def told(text: str) -> dict[str, str]:
    """Cell -> how it ended, of what ``--json`` prints."""
    lines = [json.loads(line) for line in text.splitlines()]
    assert len({line["cell"] for line in lines}) == len(lines)
    return {line["cell"]: line["status"] for line in lines}


# In this process ------------------------------------------------------------------------------------------------------


def measure(sweep: Path, folder: Path) -> tuple[int, dict[str, str]]:
    """Exit code and how each cell ended, of a run with one worker in this process."""
    packs._indices.clear()
    arguments = ["bench", "run", str(sweep), "--out", str(folder), "--cpus", "1", "--json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "REPEATS", 1)
        result = CliRunner().invoke(app, arguments)
    return result.exit_code, told(result.stdout)


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory) -> tuple[Path, Path]:
    """A sweep and its results, not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    sweep = sweep_of(folder, small)
    assert measure(sweep, folder / "there") == (0, dict.fromkeys(keys_of(sweep), "done"))
    return sweep, folder / "there"


def test_corrupt_results_are_measured_again_and_no_others(finished, tmp_path):
    """One is empty, one cut, one has a bit turned; two more are in a pack that is not whole."""
    sweep, results = finished
    folder = shutil.copytree(results, tmp_path / "there")
    keys = keys_of(sweep)
    saved = {key: rows.place(folder, key).read_bytes() for key in keys}
    for key in keys[2:]:
        rows.place(folder, key).unlink()
    rows.compact(folder)
    (pack,) = packs.packs(folder)
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.write_bytes(data)
    turned = bytearray(saved[keys[4]])
    turned[500] ^= 1
    for key, content in zip(
        keys[2:], (b"", saved[keys[3]][:5000], turned, saved[keys[5]], saved[keys[6]]), strict=True
    ):
        rows.place(folder, key).write_bytes(content)
    expected = {key: "done" if number < 5 else "present" for number, key in enumerate(keys)}
    assert measure(sweep, folder) == (0, expected)
    assert complete(folder, sweep)
    assert len(list(folder.glob("*/*.bad"))) == 4


@contextlib.contextmanager
def no_file_over(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def between(folder: Path) -> int:
    """A size that some result files of the folder exceed and others do not: in the widest gap."""
    sizes = sorted(path.stat().st_size for path in (folder / "rows").iterdir())
    _, low, high = max((b - a, a, b) for a, b in pairwise(sizes))
    return (low + high) // 2


def test_a_full_disk_costs_the_cells_that_met_it(finished, tmp_path):
    sweep, results = finished
    folder = tmp_path / "there"
    with no_file_over(between(results)):
        code, first = measure(sweep, folder)
    assert code == 2 and set(first.values()) == {"done", "failed"}
    assert measured(folder) == {key for key, status in first.items() if status == "done"}
    assert not list((folder / "rows").glob(".*"))
    assert measure(sweep, folder) == (0, after(first))
    assert complete(folder, sweep)


def after(first: dict[str, str]) -> dict[str, str]:
    """How the cells end in the next run."""
    return {key: "present" if status == "done" else "done" for key, status in first.items()}


def measured(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "rows").glob("*.parquet")}


# Real processes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path) -> Iterator:
    """Start ``vistok bench`` in a session of its own; all that is left of them is killed after the test."""
    started = []

    def call(*arguments: object, limit: int = 0, **environment: str) -> subprocess.Popen:
        def confine() -> None:
            if limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        process = subprocess.Popen(
            [sys.executable, "-m", "vistok", "bench", *map(str, arguments)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=(tmp_path / f"errors-{len(started)}").open("w"),
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", **environment},
            start_new_session=True,
            preexec_fn=confine,
        )
        started.append(process)
        return process

    yield call
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def nodes() -> Iterator:
    """A Ray cluster of two nodes with a core each, as processes of this machine."""
    pytest.importorskip("ray", reason="ray is not installed")
    from ray.cluster_utils import Cluster

    # What workers import from; and they are not to wait behind everything else on the machine, as Ray has it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            cluster.add_node(num_cpus=1)
            yield cluster
        finally:
            cluster.shutdown()


@pytest.fixture(params=["local", "ray"])
def how(request) -> list[str]:
    """Two workers, by each engine."""
    options = ["--json", "--workers", "2", "--cpus", "1"]
    if request.param == "ray":
        options += ["--engine", "ray", "--address", request.getfixturevalue("nodes").address]
    return options


def workers_of(driver: subprocess.Popen, how: list[str], nodes=None) -> list[int]:
    """Processes that measure cells: children of the driver, or of the nodes of the Ray cluster."""
    if "ray" not in how:
        return [pid for pid in children(driver.pid) if "spawn_main" in command(pid)]
    raylets = [info.process.pid for node in nodes.list_all_nodes() for info in node.all_processes.get("raylet", ())]
    return [pid for raylet in raylets for pid in children(raylet) if "ray::_Worker" in command(pid)]


def children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def command(pid: int) -> str:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


@pytest.mark.slow
def test_a_killed_worker(start, small, tmp_path, how, request):
    """Killed in a cell: that cell is measured by another worker, in the same run."""
    folder, sweep = tmp_path / "there", sweep_of(tmp_path, small, "[0.25, 0.5]")
    driver = start("run", sweep, "--out", folder, *how)
    until(lambda: measured(folder), START)
    victims = workers_of(driver, how, request.getfixturevalue("nodes") if "ray" in how else None)
    assert victims
    os.kill(victims[0], signal.SIGKILL)
    output, _ = driver.communicate()
    assert driver.returncode == 0, (tmp_path / "errors-0").read_text()
    # A worker that was killed between its last write and its word leaves a cell that is there.
    ended = told(output)
    assert set(ended) == set(keys_of(sweep)) and list(ended.values()).count("done") >= len(ended) - 1
    assert complete(folder, sweep)


@pytest.mark.slow
def test_a_killed_driver(start, small, tmp_path, how, request):
    """Its workers end with it; the next run measures what is not there, and that only."""
    folder, sweep = tmp_path / "there", sweep_of(tmp_path, small, "[0.25, 0.5]")
    first = start("run", sweep, "--out", folder, *how)
    until(lambda: measured(folder), START)
    workers = workers_of(first, how, request.getfixturevalue("nodes") if "ray" in how else None)
    assert workers
    first.kill()
    first.wait()
    until(lambda: not any(alive(pid) for pid in workers), 60)
    there = measured(folder)
    keys = keys_of(sweep)
    assert 0 < len(there) < len(keys)
    times = {key: rows.place(folder, key).stat().st_mtime_ns for key in there}
    second = start("run", sweep, "--out", folder, *how)
    output, _ = second.communicate()
    assert second.returncode == 0, (tmp_path / "errors-1").read_text()
    assert told(output) == {key: "present" if key in there else "done" for key in keys}
    assert {key: rows.place(folder, key).stat().st_mtime_ns for key in there} == times
    assert complete(folder, sweep)


@pytest.mark.slow
def test_two_drivers_and_compactions_on_one_folder(start, small, tmp_path, how):
    """Each cell is measured by one of them, while its results are moved into packs under them."""
    folder, sweep = tmp_path / "there", sweep_of(tmp_path, small, "[0.25, 0.5, 0.1]")
    if "ray" in how:  # a core for each
        how[how.index("--workers") + 1] = "1"
    drivers = [start("run", sweep, "--out", folder, *how) for _ in range(2)]
    packed = 0
    while any(driver.poll() is None for driver in drivers):
        time.sleep(0.3)
        if (folder / "rows").is_dir():
            packed += rows.compact(folder).cells
    ended = []
    for number, driver in enumerate(drivers):
        output, _ = driver.communicate()
        assert driver.returncode == 0, (tmp_path / f"errors-{number}").read_text()
        ended.append(told(output))
    for key in keys_of(sweep):
        assert sorted(one[key] == "done" for one in ended) == [False, True], (key, ended)
    assert packed and complete(folder, sweep)


@pytest.mark.slow
def test_a_full_disk_under_two_workers(start, finished, tmp_path):
    sweep, results = finished
    folder = tmp_path / "there"
    how = ("--out", folder, "--json", "--workers", "2", "--cpus", "1")
    full = start("run", sweep, *how, limit=between(results))
    output, _ = full.communicate()
    first = told(output)
    assert full.returncode == 2 and set(first.values()) == {"done", "failed"}
    assert "File too large" in (tmp_path / "errors-0").read_text()
    assert measured(folder) == {key for key, status in first.items() if status == "done"}
    again = start("run", sweep, *how)
    output, _ = again.communicate()
    assert told(output) == after(first)
    assert complete(folder, sweep)
