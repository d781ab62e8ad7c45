"""``vistok serve``: what it refuses to start, and a real one from its first line to its end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from vistok.cli.app import app

KEY = "a-key-of-the-tests-0123456789"


def refused(*arguments: str, **environment: str) -> str:
    result = CliRunner(env={"VISTOK_API_KEY": "", **environment}).invoke(app, ["serve", *arguments])
    assert result.exit_code == 2, result.output
    return result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0"], "--host: got 0.0.0.0, must be 127.0.0.1 without an API key"),
        (["--method", "evit"], "--method: got 'evit'"),
        (["--methods", "holov,no-such"], "--methods"),
        (["--keep", "2.5"], "--keep"),
        (["--method", "holov", "--keep", "0.5", "--max-keep", "0.25"], "--method"),
        (["--allow-host", "http://x"], "--allow-host"),
        (["--allow-folder", "/no/such/folder"], "--allow-folder"),
        (["--cors-origin", "*"], "--cors-origin"),
        (["--replicas", "2"], "--replicas: got 2, must be with --engine ray"),
        (["--engine", "ray", "--replicas", "4..1"], "--replicas"),
        (["--engine", "ray", "--studio"], "--studio"),
        (["no-such-model"], "no-such-model"),
    ],
)
def test_refusals(arguments: list[str], says: str) -> None:
    assert says in refused(*arguments)


def test_a_key_must_be_a_good_one_and_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n")
    assert "--api-key-file" in refused("--api-key-file", str(tmp_path / "keys"))
    (tmp_path / "keys").write_text("hunter2\n")
    said = refused("--api-key-file", str(tmp_path / "keys"))
    assert "--api-key-file" in said and "hunter2" not in said
    said = refused(VISTOK_API_KEY="hunter2")
    assert "VISTOK_API_KEY" in said and "hunter2" not in said
    assert "--studio" in refused("--studio", VISTOK_API_KEY=KEY)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_real_one(end: signal.Signals) -> None:
    command = [sys.executable, "-m", "vistok", "serve", "vistok-tiny", "--port", "0"]
    environment = {**os.environ, "VISTOK_API_KEY": KEY}
    # The test runner's own handling of SIGINT must not be inherited.
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=_default_signals
    ) as process:
        try:
            assert process.stderr is not None
            line = next(line for line in process.stderr if "http://" in line)
            found = re.search(r"vistok-tiny at (http://127\.0\.0\.1:\d+)/v1", line)
            assert found is not None, line
            assert httpx.get(f"{found[1]}/healthz").status_code == 200
            assert httpx.get(f"{found[1]}/v1/models").status_code == 401
            listed = httpx.get(f"{found[1]}/v1/models", headers={"authorization": f"Bearer {KEY}"})
            assert listed.json()["data"][0]["id"] == "vistok-tiny"
            process.send_signal(end)
            assert process.wait(20) in (0, 130, -end)
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()


def _default_signals() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_model_that_cannot_be_loaded_ends_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    command = [sys.executable, "-m", "vistok", "serve", str(tmp_path), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "cannot be loaded" in done.stderr.splitlines()[-1]
