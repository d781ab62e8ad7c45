"""``vistok world sample``."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from vistok.world import decode_mask


def test_pictures_and_their_truth_are_written(run, tmp_path):
    result = run("world", "sample", "--out", "some", "--n", "5", "--size", "96", "--seed", "4")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (tmp_path / "some" / "pictures.jsonl").read_text().splitlines()]
    assert [line["task"] for line in lines] == ["scenes", "words", "charts", "forms", "scenes"]
    for line in lines:
        with Image.open(tmp_path / "some" / line["image"]) as image:
            assert image.size == (96, 96)
        assert all(decode_mask(q["evidence"]).shape == (96, 96) for q in line["questions"])
        assert line["questions"][0]["text"] in " ".join(result.stdout.split())


def test_json(run):
    result = run("world", "sample", "--out", "some", "--task", "charts", "--n", "10", "--json")
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(found) == 10
    assert found[0].keys() >= {"image", "task", "seed", "size", "caption", "questions"}
    assert "10 pictures" in result.stderr


def test_seeds(run, tmp_path):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run("world", "sample", "--out", folder, "--n", "1", "--seed", seed).exit_code == 0
    a, b, c = (np.asarray(Image.open(tmp_path / folder / "scenes-000000.png")) for folder in "abc")
    assert (a == b).all()
    assert (a != c).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing option"),
        (("--out", "a", "--task", "nope"), "--task: got nope, must be one of scenes"),
        (("--out", "a", "--size", "63"), "--size: got 63, must be from 64 to 672"),
        (("--out", "a", "--n", "0"), "--n"),
        (("--out", "a", "--seed", "2147483648"), "--seed: got 2147483648"),
        (("--out", "file/below"), "--out: got file/below"),
    ],
)
def test_mistakes(run, tmp_path, arguments, message):
    (tmp_path / "file").touch()
    result = run("world", "sample", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
