"""Conventions of all commands: rows on standard output, the rest on standard error, errors in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
import typer
from typer.testing import CliRunner

from vistok.cli import app as application
from vistok.cli.console import Json, Seed, UserError, console, emit, progress, show_rows

RAISED = {
    "user": UserError("--keep", 0, "must be at least 1"),
    "path": UserError("PICTURE", Path("a.png"), "must be a picture"),
    "value": ValueError("keep: got 0,\n  must be at least 1"),
    "lookup": LookupError("unknown method"),
    "file": FileNotFoundError(2, "No such file or directory", "a.png"),
    "os": OSError("no file named model.safetensors\nin the folder"),
    "picture": PIL.UnidentifiedImageError("cannot identify image file"),
    "bomb": PIL.Image.DecompressionBombError("Image size exceeds limit"),
    "eof": EOFError(),
    "key": KeyError("a"),
    "index": IndexError("list index out of range"),
    "type": TypeError("a defect"),
}


def command(raised: str = "", as_json: Json = False, seed: Seed = 3) -> None:
    """A command that prints in every way there is."""
    print("a library prints")
    with progress() as bar:
        for _ in bar.track(range(2)):
            pass
    console().print("a table")
    show_rows(
        [{"method": "a", "share": 0.123456, "count": 7, "blank": None}],
        ["method", "share", "count", "blank"],
        as_json=as_json,
    )
    if raised:
        raise RAISED[raised]
    if as_json:
        emit({"seed": seed})


@pytest.fixture
def invoke(monkeypatch):
    monkeypatch.setitem(sys.modules, "fixture_commands", SimpleNamespace(command=command))
    table = {"do": application.Command("fixture_commands:command", "Do it.")}
    monkeypatch.setattr(application.LazyGroup, "table", table)
    runner = CliRunner()
    return lambda *arguments: runner.invoke(application.app, ["do", *arguments])


def test_json_rows_are_alone_on_standard_output(invoke):
    before = sys.stdout
    result = invoke("--json", "--seed", "5")
    assert result.exit_code == 0
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert rows == [{"method": "a", "share": 0.123456, "count": 7, "blank": None}, {"seed": 5}]
    assert "a library prints" in result.stderr
    assert "a table" in result.stderr
    assert sys.stdout is before


def test_table_is_on_standard_output(invoke):
    result = invoke()
    assert result.exit_code == 0
    assert "a library prints" in result.stdout
    assert "0.1235" in result.stdout
    assert "None" not in result.stdout
    assert "{" not in result.stdout


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        ("user", "error: --keep: got 0, must be at least 1"),
        ("path", "error: PICTURE: got a.png, must be a picture"),
        ("value", "error: keep: got 0, must be at least 1"),
        ("lookup", "error: unknown method"),
        ("file", "error: a.png: No such file or directory"),
        ("os", "error: no file named model.safetensors in the folder"),
        ("picture", "error: cannot identify image file"),
        ("bomb", "error: Image size exceeds limit"),
        ("eof", "error: unexpected end of input"),
    ],
)
def test_mistake_is_one_line(invoke, raised, line):
    result = invoke("--raised", raised, "--json")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == line
    assert "Traceback" not in result.stderr
    with_debug = invoke("--raised", raised, "--debug")
    assert with_debug.exit_code == 2
    assert "Traceback" in with_debug.stderr


@pytest.mark.parametrize("raised", ["key", "index", "type"])
def test_defect_is_a_traceback(invoke, raised):
    result = invoke("--raised", raised)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith(type(RAISED[raised]).__name__)


def test_wrong_option_is_one_line(invoke):
    result = invoke("--seed", "-1")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "--seed" in result.stderr


def test_debug_after_two_dashes_is_text(invoke, monkeypatch):
    def fail(text: str) -> None:
        raise UserError("text", text, "must be something else")

    monkeypatch.setattr(sys.modules["fixture_commands"], "command", fail)
    result = invoke("--", "--debug")
    assert result.stderr == "error: text: got --debug, must be something else\n"


def test_emit_writes_what_json_has(capsys):
    emit(
        {
            "nan": float("nan"),
            "tensor": torch.tensor([[1, 2]]),
            "array": np.arange(2),
            "scalar": np.float32(0.5),
            "path": Path("out") / "a.html",
            "nested": {"a": (1, np.int64(2), float("inf"))},
            "error": UserError("a", "b", "c"),
            "text": "é\n",
        }
    )
    (line,) = capsys.readouterr().out.splitlines()
    row = json.loads(line)
    assert row["nan"] is None
    assert row["tensor"] == [[1, 2]]
    assert row["array"] == [0, 1]
    assert row["scalar"] == 0.5
    assert row["path"] == str(Path("out/a.html"))
    assert row["nested"] == {"a": [1, 2, None]}
    assert row["text"] == "é\n"


def test_every_command_of_the_table_is_a_function_with_help():
    for name, entry in application.COMMANDS.items():
        commands = entry.commands.values() if isinstance(entry, application.Group) else [entry]
        for one in commands:
            assert one.load().__doc__, name
            assert typer.main.get_command(_single(one.load())).params


def _single(function):
    single = typer.Typer(add_completion=False)
    single.command()(function)
    return single
