"""``vistok bench``: a sweep runs, goes on, is reported, and held against another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from vistok.bench import rows
from vistok.bench import run as measuring

MEASURED = ("ttft_over_dense", "peak_bytes", "energy_j", "date", "machine")
"""Columns that differ from run to run, beside milliseconds."""


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
        (("rank", "none"), "FOLDER: got none, must hold the results"),
        (("run",), "CONFIG: got flags, models is missing"),
        (("run", "few.toml", "--caches", "fp4"), "caches: got 'fp4', must be among none, fp8"),
        (("run", "few.toml", "--seeds", "a"), "--seeds: got a, must be whole numbers"),
        (("run", "few.toml", "--data", "none"), "must be a folder with a file pictures.jsonl"),
        (("run", "few.toml", "--methods", "holov:select"), "must say select=STEP"),
        (("ablate", "fastv", "--swap", "select=topk"), "METHOD: got fastv"),
        (("ablate", "holov", "--swap", "select=best"), "--swap: got select=best, select: got 'best'"),
        (("ablate", "holov", "--swap", "select"), "--swap: got select, must be SLOT=STEP"),
    ],
)
def test_mistakes(run, sweep, arguments, message):
    result = run("bench", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_flags_are_a_sweep_too(run, small, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "REPEATS", 1)
    (tmp_path / "mine").mkdir()
    Image.new("RGB", (112, 112), "red").save(tmp_path / "mine" / "a.png")
    asked = [{"text": "what colour?", "answer": "red"}, {"text": "is there a dog?"}]
    (tmp_path / "mine" / "pictures.jsonl").write_text(json.dumps({"image": "a.png", "questions": asked}))
    flags = ("--models", small, "--methods", "fastv", "--keep", "25%", "--out", "there", "--caches", "fp8")
    result = run("bench", "run", *flags, "--data", "mine", "--probabilities", "--json")
    assert result.exit_code == 0, result.output
    frame = rows.read(tmp_path / "there")
    assert set(frame["task"]) == {"mine"} and set(frame["cache"]) == {"fp8"}
    plain = frame.filter(frame["protocol"] == "single")
    assert plain["asked"].to_list() == ["what colour?", "is there a dog?"] * 4
    assert plain["truth"].to_list() == ["red", None] * 4
    assert [value is None for value in plain["probability"]] == [False, True] * 4
    (tmp_path / "mine").rename(tmp_path / "yours")
    again = run("bench", "run", *flags, "--data", "yours", "--tasks", "yours", "--probabilities", "--json")
    assert again.exit_code == 0, again.output
    assert {row["status"] for row in map(json.loads, again.stdout.splitlines())} == {"done"}  # under another name


def test_a_file_with_data_and_a_picture_that_changes(run, sweep, small, tmp_path):
    (tmp_path / "mine").mkdir()
    Image.new("RGB", (112, 112), "red").save(tmp_path / "mine" / "a.png")
    (tmp_path / "mine" / "pictures.jsonl").write_text('{"image": "a.png", "question": "what colour?", "answer": "red"}')
    sweep.write_text(sweep.read_text().replace("scenes", "own") + '[data.own]\nfolder = "mine"\n')
    first = run("bench", "run", sweep, "--out", "there", "--json")
    assert first.exit_code == 0, first.output
    assert run("bench", "run", sweep, "--out", "there", "--json").stdout.count("present") == 7
    Image.new("RGB", (112, 112), "blue").save(tmp_path / "mine" / "a.png")
    assert run("bench", "run", sweep, "--out", "there", "--json").stdout.count('"done"') == 7


def test_one_step_is_swapped_and_the_rest_held(run, small, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "REPEATS", 1)
    result = run("bench", "ablate", "holov", "--json")
    steps = {row["slot"]: row for row in map(json.loads, result.stdout.splitlines())}
    assert set(steps) == {"score", "allocate", "select", "merge", "order"}
    assert "max_sum" in steps["select"]["choices"]
    few = ("--model", small, "--tasks", "scenes", "--n", "2", "--keep", "0.25", "--out", "there", "--json")
    result = run("bench", "ablate", "holov", "--swap", "select=max_sum,topk", "--swap", "allocate=none", *few)
    assert result.exit_code == 0, result.output
    found = {row["method"]: row for row in map(json.loads, result.stdout.splitlines())}
    assert set(found) == {"holov", "holov:select=max_sum", "holov:select=topk", "holov:allocate=none"}
    assert {row["tokens"] for row in found.values()} == {49}
    assert found["holov"]["over"] is None
    assert (found["holov:select=topk"]["over"], found["holov:select=topk"]["over_low"]) == (0, 0)  # its own step

    result = run("bench", "rank", "there", "--json")
    assert result.exit_code == 0, result.output
    assert {row["method"] for row in map(json.loads, result.stdout.splitlines())} >= {"random", "uniform", "holov"}


@pytest.mark.slow
def test_ray_gives_the_same_rows_bit_for_bit_except_times(run, sweep, tmp_path):
    pytest.importorskip("ray", reason="ray is not installed")
    for folder, how in (("local", ("--cpus", "1")), ("ray", ("--engine", "ray", "--address", "local"))):
        result = run("bench", "run", sweep, "--out", folder, *how)
        assert result.exit_code == 0, result.output
    times = [name for name in rows.COLUMNS if name.endswith("_ms") or name in MEASURED]
    ours, theirs = (rows.read(tmp_path / name).drop(times) for name in ("local", "ray"))
    assert ours.equals(theirs)
    assert len(ours) == 4 * 3 + 2 * 4
