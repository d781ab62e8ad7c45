"""``vistok ask`` on an untrained model: rows, the overlay, and every mistake in one line."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from vistok.world import derive_seed, make

FIELDS = {"method", "keep", "tokens_in", "tokens_kept", "answer", "correct", "ttft_ms", "flops", "kv_bytes"}


def rows(result):
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize(("keep", "count"), [("0.25", 49), ("64", 64), ("10%", 20), ("196", 196), ("1", 1)])
def test_keep_is_honoured(run, small, picture, keep, count):
    dense, kept = rows(
        run("ask", picture, "is there a star?", "--model", small, "--method", "random", "--keep", keep, "--json")
    )
    assert dense.keys() >= FIELDS
    assert (dense["method"], dense["tokens_in"], dense["tokens_kept"]) == ("dense", 196, 196)
    assert (kept["method"], kept["tokens_in"], kept["tokens_kept"]) == ("random", 196, count)
    assert kept["correct"] is None
    assert kept["evidence_recall"] is None
    if count < 196:
        assert kept["flops"] < dense["flops"]
        assert kept["kv_bytes"] < dense["kv_bytes"]
    else:
        assert kept["flops"] == dense["flops"]
        assert kept["answer"] == dense["answer"]
    assert kept["ttft_ms"] > 0


def test_the_table(run, small, picture):
    result = run("ask", picture, "is there a star?", "--model", small)
    assert result.exit_code == 0
    assert "49 of 196" in result.stdout
    assert "holov" in result.stdout
    assert "dense" in result.stdout
    assert "Traceback" not in result.stderr


def test_the_overlay_has_the_size_of_the_picture_or_more(run, small, picture, tmp_path):
    result = run("ask", picture, "what?", "--model", small, "--method", "uniform", "--overlay", "kept.png")
    assert result.exit_code == 0, result.output
    assert "kept.png" in result.stdout
    with Image.open(tmp_path / "kept.png") as drawn, Image.open(picture) as given:
        assert drawn.width / drawn.height == given.width / given.height
        assert drawn.width >= given.width
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a picture.png", "kept.png"]


def test_a_picture_of_the_world_knows_the_truth(run, small):
    drawn = make("scenes", derive_seed(0, 3, "test"))
    asked = drawn.questions[2]
    found = rows(run("ask", "world:scenes:3", asked.text.upper(), "--model", small, "--method", "random", "--json"))
    assert {row["truth"] for row in found} == {asked.answer}
    assert found[0]["correct"] == (found[0]["answer"].casefold() == asked.answer.casefold())
    assert found[0]["evidence_recall"] == 1
    assert 0 <= found[1]["evidence_recall"] < 1
    first = rows(run("ask", "world:scenes:3", "--model", small, "--method", "random", "--json"))
    assert first[0]["question"] == drawn.questions[0].text


def test_dense_alone_is_one_row(run, small, picture):
    (row,) = rows(run("ask", picture, "what?", "--model", small, "--method", "dense", "--json"))
    assert row["method"] == "dense"


def test_the_seed_moves_random_tokens(run, small):
    drawn = make("words", derive_seed(0, 0, "test"))
    local = min(drawn.questions, key=lambda q: q.evidence.sum())

    def recall(seed: int) -> float:
        given = ("ask", "world:words:0", local.text, "--model", small, "--method", "random", "--json", "--seed", seed)
        return rows(run(*given))[1]["evidence_recall"]

    found = [recall(seed) for seed in (0, 1, 0)]
    assert found[0] == found[2] != found[1]


MISTAKES = {
    "missing file": (("none.png", "what?"), "PICTURE: got none.png, there is no such file"),
    "folder": ((".", "what?"), "PICTURE: got ., must be a file"),
    "no question": (("PICTURE",), "QUESTION: got nothing"),
    "empty question": (("PICTURE", " "), "QUESTION: got nothing"),
    "no picture": ((), "Missing argument"),
    "method": (("PICTURE", "what?", "--method", "holof"), "--method: got holof, must be a system: did you mean holov?"),
    "two methods": (("PICTURE", "what?", "--method", "random,pool"), "must be one method"),
    "all": (("PICTURE", "what?", "--method", "all"), "must be one method"),
    "keep 0": (("PICTURE", "what?", "--keep", "0"), "--keep: got 0, must be"),
    "keep below 0": (("PICTURE", "what?", "--keep", "-3"), "--keep: got -3, must be"),
    "keep nan": (("PICTURE", "what?", "--keep", "nan"), "--keep: got nan, must be"),
    "keep above 1": (("PICTURE", "what?", "--keep", "1.01"), "--keep: got 1.01, must be"),
    "keep above N": (
        ("PICTURE", "what?", "--model", "SMALL", "--keep", "197"),
        "keep: got 197, must be at most the 196",
    ),
    "no model": (("PICTURE", "what?", "--model", "./none"), "--model: got ./none"),
    "no weights": (("PICTURE", "what?", "--model", "EMPTY"), "has no weights"),
    "image token": (
        ("PICTURE", "what is <image>?", "--model", "SMALL"),
        "QUESTION: got what is <image>?, must not contain",
    ),
    "overlay ending": (("PICTURE", "what?", "--overlay", "a.xyz"), "--overlay: got a.xyz, must end in .png"),
    "overlay folder": (("PICTURE", "what?", "--overlay", "none/a.png"), "--overlay: got none/a.png"),
    "world": (("world:nope:1", "what?"), "PICTURE: got world:nope:1"),
    "seed": (("PICTURE", "what?", "--seed", "-1"), "--seed"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(run, small, picture, tmp_path, name):
    arguments, message = MISTAKES[name]
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text('{"model_type": "llava"}')
    places = {"PICTURE": picture, "SMALL": small, "EMPTY": empty}
    result = run("ask", *(places.get(a, a) for a in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_an_unsupported_model_is_one_line(run, small, picture, monkeypatch):
    from vistok.host.hosts import FAMILIES

    monkeypatch.setattr(
        "vistok.host.hosts.FAMILIES", {k: v for k, v in FAMILIES.items() if not k.startswith("LlavaFor")}
    )
    result = run("ask", picture, "what?", "--model", small)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: LlavaForConditionalGeneration: not supported yet")
    assert result.stderr.count("\n") == 1


def test_debug_shows_the_traceback(run, tmp_path):
    (tmp_path / "empty.png").touch()
    result = run("ask", "empty.png", "what?", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1] == "error: PICTURE: got empty.png, must be a picture, the file is empty"
