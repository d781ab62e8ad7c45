"""Sweeps: from a file to cells, rows on disk, tables of equal tokens, and what changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vistok.bench import rows, run
from vistok.bench.joint import combinations
from vistok.bench.summary import against, broken, changes, summarise, tables
from vistok.bench.sweep import IDENTITY, VERSION, Cell, Sweep
from vistok.bench.sweep_report import markdown, write
from vistok.world import sample

QUICK = """
models = ["vistok-tiny"]
methods = ["holov", "aim-merge+fastv"]
keep = [0.25, 16]
tasks = ["scenes"]
n = 8
[hyper.holov]
chunks = 8
"""


def config(folder: Path, text: str = QUICK) -> Path:
    path = folder / "quick.toml"
    path.write_text(text)
    return path


def test_a_file_expands_to_cells(tmp_path):
    cells = Sweep.read(config(tmp_path)).cells()
    assert len({cell.key for cell in cells}) == len(cells) == 4 + 1 + 2 * 4
    assert [cell.method for cell in cells if cell.protocol == IDENTITY] == [
        "random", "uniform", "holov", "aim-merge+fastv",
    ]  # fmt: skip
    asked = [cell for cell in cells if cell.protocol == "single"]
    assert asked[0].method == "dense"
    assert {cell.keep for cell in asked[1:]} == {0.25, 16}
    assert all(cell.hyper == (("chunks", 8),) for cell in cells if cell.method == "holov")


def test_a_key_is_the_content(tmp_path):
    first, again = (Sweep.read(config(tmp_path)).cells() for _ in range(2))
    assert [cell.key for cell in first] == [cell.key for cell in again]
    more = Sweep.read(config(tmp_path, QUICK.replace("[0.25, 16]", "[0.25, 16, 0.1]"))).cells()
    assert {cell.key for cell in first} < {cell.key for cell in more}
    # Known by heart: it must not change from machine to machine, or from release to release without a new VERSION.
    assert Cell("m", "random", 0.5, "scenes", "single", "float32", 8, 0).key == "ec92911f2dc8a691e594"
    assert Cell("m", "random", 1, "scenes", "single", "float32", 8, 0).key != (
        Cell("m", "random", 1.0, "scenes", "single", "float32", 8, 0).key
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"holov"', '"holof"', "methods: got 'holof'"),
        ('"scenes"', '"seens"', "tasks: got 'seens', must be among"),
        ("0.25", "1.5", "keep: got 1.5"),
        ("chunks", "chunk", "hyper.holov: got 'chunk', must be among"),
        ("n = 8", "n = 0", "n: got 0"),
        ("n = 8", 'm = "x"', "got 'm', must be among"),
        ('tasks = ["scenes"]', "", "tasks is missing"),
        ('tasks = ["scenes"]', 'tasks = "scenes"', "tasks: got 'scenes', must be a list"),
        ("models", "= models", "is no TOML file"),
    ],
)
def test_mistakes_are_named(tmp_path, old, new, message):
    with pytest.raises(ValueError, match=r"quick\.toml") as caught:
        Sweep.read(config(tmp_path, QUICK.replace(old, new)))
    assert message in str(caught.value)


# Rows -----------------------------------------------------------------------------------------------------------------


def made(folder, method="random", keep=0.5, tokens=98.0, right=(1, 0, 1, 1), row=None, **more):
    """Write a cell of made-up rows, each with the columns of ``row``."""
    how = {"model": "m", "task": "scenes", "protocol": "single", "precision": "float32", "n": len(right), "seed": 0}
    cell = Cell(method=method, keep=keep, **how | more)
    rows.write(
        folder,
        cell,
        [
            {
                "question": f"scenes:{cell.seed}:{number}", "family": "colour", "correct": bool(hit),
                "tokens_in": 196, "tokens_input": round(tokens), "tokens_mean": tokens, "evidence_recall": 0.5,
                "ttft_ms": 10.0, "ttft_spread_ms": 1.0, "ttft_over_dense": 0.5, "vision_ms": 3.0, "select_ms": 1.0,
                "prefill_ms": 5.0, "decode_ms": 1.0, "flops": 1e9,
                "kv_bytes": 1000, "weight_bytes": 9000, "peak_bytes": 500, "machine": "m", "versions": "v", "date": "d",
                **(row or {}),
            }
            for number, hit in enumerate(right)
        ],
    )  # fmt: skip
    return cell


def test_rows_come_back_and_are_readable_by_others(tmp_path):
    cell = made(tmp_path)
    assert rows.done(tmp_path, cell.key)
    assert not rows.done(tmp_path, "other")
    frame = rows.read(tmp_path)
    assert frame.columns == list(rows.COLUMNS)
    assert frame["correct"].to_list() == [True, False, True, True]
    assert set(frame["version"]) == {VERSION}
    assert json.loads(frame["hyper"][0]) == {}
    duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed")
    found = duckdb.sql(f"select method, avg(correct::int) from '{tmp_path}/rows/*.parquet' group by method").fetchall()
    assert found == [("random", 0.75)]


@pytest.mark.parametrize("content", [b"", b"PAR1 and then nothing", None])
def test_a_broken_file_is_put_aside_and_measured_again(tmp_path, content):
    cell, path = made(tmp_path), None
    path = rows.place(tmp_path, cell.key)
    path.write_bytes(path.read_bytes()[:100] if content is None else content)
    assert not rows.done(tmp_path, cell.key)
    assert path.with_name(path.name + ".bad").exists()
    with pytest.raises(ValueError, match="holds no results"):
        rows.read(tmp_path)


def test_no_half_written_file_is_ever_there(tmp_path, monkeypatch):
    def full(self, data):
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        made(tmp_path)
    assert list((tmp_path / "rows").iterdir()) == []


# Tables ---------------------------------------------------------------------------------------------------------------


def sweep_of(folder):
    made(folder, "dense", 1.0, 196.0, (1, 1, 1, 1))
    for keep, tokens in ((0.5, 98.0), (0.1, 20.0)):
        made(folder, "random", keep, tokens, (1, 0, 0, 0))
        made(folder, "uniform", keep, tokens, (1, 0, 1, 0))
        made(folder, "holov", keep, tokens, (1, 1, 1, 0))
        made(folder, "fastv", keep, tokens * 1.01, (0, 0, 0, 0))
    made(folder, "yopo", 0.1, 98.0, (1, 1, 1, 1))
    return rows.read(folder)


def test_only_equal_tokens_share_a_table(tmp_path):
    found = tables(summarise(sweep_of(tmp_path)))
    assert [[(row["method"], row["keep"]) for row in table] for table in found] == [
        [("dense", 1.0), ("random", 0.5), ("uniform", 0.5), ("yopo", 0.1), ("holov", 0.5), ("fastv", 0.5)],
        [("dense", 1.0), ("random", 0.1), ("uniform", 0.1), ("holov", 0.1), ("fastv", 0.1)],
    ]
    for table in found:
        counts = [row["tokens"] for row in table[1:]]
        assert max(counts) <= min(counts) * 1.05


def test_differences_are_on_the_same_questions(tmp_path):
    found = {(row["method"], row["keep"]): row for row in summarise(sweep_of(tmp_path))}
    holov = found["holov", 0.5]
    assert holov["over_dense"] == -0.25
    assert holov["over_random"] == 0.5
    assert holov["over_random_low"] <= 0.5 <= holov["over_random_high"]
    assert found["dense", 1.0]["over_random"] is None
    assert found["random", 0.1]["over_random"] is None
    assert found["random", 0.1]["over_dense"] == -0.75
    assert found["yopo", 0.1]["over_dense"] == 0


def test_several_seeds_are_one_row_over_all_their_questions(tmp_path):
    made(tmp_path, "dense", 1.0, 196.0, (1, 1))
    made(tmp_path, "dense", 1.0, 196.0, (0, 0, 0, 0), seed=1)
    (row,) = summarise(rows.read(tmp_path))
    assert (row["n"], row["accuracy"]) == (6, pytest.approx(1 / 3))


def test_answers_are_held_against_dense(tmp_path):
    made(tmp_path, "dense", 1.0, 196.0, (1, 1, 0, 0), row={"answer": "red", "probability": 0.8, "confidence": 0.9})
    made(tmp_path, "holov", 0.5, 98.0, (1, 0, 0, 0), row={"answer": "Red ", "probability": 0.6, "confidence": 0.5})
    made(tmp_path, "fastv", 0.5, 98.0, (1, 1, 0, 0), row={"answer": "blue"})
    found = {row["method"]: row for row in summarise(rows.read(tmp_path))}
    assert found["dense"]["agreement"] is None and found["dense"]["probability_drop"] is None
    assert found["holov"]["agreement"] == 1 and found["fastv"]["agreement"] == 0
    assert found["holov"]["probability"] == pytest.approx(0.6)
    assert found["holov"]["probability_drop"] == pytest.approx(0.2)
    assert found["holov"]["calibration_error"] == pytest.approx(0.25)
    assert found["fastv"]["probability_drop"] is None and found["fastv"]["calibration_error"] is None
    family = found["holov"]["families"]["colour"]
    assert (family["n"], family["accuracy"]) == (4, 0.25)


def test_without_a_truth_what_dense_says_is_right(tmp_path):
    unknown = {"correct": None, "truth": None}
    made(tmp_path, "dense", 1.0, 196.0, row=unknown | {"answer": "a dog"})
    made(tmp_path, "holov", 0.5, 98.0, row=unknown | {"answer": "A dog"})
    made(tmp_path, "fastv", 0.5, 98.0, row=unknown | {"answer": "a cat"})
    found = {row["method"]: row["accuracy"] for row in summarise(rows.read(tmp_path))}
    assert found == {"dense": 1, "holov": 1, "fastv": 0}


def test_a_recipe_against_itself_with_other_steps(tmp_path):
    made(tmp_path, "dense", 1.0, 196.0)
    made(tmp_path, "holov", 0.5, 98.0, (1, 1, 0, 0))
    made(tmp_path, "holov:select=topk", 0.5, 98.0, (1, 1, 1, 0))
    made(tmp_path, "fastv", 0.5, 98.0)
    found = {row["method"]: row for row in against(rows.read(tmp_path), "holov")}
    assert set(found) == {"holov", "holov:select=topk"}
    assert found["holov"]["over"] is None
    assert found["holov:select=topk"]["over"] == 0.25


def test_a_method_that_is_not_dense_with_all_tokens_is_named(tmp_path):
    made(tmp_path, "holov", 1.0, 196.0, (1, 1), protocol=IDENTITY)
    assert broken(rows.read(tmp_path)) == []
    made(tmp_path, "fastv", 1.0, 196.0, (1, 0), protocol=IDENTITY)
    frame = rows.read(tmp_path)
    assert broken(frame) == ["fastv on m (float32)"]
    made(tmp_path, "dense", 1.0, 196.0)
    frame = rows.read(tmp_path)
    assert "not the dense model: fastv on m (float32)." in markdown(summarise(frame), frame)


def test_changes_beyond_noise(tmp_path):
    for folder, hits in (("a", (1,) * 40), ("b", (1,) * 10 + (0,) * 30)):
        made(tmp_path / folder, "holov", 0.5, 98.0, hits)
        made(tmp_path / folder, "random", 0.5, 98.0, (1, 0) * 20)
    found = {row["method"]: row for row in changes(rows.read(tmp_path / "a"), rows.read(tmp_path / "b"))}
    assert (found["holov"]["verdict"], found["holov"]["change"]) == ("lower", -0.75)
    assert (found["random"]["verdict"], found["random"]["change"]) == ("same", 0)
    back = changes(rows.read(tmp_path / "b"), rows.read(tmp_path / "a"))
    assert {row["method"]: row["verdict"] for row in back} == {"holov": "higher", "random": "same"}


def test_a_report_is_written(tmp_path):
    sweep_of(tmp_path)
    paths = {path.name: path for path in write(tmp_path)}
    table, picture = paths["report.md"], paths["report.svg"]
    text = table.read_text()
    assert "## m, float32, scenes, single: 98.0 tokens" in text
    assert "| holov | 0.5 | 75.0% |" in text
    assert "| chrF |" in text
    assert picture.read_bytes().startswith(b"<?xml")
    before = picture.read_bytes()
    write(tmp_path)
    assert picture.read_bytes() == before


# Measuring ------------------------------------------------------------------------------------------------------------


def test_cells_are_measured(tmp_path, monkeypatch):
    from tests.small import save_small_model

    monkeypatch.setattr(run, "REPEATS", 1)
    model = str(save_small_model(tmp_path / "small"))
    worker = run.Worker(tmp_path)
    sweep = Sweep("x", (model,), ("fastv", "yopo"), (0.25,), ("scenes",), n=3)
    for cell in sweep.cells():
        assert worker(cell) == (4 if cell.protocol == IDENTITY else 3)
    frame = rows.read(tmp_path)
    assert broken(frame) == []
    asked = frame.filter(frame["protocol"] == "single")
    by_method = {key[0]: part for key, part in asked.group_by("method")}
    assert by_method["dense"]["tokens_mean"].to_list() == [196.0] * 3
    assert by_method["random"]["tokens_input"].to_list() == [49] * 3
    assert by_method["fastv"]["tokens_mean"].to_list() == pytest.approx([49.0] * 3, abs=1)
    assert by_method["fastv"]["tokens_input"][0] > 49
    assert by_method["random"]["flops"][0] < by_method["dense"]["flops"][0]
    assert by_method["random"]["kv_bytes"][0] < by_method["dense"]["kv_bytes"][0]
    assert by_method["dense"]["question"].to_list() == by_method["random"]["question"].to_list()
    checks = frame.filter((frame["protocol"] == IDENTITY) & (frame["method"] == "yopo"))
    assert checks["correct"].to_list() == [None] * 4


def test_protocols_and_probabilities_are_measured(tmp_path, monkeypatch):
    from tests.small import save_small_model

    monkeypatch.setattr(run, "REPEATS", 1)
    model = str(save_small_model(tmp_path / "small"))
    worker = run.Worker(tmp_path)
    protocols = ("single", "reuse-first", "reselect", "two-pictures")
    sweep = Sweep(
        "x", (model,), ("holov:select=max_sum",), (0.25,), ("scenes",), protocols, n=3, probabilities=True,
        caches=("none", "fp8"),
    )  # fmt: skip
    for cell in sweep.cells():
        worker(cell)
    frame = rows.read(tmp_path)
    assert broken(frame) == []
    for protocol in protocols:
        asked = frame.filter((frame["protocol"] == protocol) & (frame["method"] == "holov:select=max_sum"))
        assert asked["tokens_input"].to_list() == [49] * 6
        assert [len(kept) for kept in asked["kept"]] == [49] * 6
        assert set(asked["grid_height"]) == {14}
        known = protocol in ("single", "two-pictures")
        assert all((value is not None) == known for value in asked["probability"])
        assert all(value is None or 0 <= value <= 1 for value in asked["confidence"])
        by_cache = {key[0]: part["kv_bytes"][0] for key, part in asked.group_by("cache")}
        assert by_cache["fp8"] * 4 == pytest.approx(by_cache["none"], rel=0.05)
    assert {(row["weights"], row["cache"]) for row in combinations(frame)} == {("none", "none"), ("none", "fp8")}


@pytest.mark.parametrize("protocol", ["single", "detail", "long-answer", "reselect", "blur-3", "letterbox-1"])
def test_protocols_ask_one_question_a_picture(protocol):
    cell = Cell("m", "random", 0.5, "all", protocol, "float32", 6, 0)
    cases, plain = run.cases_of(cell), run.cases_of(Cell("m", "random", 0.5, "all", "single", "float32", 6, 0))
    assert 0 < len(cases) <= 6
    assert len({case.picture.tobytes() for case in cases}) == len(cases)
    if protocol == "long-answer":
        assert [case.truth.answer for case in cases] == [p.caption for p in sample("all", 6, split="test", questions=1)]
    elif protocol == "reselect":
        assert all(case.first and case.first[0] != case.question for case in cases)
    elif protocol == "detail":
        assert all(
            case.truth.family in ("reading", "key-value") or case.truth.evidence.mean() <= 0.02 for case in cases
        )
    else:
        assert [case.question for case in cases] == [case.question for case in plain]
        same = [a.picture.tobytes() == b.picture.tobytes() for a, b in zip(cases, plain, strict=True)]
        assert same == [protocol == "single"] * 6
