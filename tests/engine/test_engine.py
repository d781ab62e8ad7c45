"""What every engine promises: one outcome a cell, the same on all; faults that stay with their cell; clean ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from tests.engine.work import (
    Counted,
    Job,
    Unpicklable,
    alive,
    dies_once,
    fails,
    jobs,
    kills,
    multiply,
    note_setup,
    noted,
    place,
    place_of_both,
    ten,
    threads_of_torch,
    troubled,
    until,
    write,
    writes_and_dies,
    written,
)
from vistok.engine import LocalEngine, RayEngine, Resources, SetupError, Status, claim
from vistok.engine.cluster import _room
from vistok.engine.local import _Processes, _sharers, share_of


def by_key(outcomes):
    found = {outcome.key: outcome for outcome in outcomes}
    return {key: found[key] for key in sorted(found)}


def test_same_outcomes_everywhere(engine):
    """Values, errors and a cell that cannot be sent; every cell once, and the callback sees each before the caller."""
    told = []
    cells = [*jobs(7), Unpicklable("stuck")] if _travels(engine) else jobs(7)
    outcomes = []
    for outcome in engine.map(cells, troubled, setup=ten, on_done=lambda *news: told.append(news)):
        assert told[-1] == (outcome, len(outcomes) + 1, len(cells))
        outcomes.append(outcome)
    assert len(outcomes) == len(cells)
    found = by_key(outcomes)
    for number in (0, 5, 6):
        outcome = found[f"cell-{number:03}"]
        assert (outcome.status, outcome.tries) == (Status.DONE, 1)
        assert outcome.value == {"key": outcome.key, "product": 10 * number}
    wrong = {1: "ValueError: no such picture: 1", 2: "No space left on device: 'out.parquet'", 3: "SystemExit"}
    for number, text in wrong.items():
        outcome = found[f"cell-{number:03}"]
        assert (outcome.status, outcome.tries, outcome.value) == (Status.FAILED, 1, None)
        assert outcome.error.startswith(f"cell {outcome.key}: ") and text in outcome.error
        assert "in troubled" in outcome.traceback and "in attempt" not in outcome.traceback
    if _travels(engine):
        assert found["cell-004"].status is Status.FAILED and "this value does not travel" in found["cell-004"].error
        assert found["stuck"].status is Status.FAILED and "this cell does not travel" in found["stuck"].error


def _travels(engine) -> bool:
    return isinstance(engine, RayEngine) or engine.workers > 1 or engine.spawn


def test_a_killed_worker_costs_a_retry(processes, tmp_path):
    outcomes = by_key(processes.map(jobs(6), partial(dies_once, tmp_path), setup=ten))
    assert [outcome.tries for outcome in outcomes.values()] == [1, 2, 2, 1, 1, 1]
    assert outcomes["cell-001"].value == {"key": "cell-001", "product": 10}
    lost = outcomes.pop("cell-002")
    assert lost.status is Status.FAILED and "cell-002" in lost.error and "try 2 of 2" in lost.error
    assert all(outcome.status is Status.DONE for outcome in outcomes.values())


def test_a_worker_killed_after_it_wrote_costs_nothing(processes, tmp_path):
    """What is there is not done again, nor called lost."""
    outcomes = by_key(
        processes.map(jobs(4), partial(writes_and_dies, tmp_path), done=partial(written, tmp_path), folder=tmp_path)
    )
    found = [(outcome.status, outcome.tries) for outcome in outcomes.values()]
    assert found == [(Status.DONE, 1), (Status.PRESENT, 1), (Status.FAILED, 2), (Status.DONE, 1)]
    ends = [key for what, key, _ in noted(tmp_path) if what == "end"]
    assert sorted(ends) == ["cell-000", "cell-001", "cell-003"]
    assert list((tmp_path / "claims").iterdir()) == []


def test_a_key_is_asked_for_once(tmp_path):
    cells = [Counted(number) for number in range(5)]
    outcomes = list(LocalEngine().map(cells, number_of, folder=tmp_path, done=partial(written, tmp_path)))
    assert [outcome.key for outcome in outcomes] == [job.key for job in jobs(5)]
    assert [cell.asked for cell in cells] == [1] * 5


def number_of(state, cell) -> int:
    return cell.number


def test_the_killer_is_named_and_no_retries_is_no_retry(tmp_path):
    outcomes = by_key(LocalEngine(spawn=True).map(jobs(2), partial(dies_once, tmp_path), retries=0))
    assert outcomes["cell-001"].tries == 1
    assert "was killed by SIGKILL" in outcomes["cell-001"].error


def test_a_worker_killed_from_outside(tmp_path):
    killed, outcomes = 0, []
    for outcome in LocalEngine(2).map(jobs(8), partial(write, tmp_path, 0.1), folder=tmp_path):
        if not outcomes:
            killed = outcome.value
            os.kill(killed, signal.SIGKILL)
        outcomes.append(outcome)
    assert sorted(outcome.key for outcome in outcomes) == [cell.key for cell in jobs(8)]
    assert all(outcome.status is Status.DONE for outcome in outcomes)
    assert sorted(outcome.tries for outcome in outcomes) in ([1] * 7 + [2], [1] * 8)  # dead before or after its handing
    assert all(outcome.value != killed for outcome in outcomes[2:])


def test_setup_runs_once_a_worker(engine, tmp_path):
    outcomes = list(engine.map(jobs(6), place, setup=partial(note_setup, tmp_path)))
    pids = {outcome.value["pid"] for outcome in outcomes}
    assert all(outcome.value["state"] == str(outcome.value["pid"]) for outcome in outcomes)
    assert sorted(int(pid) for _, _, pid in noted(tmp_path)) == sorted(pids)
    assert (pids == {os.getpid()}) == (not _travels(engine))


def test_workers_have_their_own_cores_and_threads(tmp_path):
    outcomes = list(LocalEngine(2).map(jobs(2), partial(place_of_both, tmp_path)))
    cores = {outcome.value["pid"]: outcome.value["cores"] for outcome in outcomes}
    assert {outcome.value["threads"] for outcome in outcomes} == {"1"}
    if hasattr(os, "sched_getaffinity"):
        mine = sorted(os.sched_getaffinity(0))
        assert sorted(cores.values()) == sorted([[mine[0]], [mine[1 % len(mine)]]])


@pytest.mark.slow
def test_threads_of_torch(small_ray):
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for engine in (LocalEngine(), LocalEngine(spawn=True), RayEngine(workers=1)):
            (outcome,) = engine.map(jobs(1), threads_of_torch)
            assert outcome.value == 1, outcome
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("setup", [fails, kills])
def test_a_setup_that_fails_ends_the_map(setup):
    with pytest.raises(SetupError, match=r"no weights here|3 workers in a row died in setup; .*SIGKILL"):
        list(LocalEngine(2).map(jobs(50), multiply, setup=setup))


def test_a_setup_that_fails_elsewhere(small_ray):
    for engine in (RayEngine(workers=1), LocalEngine()):
        with pytest.raises(SetupError, match="FileNotFoundError: no weights here"):
            list(engine.map(jobs(2), multiply, setup=fails))


def test_closing_ends_the_workers_and_frees_the_cells(processes, tmp_path):
    outcomes = processes.map([Job("quick"), *jobs(4)], partial(slow_but_first, tmp_path), folder=tmp_path)
    assert next(outcomes).key == "quick"
    until(lambda: sum(what == "start" for what, *_ in noted(tmp_path)) >= 2, 60)
    pids = {int(pid) for _, _, pid in noted(tmp_path)}
    begun = time.monotonic()
    outcomes.close()
    until(lambda: not any(alive(pid) for pid in pids), 10)
    assert time.monotonic() - begun < 10
    assert list((tmp_path / "claims").iterdir()) == []


def slow_but_first(folder, state, cell):
    return write(folder, 0 if cell.key == "quick" else 60, state, cell)


def test_an_exception_of_the_caller_ends_the_workers(tmp_path):
    def stop(*news):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        list(LocalEngine(2).map([Job("quick"), *jobs(2)], partial(slow_but_first, tmp_path), on_done=stop))
    assert not any(alive(int(pid)) for _, _, pid in noted(tmp_path))


@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c(drive, tmp_path, workers):
    driver = drive("--seconds", "60", "--workers", workers)
    until(lambda: sum(what == "start" for what, *_ in noted(tmp_path)) == int(workers))
    os.killpg(driver.pid, signal.SIGINT)  # a terminal sends it to every process
    _, errors = driver.communicate(timeout=20)
    assert driver.returncode != 0 and errors.rstrip().endswith("KeyboardInterrupt")
    assert errors.count("Traceback") == 1  # the workers say nothing
    assert not any(alive(int(pid)) for _, _, pid in noted(tmp_path))
    assert list((tmp_path / "claims").iterdir()) == []


def test_a_driver_that_ends_with_its_iterator_open(drive, tmp_path):
    driver = drive("--workers", "2", "--leave")
    driver.communicate(timeout=20)
    assert driver.returncode == 0
    assert not any(alive(int(pid)) for _, _, pid in noted(tmp_path))


@pytest.mark.parametrize("ray", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["local", "on ray"])
def test_a_killed_driver_and_the_next(drive, tmp_path, ray, request):
    """Its workers end with it, what it had done stays done, and the next driver does all the rest, each cell once."""
    options = ["--cells", "8", "--workers", "2", "--seconds", "0.3"]
    engine = LocalEngine(2)
    if ray:
        small_ray = request.getfixturevalue("small_ray")
        options += ["--ray", small_ray.get_runtime_context().gcs_address]
        engine = RayEngine(workers=2)
    first = drive(*options)
    until(lambda: sum(what == "end" for what, *_ in noted(tmp_path)) >= 2, 90)
    first.kill()
    first.communicate()
    pids = {int(pid) for _, _, pid in noted(tmp_path)}
    until(lambda: not any(alive(pid) for pid in pids))
    there = {cell.key for cell in jobs(8) if written(tmp_path, cell.key)}
    assert 2 <= len(there) < 8
    rest = partial(write, tmp_path, 0.0)
    outcomes = by_key(engine.map(jobs(8), rest, folder=tmp_path, done=partial(written, tmp_path)))
    assert {key for key, outcome in outcomes.items() if outcome.status is Status.PRESENT} == there
    assert {key for key, outcome in outcomes.items() if outcome.status is Status.DONE} == set(outcomes) - there
    assert all(written(tmp_path, cell.key) for cell in jobs(8))
    ends = [key for what, key, _ in noted(tmp_path) if what == "end"]
    assert len(ends) == len(set(ends))


def test_two_drivers_share_a_folder(drive, tmp_path):
    drivers = [drive("--cells", "20", "--seconds", "0.05", "--meet") for _ in range(2)]
    until(lambda: all((tmp_path / f"here-{driver.pid}").exists() for driver in drivers))
    (tmp_path / "go").touch()
    for driver in drivers:
        output, errors = driver.communicate(timeout=40)
        assert driver.returncode == 0, errors
        assert len(output.splitlines()) == 20  # one outcome a cell, for each of them
    ends = [(key, pid) for what, key, pid in noted(tmp_path) if what == "end"]
    assert sorted(key for key, _ in ends) == [cell.key for cell in jobs(20)]
    assert {pid for _, pid in ends} == {str(driver.pid) for driver in drivers}


def test_cells_that_are_there_or_held(tmp_path):
    """The held cell is looked at last of all: by then its holder may have ended."""
    freed, kept = claim(tmp_path, "cell-000"), claim(tmp_path, "cell-001")
    (tmp_path / "cell-002.result").touch()
    outcomes = []
    for outcome in LocalEngine().map(
        jobs(4), partial(write, tmp_path, 0), folder=tmp_path, done=partial(written, tmp_path)
    ):
        outcomes.append((outcome.key, outcome.status, outcome.tries))
        freed.release()
    assert outcomes == [
        ("cell-002", Status.PRESENT, 0),
        ("cell-003", Status.DONE, 1),
        ("cell-000", Status.DONE, 1),
        ("cell-001", Status.HELD, 0),
    ]
    assert str(os.getpid()) in outcome.owner
    kept.release()


def test_a_result_written_between_the_question_and_the_claim(tmp_path):
    """The other driver finished and let go just then: asked again under the claim, the cell is not done twice."""
    answers = iter([False, True])
    (outcome,) = LocalEngine().map(jobs(1), multiply, folder=tmp_path, done=lambda key: next(answers))
    assert outcome.status is Status.PRESENT
    assert list((tmp_path / "claims").iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "claims").write_text("a file, where the folder should be")
    outcomes = list(LocalEngine().map(jobs(2), multiply, folder=tmp_path))
    assert [outcome.status for outcome in outcomes] == [Status.FAILED] * 2
    assert all(outcome.key in outcome.error and "claims" in outcome.error for outcome in outcomes)


def test_nothing_to_do_starts_nothing():
    assert list(LocalEngine(2).map([], multiply, setup=kills)) == []
    outcomes = list(LocalEngine(2).map(jobs(3), multiply, setup=kills, done=lambda key: True))
    assert {outcome.status for outcome in outcomes} == {Status.PRESENT}


def test_arguments_that_cannot_be_right(monkeypatch):
    engine = LocalEngine()
    with pytest.raises(ValueError, match="'a' twice"):
        engine.map([Job("a"), Job("a", 1)], multiply)
    with pytest.raises(ValueError, match="key is 'a/b'"):
        engine.map([Job("a/b")], multiply)
    with pytest.raises(ValueError, match=r"fn is .*lambda.*top of a module"):
        engine.map(jobs(1), lambda state, cell: None)
    with pytest.raises(ValueError, match=r"setup is .*lambda"):
        engine.map(jobs(1), multiply, setup=lambda: None)
    with pytest.raises(ValueError, match="retries is -1"):
        engine.map(jobs(1), multiply, retries=-1)
    for wrong in ({"cpus": 0}, {"cpus": 1.5}, {"gpus": -1}, {"gpus": 1.5}, {"memory": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            Resources(**wrong)
    with pytest.raises(ValueError, match=r"resources\.cpus is 100000"):
        list(engine.map(jobs(1), multiply, resources=Resources(cpus=100_000)))
    with pytest.raises(ValueError, match=r"resources\.memory is .* for 2 worker"):
        list(LocalEngine(2).map(jobs(1), multiply, resources=Resources(memory=2**62)))
    with pytest.raises(ValueError, match="workers is 0"):
        LocalEngine(0)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'vistok\[ray\]'"):
        RayEngine()


def test_workers_by_what_fits(monkeypatch):
    """Workers=None: as many as cores, memory and GPUs carry; each has GPUs of its own, or a neighbour to share with."""
    monkeypatch.setattr("vistok.engine.local._cores", lambda: list(range(8)))
    monkeypatch.setattr("vistok.engine.local._memory", lambda: 100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")

    def fitting(**needs) -> int:
        pool = LocalEngine(None)._pool(multiply, ten, Resources(**needs))
        assert isinstance(pool, _Processes)
        return pool.size

    assert fitting() == 8
    assert fitting(cpus=3) == 2
    assert fitting(memory=30) == 3
    assert fitting(gpus=2) == 2
    assert fitting(gpus=0.5) == 8
    with pytest.raises(ValueError, match="gpus is 5"):
        fitting(gpus=5)
    for gpus in (0.25, 0.3, 0.5, 1, 2, 3):
        used = [device for slot in range(_sharers(4, gpus)) for device in share_of(list("4567"), gpus, slot)]
        each = 1 if gpus >= 1 else int(1 / gpus)
        assert all(used.count(device) == each for device in set(used))
        assert len(used) == _sharers(4, gpus) * max(1, int(gpus))


def test_room_in_a_cluster():
    cluster = {"CPU": 64.0, "GPU": 8.0, "memory": 1e12}
    assert _room(cluster, Resources(cpus=4)) == 16
    assert _room(cluster, Resources(cpus=4, gpus=1)) == 8
    assert _room(cluster, Resources(cpus=1, gpus=0.5, memory=200 * 10**9)) == 5
    with pytest.raises(ValueError, match=r"Ray cluster has CPU 2, GPU 0, memory 0: not enough"):
        _room({"CPU": 2.0}, Resources(gpus=1))


def test_the_package_is_light():
    """A worker of any kind of cell starts at once, and threads are set before torch is there."""
    code = "import sys, vistok.engine; print(sorted({'torch', 'ray', 'numpy'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
