"""``vistok search`` on an untrained model: a file that apply reads, and mistakes in one line."""

from __future__ import annotations

import json

import pytest

from vistok.host.setting import read_setting

pytest.importorskip("optuna")
QUICK = ("--world", "scenes", "--n", "2", "--keep", "49", "--calls", "3", "--starts", "2")


def test_finds_and_saves(run, small, tmp_path):
    arguments = (
        "search",
        small,
        "holov",
        *QUICK,
        "--space",
        "beta=0.0:1.0",
        "--space",
        "chunks=2|4",
        "--out",
        "a.json",
    )
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) == 3 and all(row["tokens"] == 49 and row["allowed"] for row in rows)
    setting = read_setting(tmp_path / "a.json")
    best = max(rows, key=lambda row: row["cosine"])
    assert setting.methods == ("holov",) and setting.keep == 49
    assert dict(setting.hyper[0]) == {"beta": best["beta"], "chunks": best["chunks"]}
    table = run(*arguments)
    assert table.exit_code == 0 and "the best of 3" in table.stdout
    assert (tmp_path / "a.journal.jsonl").read_text().count("cosine") == 3, "the second run must not try again"


def test_mistakes(run, small):
    for arguments, message in {
        ("nope",): "METHOD: got nope",
        ("holov,random",): "METHOD: got holov,random, must be one reducer",
        ("dense",): "METHOD: got dense",
        ("holov",): "--world: got nothing",
        ("holov", *QUICK): "space: holov has no search_space",
        ("holov", *QUICK, "--space", "beta"): "space: got 'beta'",
        ("holov", *QUICK, "--space", "gamma=0:1"): "space: gamma is no hyper-parameter of holov",
        ("holov", *QUICK, "--out", "a.txt"): "must end in .json",
    }.items():
        result = run("search", small, *arguments)
        assert result.exit_code == 2, arguments
        assert message in result.stderr, (arguments, result.stderr)
        assert result.stderr.count("\n") == 1
