"""``vistok gna-sim``: a row a stride, the best one, the picture; mistakes in one line."""

from __future__ import annotations

import json

import pytest
from PIL import Image


def test_rows_are_those_of_the_simulator(run, tmp_path):
    arguments = ("--shape", "16x24", "--kernel", "8x12", "--tile", "4", "--kv-tile", "2x4", "--stride", "3x5")
    result = run("gna-sim", *arguments, "--out", "shown", "--json")
    assert result.exit_code == 0, result.output
    rows = {tuple(row["stride"]): row for row in map(json.loads, result.stdout.splitlines())}
    from vistok.core.attention import GridWindow, simulate

    for stride, row in rows.items():
        found = simulate(GridWindow((16, 24), (8, 12), stride), 4, (2, 4))
        assert (row["visited"], row["partial"], row["bound"]) == (found.visited, found.partial, found.bound)
    assert rows[3, 5]["note"].startswith("asked for") and sum("best" in row["note"] for row in rows.values()) == 1
    best = next(row for row in rows.values() if "best" in row["note"])
    assert best["bound"] == max(row["bound"] for row in rows.values())
    with Image.open(tmp_path / "shown" / "gna-sim.png") as picture:
        picture.load()


def test_table(run):
    result = run("gna-sim", "--shape", "1024", "--kernel", "256", "--tile", "32")
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    assert "shape 1024, kernel 256, dilation 1, tile 32, kv_tile 32" in words
    assert "density 25.00%, FLOP bound 4.00, 1024 tiles best stride: 64" in words
    assert words.endswith("out/gna-sim.png")


def test_a_density_in_place_of_a_kernel(run):
    result = run("gna-sim", "--shape", "32x32", "--density", "0.25", "--tile", "8", "--json")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert all(row["kernel"] == [16, 16] for row in rows) and any(row["note"] == "best, no masks" for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--kernel", "3", "--shape", "1x2x3x4"), "--shape: got 1x2x3x4, must have one to three axes"),
        (("--kernel", "3x"), "--kernel: got 3x, must be whole numbers"),
        (("--kernel", "3x3x3"), "--kernel: got 3x3x3, must be one number for all axes, or 2"),
        ((), "--kernel: got none, must be given"),
        (("--kernel", "3", "--density", "0.5"), "but not both"),
        (("--density", "0.5", "--stride", "2"), "--density: got 0.5, goes without --stride"),
        (("--kernel", "99"), "kernel: got 99 with dilation 1, must fit into the 64"),
        (("--kernel", "3", "--stride", "5"), "stride: got 5"),
        (("--density", "0.0001"), "density: got 0.0001, must be at least"),
    ],
)
def test_mistakes_are_one_line(run, arguments, message):
    result = run("gna-sim", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1 and result.stdout == ""
