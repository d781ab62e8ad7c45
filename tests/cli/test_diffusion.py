"""``vistok diffusion``: a row a setting, where attention goes, files; a stopped run goes on; mistakes in one line."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from tests.small import save_small_model
from vistok.bench import diffusion as measured

GIVEN = ("--n", "2", "--world", "scenes", "--methods", "divprune,vtw", "--keep", "0.25", "--start", "0,50%",
         "--steps", "2", "--out", "shown")  # fmt: skip


@pytest.fixture(scope="session")
def diffuse(tmp_path_factory) -> str:
    """Folder of an untrained masked-diffusion model of two layers."""
    return str(save_small_model(tmp_path_factory.mktemp("diffuse"), answer_length=4))


def test_a_row_for_each_setting(run, diffuse, tmp_path, monkeypatch):
    result = run("diffusion", diffuse, *GIVEN, "--json")
    assert result.exit_code == 0, result.output
    *rows, last = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["method"], row["keep"], row["start"], row["layers"]) for row in rows] == [
        ("dense", 1.0, 0.0, []),
        ("divprune", 0.25, 0.0, []),
        ("divprune", 0.25, 0.5, []),
        ("vtw", 0, 0.0, []),
        ("vtw", 0, 0.5, []),
        ("layer-skip", 1.0, 0.0, [0]),
        ("layer-skip", 1.0, 0.0, [1]),
    ]
    assert [row["tokens"] for row in rows] == [196, 49, (196 + 49) / 2, 98, 147, 98, 98]
    assert rows[0]["flops_ratio"] == 1 and all(row["flops_ratio"] < 1 for row in rows[1:])
    assert rows[1]["flops_ratio"] < rows[2]["flops_ratio"]
    for row in rows:
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] and row["n"] == 2 and row["ms"] > 0
    assert len(last["attention"]) == len(last["confidence"]) == 2 and len(last["attention"][0]) == 2
    assert sum(last["attention"][0][0].values()) == pytest.approx(1, abs=1e-4)
    with Image.open(tmp_path / "shown" / "diffusion.png") as picture:
        picture.load()
    stored = json.loads((tmp_path / "shown" / "diffusion.json").read_text())
    assert stored["rows"] == rows and stored["attention"] == last["attention"]

    # Again: all answers stand in the journal, and none is asked for anew but to see where attention goes.
    asked = []
    denoise = measured.denoise
    monkeypatch.setattr(measured, "denoise", lambda *a, **how: asked.append(how) or denoise(*a, **how))
    again = run("diffusion", diffuse, *GIVEN)
    assert again.exit_code == 0, again.output
    assert [how.get("trace", False) for how in asked] == [True]
    assert "skip 1" in again.stdout and "50%" in again.stdout and "confidence" in again.stdout
    assert again.stdout.splitlines()[-1] == "shown/diffusion.png"
    table = (tmp_path / "shown" / "diffusion.md").read_text()
    assert table.count("| divprune |") == 2 and "- steps: 2" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--world", "nope"), "--world: got nope, must be one of scenes"),
        (("--methods", "nope"), "--methods: got nope"),
        (("--methods", "divprune+fastv"), "--methods: got divprune+fastv, must be one system at a time"),
        (("--methods", "dmllm-redundancy"), "must be a reducer, it is a study"),
        (("--start", "1"), "--start: got 1, must be shares in [0, 1)"),
        (("--keep", "0"), "--keep: got 0"),
        (("--steps", "5"), "--steps: got 5, must be at most the 4 tokens"),
    ],
)
def test_mistakes_are_one_line(run, diffuse, arguments, message):
    result = run("diffusion", diffuse, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1 and result.stdout == ""


def test_a_causal_model_is_refused(run, small):
    result = run("diffusion", small)
    assert result.exit_code == 2 and "must be a masked-diffusion model" in result.stderr
