"""A command line to call, a small model to call it on, a picture to ask about."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.small import save_small_model
from vistok.cli.app import app


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> str:
    """Folder of an untrained model of 196 visual tokens."""
    return str(save_small_model(tmp_path_factory.mktemp("small")))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run("ask", ...)`` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(a) for a in arguments])


@pytest.fixture
def picture(tmp_path) -> Path:
    """A picture file of 60 x 40 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    path = tmp_path / "a picture.png"
    Image.fromarray(pixels).save(path)
    return path
