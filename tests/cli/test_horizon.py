"""``vistok horizon``: a row a layer, the proposal, the curve; mistakes in one line."""

from __future__ import annotations

import json

import pytest
from PIL import Image

GIVEN = ("--n", "2", "--seeds", "1", "--world", "scenes")


def test_json_has_a_row_for_each_layer_and_the_proposal(run, small, tmp_path):
    result = run("horizon", small, *GIVEN, "--window", "14", "--eps", "0.5", "--out", "shown", "--json")
    assert result.exit_code == 0, result.output
    *layers, last = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["layer"] for row in layers] == [0, 1, 2]
    for row in layers:
        assert row["removed_low"] <= row["removed"] <= row["removed_high"]
        assert row["random_low"] <= row["random"] <= row["random_high"]
    assert layers[2]["removed"] == layers[2]["random_high"] == 0
    # The window is the whole grid: kept alone it is worth what all tokens are.
    assert layers[0]["window_mean"] == pytest.approx(layers[0]["removed"], rel=1e-3, abs=1e-7)
    assert (last["n"], last["world"], last["share"], last["eps"]) == (2, "scenes", 0.25, 0.5)
    assert (last["horizon"], last["random_horizon"]) == (0, 0)
    assert last["hyper"] == {"stages": [], "horizon": 0.5}
    assert "shown/horizon.png" in result.stderr
    with Image.open(tmp_path / "shown" / "horizon.png") as picture:
        picture.load()


def test_the_table_ends_in_what_can_be_typed(run, small):
    result = run("horizon", small, *GIVEN, "--eps", "0")
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    assert "all visual tokens can go from no layer on, within 0 (95% interval included)" in words
    line = next(line for line in result.stdout.splitlines() if line.startswith("vistok.apply"))
    assert line == 'vistok.apply(model, "information-horizon", stages=(), horizon=2/2)'
    assert result.stdout.splitlines()[-1] == "out/horizon.png"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--world", "nope"), "--world: got nope, must be one of scenes"),
        (("--n", "1"), "--n"),
        (("--share", "1"), "--share: got 1.0, must be between 0 and 1"),
        (("--eps", "1"), "--eps: got 1.0"),
        (("--out", "FILE"), "--out: got "),
        (("--window", "0"), "--window"),
    ],
)
def test_mistakes_are_one_line(run, small, picture, arguments, message):
    result = run("horizon", small, *(picture if a == "FILE" else a for a in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1 and result.stdout == ""


def test_a_wrong_model_is_named(run):
    result = run("horizon", "nope")
    assert result.exit_code == 2 and "MODEL: got nope" in result.stderr
