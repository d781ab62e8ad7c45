"""``vistok tokenize`` and ``vistok detokenize``."""

from __future__ import annotations

import json

import pytest
import torch

import vistok


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    torch.manual_seed(0)
    model = vistok.create("vq-grid", size="T", image=16, patch=4, codes=32, dim=4).build()
    model(torch.rand(4, 3, 16, 16))
    return model.eval().save(tmp_path_factory.mktemp("tokenizer"))


def test_there_and_back(run, picture, tokenizer, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"bad")
    found = run("tokenize", tmp_path, "--tokenizer", tokenizer, "--out", tmp_path / "ids", "--json")
    assert found.exit_code == 0, found.output
    row = json.loads(found.stdout)
    assert row.pop("seconds") >= 0
    assert row == {"folder": str(tmp_path / "ids"), "complete": True, "pictures": 1, "rejects": 1, "shards": 1}
    again = run("tokenize", tmp_path, "--tokenizer", tokenizer, "--out", tmp_path / "ids")
    assert again.exit_code == 0 and "1 pictures as ids" in again.output and "rejects.parquet" in again.output
    back = run("detokenize", tmp_path / "ids", "--out", tmp_path / "back")
    assert back.exit_code == 0 and (tmp_path / "back" / "a picture.png.png").is_file()
    told = run("detokenize", tmp_path / "ids", "--out", tmp_path / "back", "--json")
    assert json.loads(told.stdout)["complete"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shard-size", "5"], "--out: "),
        (["--engine", "slurm"], "--engine: got slurm, must be local or ray"),
        (["--address", "auto"], "--address: got auto, goes with --engine ray"),
        (["--tokenizer", "nothing-here"], "nothing-here"),
    ],
)
def test_mistakes(run, picture, tokenizer, tmp_path, more, message):
    run("tokenize", tmp_path, "--tokenizer", tokenizer, "--out", tmp_path / "ids")
    found = run("tokenize", tmp_path, "--tokenizer", tokenizer, "--out", tmp_path / "ids", *more)
    assert found.exit_code == 2 and message in found.stderr


def test_a_source_that_is_not_there(run, tokenizer, tmp_path):
    for source in ("nothing", "*.png"):
        found = run("tokenize", source, "--tokenizer", tokenizer, "--out", "ids")
        assert found.exit_code == 2 and "error: SOURCE: got " in found.stderr and f"{source}', " in found.stderr
    found = run("detokenize", tmp_path, "--out", tmp_path / "back")
    assert found.exit_code == 2 and "error: DIR: " in found.stderr


def test_shards_that_fail_are_told(run, tokenizer, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"label": [1]}), tmp_path / "a.parquet")
    found = run("tokenize", tmp_path / "a.parquet", "--tokenizer", tokenizer, "--out", tmp_path / "ids")
    assert found.exit_code == 2 and "has 1 shards that could not be done" in found.stderr
    assert "column: got 'image', must be one of label" in found.stderr
