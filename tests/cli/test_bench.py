"""``vistok bench``: a sweep runs, goes on, is reported, and held against another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vistok.bench import run as measuring


@pytest.fixture
def sweep(small, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(measuring, "REPEATS", 1)
    path = tmp_path / "few.toml"
    path.write_text(f'models = ["{small}"]\nmethods = ["holov"]\nkeep = [0.25]\ntasks = ["scenes"]\nn = 2\n')
    return path


def test_a_sweep_runs_once_goes_on_and_is_reported(run, sweep, tmp_path):
    result = run("bench", "run", sweep, "--out", "there", "--json")
    assert result.exit_code == 0, result.output
    told = [json.loads(line) for line in result.stdout.splitlines()]
    assert {row["status"] for row in told} == {"done"}
    assert [(row["method"], row["rows"]) for row in told] == [
        ("random", 4), ("uniform", 4), ("holov", 4), ("dense", 2), ("random", 2), ("uniform", 2), ("holov", 2),
    ]  # fmt: skip
    sweep.write_text(sweep.read_text().replace("[0.25]", "[0.25, 0.5]"))
    next((tmp_path / "there" / "rows").glob(f"{told[-1]['cell']}*")).write_bytes(b"cut")
    result = run("bench", "run", sweep, "--out", "there", "--json")
    again = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["status"] for row in again].count("present") == 6
    assert [(row["method"], row["keep"]) for row in again if row["status"] == "done"] == [
        ("holov", 0.25), ("random", 0.5), ("uniform", 0.5), ("holov", 0.5),
    ]  # fmt: skip

    result = run("bench", "report", "there")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "there" / "report.md").read_text().count("## ") == 2
    assert (tmp_path / "there" / "report.svg").exists()
    result = run("bench", "diff", "there", "there", "--json")
    assert result.exit_code == 0
    assert {json.loads(line)["verdict"] for line in result.stdout.splitlines()} == {"same"}


def test_a_cell_that_fails_is_told_and_the_others_go_on(run, sweep, tmp_path):
    sweep.write_text(sweep.read_text().replace('models = ["', 'models = ["./none", "'))
    result = run("bench", "run", sweep, "--out", "there", "--json")
    assert result.exit_code == 2
    told = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["status"] for row in told].count("failed") == 7
    assert [row["status"] for row in told].count("done") == 7
    assert "7 cells that could not be measured" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "none.toml"), "CONFIG: got none.toml, must be a TOML file"),
        (("run", "few.toml", "--engine", "dask"), "--engine: got dask, must be local or ray"),
        (("run", "few.toml", "--address", "auto"), "--address: got auto, goes with --engine ray"),
        (("report", "none"), "FOLDER: got none, must hold the results of `vistok bench run`"),
        (("diff", "none", "none"), "BEFORE: got none, must hold the results"),
    ],
)
def test_mistakes(run, sweep, arguments, message):
    result = run("bench", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.slow
def test_ray_gives_the_same_rows_bit_for_bit_except_times(run, sweep, tmp_path):
    pytest.importorskip("ray", reason="ray is not installed")
    from vistok.bench import rows

    for folder, how in (("local", ("--cpus", "1")), ("ray", ("--engine", "ray", "--address", "local"))):
        result = run("bench", "run", sweep, "--out", folder, *how)
        assert result.exit_code == 0, result.output
    times = [name for name in rows.COLUMNS if name.endswith("_ms") or name in ("ttft_over_dense", "date", "machine")]
    ours, theirs = (rows.read(tmp_path / name).drop(times) for name in ("local", "ray"))
    assert ours.equals(theirs)
    assert len(ours) == 4 * 3 + 2 * 4
