"""``vistok auto`` on an untrained model: a file that apply reads, the user's own questions, mistakes in one line."""

from __future__ import annotations

import json

import pytest

from vistok.cli.auto import parse_milliseconds, parse_points
from vistok.cli.console import UserError
from vistok.host.setting import read_setting

QUICK = ("--methods", "uniform", "--keep", "0.25", "--out", "a.json")


def test_finds_and_saves(run, small, tmp_path):
    result = run("auto", small, "--world", "scenes", "--n", "4", "--max-drop", "99pt", *QUICK, "--json")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["method"], row["keep"]) for row in rows] == [("dense", 1.0), ("uniform", 0.25)]
    assert [row["chosen"] for row in rows] == [False, True]
    setting = read_setting(tmp_path / "a.json")
    assert (setting.methods, setting.keep) == (("uniform",), 0.25)
    assert setting.measured["model"] == small and setting.measured["n"] == 4


def test_own_questions(run, small, picture, tmp_path):
    line = {"image": picture.name, "questions": [{"text": "is there a star?"}, {"text": "how many?", "answer": "3"}]}
    (tmp_path / "pictures.jsonl").write_text(json.dumps(line) + "\n\n")
    result = run("auto", small, "--data", tmp_path, "--max-drop", "99pt", *QUICK)
    assert result.exit_code == 0, result.output
    assert "chosen" in result.stdout and 'vistok.apply(model, "a.json")' in result.stdout


def test_no_setting_is_fast_enough(run, small, tmp_path):
    result = run("auto", small, "--world", "scenes", "--n", "2", "--ttft", "0.001ms", *QUICK)
    assert result.exit_code == 2
    assert "no setting holds it" in result.stderr
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize(("text", "share"), [("2pt", 0.02), ("2 %", 0.02), (".5", 0.5), ("0", 0)])
def test_points(text, share):
    assert parse_points(text) == share


@pytest.mark.parametrize("text", ["", "2", "-1pt", "100pt", "2px", "nan"])
def test_no_points(text):
    with pytest.raises(UserError, match="--max-drop"):
        parse_points(text)


@pytest.mark.parametrize(("text", "ms"), [("80ms", 80), ("0.08s", 80), ("80", 80)])
def test_milliseconds(text, ms):
    assert parse_milliseconds(text) == ms


@pytest.mark.parametrize("text", ["", "0ms", "-1s", "80m", "fast"])
def test_no_milliseconds(text):
    with pytest.raises(UserError, match="--ttft"):
        parse_milliseconds(text)


def test_mistakes(run, small, tmp_path, picture):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "pictures.jsonl").write_text('{"image": "x.png"}\n')
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "pictures.jsonl").write_text('{"image": "x.png", "questions": []}\n')
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "pictures.jsonl").write_text("\n")
    ok = ("--max-drop", "2pt")
    for arguments, message in {
        ("--world", "scenes"): "--max-drop: got nothing",
        ok: "--world: got nothing",
        ("--world", "scenes", "--data", ".", *ok): "--world: got scenes",
        ("--world", "nope", *ok): "--world: got nope",
        ("--data", "none", *ok): "--data: got none",
        ("--data", "bad", *ok): "line 1, must be",
        ("--data", "gone", *ok): "there is no such file",
        ("--data", "empty", *ok): "at least one question",
        ("--world", "scenes", "--out", "a.txt", *ok): "must end in .json",
        ("--world", "scenes", "--out", "no/a.json", *ok): "in a folder that exists",
        ("--world", "scenes", "--methods", "nope", *ok): "must be a system",
    }.items():
        result = run("auto", small, *arguments)
        assert result.exit_code == 2, arguments
        assert message in result.stderr, (arguments, result.stderr)
        assert result.stderr.count("\n") == 1
