"""``vistok compare``: rows, tables, and the two files, on an untrained model."""

from __future__ import annotations

import json
import shlex

import pytest
from PIL import Image

from vistok.bench import compare
from vistok.bench.statistics import wilson

FIELDS = {
    "method", "keep", "tokens_in", "tokens_kept", "answer", "correct", "ttft_ms", "flops", "kv_bytes",
    "evidence_recall",
}  # fmt: skip
WORLD_FIELDS = FIELDS | {"task", "n", "accuracy", "accuracy_low", "accuracy_high"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What is measured is not looked at: one round will do."""
    once = compare.cost_all
    monkeypatch.setattr(compare, "cost_all", lambda *given, repeats: once(*given, repeats=1))


def rows(result):
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_one_picture(run, small, picture, tmp_path):
    given = ("compare", picture, "is there <b>a star</b>?", "--methods", "random,fastervlm", "--keep", "0.25,10",
             "--model", small, "--out", "shown", "--json")  # fmt: skip
    result = run(*given)
    found = rows(result)
    assert [(row["method"], row["keep"], row["tokens_kept"]) for row in found] == [
        ("dense", 1.0, 196), ("random", 0.25, 49), ("random", 10, 10), ("fastervlm", 0.25, 49), ("fastervlm", 10, 10),
    ]  # fmt: skip
    assert all(row.keys() >= FIELDS for row in found)
    assert all(row["correct"] is None and row["evidence_recall"] is None for row in found)
    assert "shown/compare.html" in result.stderr
    assert sorted(p.name for p in (tmp_path / "shown").iterdir()) == ["compare.html", "compare.png"]
    page = (tmp_path / "shown" / "compare.html").read_text()
    assert "is there &lt;b&gt;a star&lt;/b&gt;?" in page
    assert "<b>a star" not in page
    assert shlex.quote(str(picture)).replace("'", "&#39;") in page
    with Image.open(tmp_path / "shown" / "compare.png") as sheet:
        sheet.load()


def test_the_samples_with_every_method(run, small, tmp_path):
    """The main job of ``make demo``."""
    result = run("compare", "--samples", "--model", small, "--keep", "0.11")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[-2:] == ["out/compare.html", "out/compare.png"]
    for name in ("scenes", "words", "charts", "forms", "dense", "random", "uniform", "holov", "of 4"):
        assert name in result.stdout
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.count("<article>") % page.count('<section class="case">') == 0
    assert page.count('<section class="case">') >= 4


def test_samples_are_the_default_and_json_has_a_row_for_each(run, small):
    found = rows(run("compare", "--methods", "uniform", "--model", small, "--json"))
    pictures = {row["picture"] for row in found}
    assert {name.split(":")[1] for name in pictures if ":" in name} == {"scenes", "words", "charts", "forms"}
    assert len(pictures) in (4, 6)
    drawn = next(r for r in found if r["picture"].startswith("world:charts:") and r["method"] == "uniform")
    again = rows(
        run("compare", drawn["picture"], drawn["question"], "--methods", "uniform", "--model", small, "--json")
    )
    assert (again[1]["truth"], again[1]["evidence_recall"]) == (drawn["truth"], drawn["evidence_recall"])
    assert len(found) == 2 * len(pictures)
    for row in found:
        assert row["correct"] is None if row["truth"] is None else row["correct"] == (row["answer"] == row["truth"])
        assert (row["evidence_recall"] is None) == (row["truth"] is None)


@pytest.mark.parametrize(("task", "families"), [("scenes", {"existence", "colour"}), ("all", {"reading", "key-value"})])
def test_the_world(run, small, tmp_path, task, families):
    given = ("compare", "--world", task, "--n", "24", "--methods", "dense,random", "--model", small)
    found = rows(run(*given, "--json"))
    assert [row["method"] for row in found] == ["dense", "random"]
    for row in found:
        assert row.keys() >= WORLD_FIELDS
        assert (row["task"], row["n"]) == (task, 24)
        low, high = wilson(round(24 * row["accuracy"]), 24)
        assert (row["accuracy_low"], row["accuracy_high"]) == pytest.approx((low, high))
    assert found[0]["evidence_recall"] == 1
    assert 0 < found[1]["evidence_recall"] < 0.6
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "Accuracy by kind of question" in page
    for family in families:
        assert f">{family} (" in page
    again = run(*given)
    assert "24 pictures" in again.stdout
    assert "95%" in again.stdout


def test_a_seed_gives_the_same_answers_again(run, small):
    given = ("compare", "--world", "words", "--n", "6", "--methods", "random", "--model", small, "--json", "--seed")
    first, again, other = ([row["evidence_recall"] for row in rows(run(*given, seed))] for seed in (1, 1, 2))
    assert first == again != other


def test_a_method_that_cannot_serve_the_model_is_left_out_of_all(run, small, tmp_path, monkeypatch):
    from vistok.reduce.hiprune import HiPrune

    def refuse(self, evidence, keep):
        raise ValueError("evidence: not for this one")

    monkeypatch.setattr(HiPrune, "select", refuse)
    monkeypatch.setattr("vistok.cli.options.catalogue.methods", lambda family: systems)
    from vistok import catalogue

    systems = [catalogue.card(name) for name in ("hiprune", "uniform")]
    result = run("compare", "world:scenes:0", "--model", small, "--json")
    assert [row["method"] for row in rows(result)] == ["dense", "uniform"]
    assert "hiprune is left out: evidence: not for this one" in result.stderr
    assert "hiprune is left out" in (tmp_path / "out" / "compare.html").read_text()
    named = run("compare", "world:scenes:0", "--model", small, "--methods", "hiprune")
    assert named.exit_code == 2
    assert named.stderr.splitlines()[-1] == "error: evidence: not for this one"


MISTAKES = {
    "question": (("PICTURE",), "QUESTION: got nothing"),
    "picture": (("none.png", "what?"), "PICTURE: got none.png"),
    "two": (("PICTURE", "what?", "--samples"), "--samples: got both, must not be given with PICTURE"),
    "three": (("--samples", "--world", "scenes"), "--world: got both"),
    "world": (("--world", "nope"), "--world: got nope, must be one of scenes"),
    "n": (("--n", "5"), "--n: got 5, needs --world"),
    "n 0": (("--world", "all", "--n", "0"), "--n"),
    "methods": (("--methods", "random,holof"), "--methods: got holof"),
    "keep": (("--keep", "0.25,0"), "--keep: got 0"),
    "keep above N": (("--keep", "0.5,200", "--model", "SMALL", "--methods", "random"), "keep: got 200, must be"),
    "out": (("--out", "PICTURE"), "--out: got "),
    "model": (("--model", "nope"), "--model: got nope"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(run, small, picture, tmp_path, name):
    arguments, message = MISTAKES[name]
    result = run("compare", *({"PICTURE": picture, "SMALL": small}.get(a, a) for a in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
