"""The page of a sweep: whole, self-contained, with the summary's numbers; the front; and what is picked to be shown."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.bench.test_report import Page
from vistok.bench import joint, rows, summary
from vistok.bench.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Point, chart, looks
from vistok.bench.compare import case_of
from vistok.bench.figures import dropped, outline
from vistok.bench.markdown import as_many, fair
from vistok.bench.page import render
from vistok.bench.pareto import front
from vistok.bench.summary import PLACE, summarise
from vistok.bench.sweep import IDENTITY, Cell
from vistok.bench.sweep_report import markdown, write
from vistok.bench.wins import pick
from vistok.world import sample

EVIL = "<script>alert(1)</script>\" onload='x'"
N = 8
METHODS = ("random", "uniform", "holov", "fastv")


def cases(cell):
    """Pictures and questions of a cell, quickly."""
    found = sample("scenes", cell.n, seed=cell.seed, split="test", questions=1)
    return [case_of(picture, picture.questions[0]) for picture in found]


def made(folder, method="random", keep=0.5, tokens=98.0, right=(1, 0, 1, 1) * 2, kept=None, **more):
    """Write a cell of made-up rows; those of ``more`` that are no fields of a cell stand in the rows."""
    place = {"model": "m", "task": "scenes", "protocol": "single", "precision": "float32", "seed": 0, "hyper": ()}
    place |= {"weights": "none", "cache": "none"}
    how = {name: more.pop(name, value) for name, value in place.items()}
    cell = Cell(method=method, keep=keep, n=len(right), **how)
    rng = np.random.default_rng(len(method))
    asked = [case.question for case in cases(cell)]
    rows.write(
        folder,
        cell,
        [
            {
                "question": f"{cell.task}:{cell.seed}:{number}", "family": ("colour", "shape")[number % 2],
                "asked": asked[number], "truth": "red", "answer": "red" if hit else "blue", "correct": bool(hit),
                "tokens_in": 196, "tokens_input": round(tokens), "tokens_mean": tokens, "evidence_recall": 0.5,
                "kept": sorted(rng.permutation(196)[: round(tokens)].tolist()) if kept is None else kept,
                "grid_height": 14, "grid_width": 14, "ttft_ms": 20.0 * tokens / 196 + len(method), "vision_ms": 3.0,
                "ttft_spread_ms": 1.0, "ttft_over_dense": 0.5, "select_ms": 1.0, "prefill_ms": 5.0,
                "flops": 1e9, "kv_bytes": 1000, "machine": "a machine", "versions": "v", "date": "2026-01-01T00:00:00",
                **more,
            }
            for number, hit in enumerate(right)
        ],
    )  # fmt: skip
    return cell


@pytest.fixture(autouse=True)
def quick_intervals(monkeypatch):
    """Ten thousand resamples for every number of a page would take minutes."""

    def interval(values, others, *, seed=0):
        middle = float(np.mean(values) - np.mean(others))
        return middle - 0.1, middle + 0.1

    monkeypatch.setattr(summary, "paired_bootstrap", interval)
    monkeypatch.setattr(joint, "paired_bootstrap", interval)


HITS = {
    "random": (1, 0, 0, 0, 1, 0, 0, 0),
    "uniform": (1, 0, 0, 1, 0, 0, 0, 0),
    "holov": (1, 1, 1, 1, 0, 0, 0, 0),
    "fastv": (0, 1, 0, 0, 1, 0, 0, 0),
}


def sweep_of(folder, **more):
    made(folder, "dense", 1.0, 196.0, (1,) * N, **more)
    for keep, tokens in ((0.5, 98.0), (0.1, 20.0)):
        for method in METHODS:
            made(folder, method, keep, tokens, HITS[method], **more)
    return rows.read(folder)


def page_of(frame):
    return render(frame, summarise(frame), cases)


# The page -------------------------------------------------------------------------------------------------------------


def test_all_pieces_are_there(tmp_path):
    sweep_of(tmp_path)
    frame = sweep_of(tmp_path, task="words")
    text = page_of(frame)
    page = Page(text)
    for piece in (
        "2 methods on m at 50% and 10%: scenes, words", "a machine", "Points above random tokens, at every place",
        "98.0 tokens", "20.0 tokens", "By kind of question", "Where time and memory go", "Wins and losses",
        "colour <span>(4)</span>", "Not beaten at its tokens", "Not beaten at its milliseconds",
    ):  # fmt: skip
        assert piece in text
    names = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = {attributes["href"][1:] for attributes in page.all("a")}
    assert {"place-1", "place-2", "wins", "how"} <= links <= names
    assert len(page.all("details")) == 2 + 2 * 3
    assert (
        len([one for one in page.all("svg") if one.get("role") == "img" and "overlay" not in one.get("class", "")]) == 4
    )
    assert len(page.all("table")) == 2 + 2 * 4


def test_places_and_methods_stand_in_order_whatever_the_files_are_called(tmp_path):
    for more in ({"protocol": "noise-1"}, {"weights": "int8"}, {}):
        frame = sweep_of(tmp_path, task="words", weight_bytes=10**6, **more)
    text = page_of(frame)
    links = re.findall(r'<li><a href="#place-\d">(.*?)</a>', text)
    assert links == ["as it is, words, single", "as it is, words, noise-1", "int8 weights, words, single"]
    legend = re.findall(r'<li data-m="(.*?)">', text[text.index('id="place-1"') :])
    assert legend[:5] == ["dense", "random", "uniform", "fastv", "holov"]
    assert re.findall(r"<h3>keep (.*?)</h3>", text) == ["50%", "10%"]


def test_the_numbers_are_the_summary_s(tmp_path):
    frame = sweep_of(tmp_path)
    text = page_of(frame)
    found = {(row["method"], row["keep"]): row for row in summarise(frame)}
    lines = re.findall(r"<tr data-m=.*?</tr>", text, re.S)
    for (method, keep), row in found.items():
        mine = [line for line in lines if f'data-m="{method}"' in line and f'data-value="{keep:g}"' in line]
        table = next(line for line in mine if "interval" in line)
        assert f">{100 * row['accuracy']:.1f}%<small>" in table
        assert f"<small>{100 * row['accuracy_low']:.0f} to {100 * row['accuracy_high']:.0f}</small>" in table
        assert f">{row['ttft_ms']:.1f}<small>" in table
        if row["over_random"] is not None:
            assert f">{100 * row['over_random']:+.1f}<" in table
            assert f"{100 * row['over_random_low']:+.1f} to {100 * row['over_random_high']:+.1f}" in table
        for one in row["families"].values():
            assert any(f">{100 * one['accuracy']:.0f}</td>" in line for line in mine if "title=" in line)
        told = f"{100 * row['accuracy']:.1f}% right"
        label = method if method == "dense" else f"{method} {100 * keep:g}%"
        assert text.count(f"<title>{label}: {told}") == 2


def test_the_page_needs_nothing_else(tmp_path):
    text = page_of(sweep_of(tmp_path))
    for tag, attributes in Page(text).tags:
        for name in ("src", "href"):
            if name in attributes:
                assert attributes[name].startswith(("data:", "#")), tag
    assert "@import" not in text
    assert not re.search(r"url\(|https?://", text)


def test_what_others_say_is_text(tmp_path):
    frame = sweep_of(tmp_path, model=EVIL, answer=EVIL, truth=EVIL, machine=EVIL, family=EVIL, versions=EVIL)
    made(tmp_path, "holov", 0.5, 98.0, model=EVIL, hyper=(("mode", EVIL),))
    made(tmp_path, "holov", 1.0, 196.0, (0,) * 4, model=EVIL, protocol=IDENTITY)
    frame = rows.read(tmp_path)
    text = page_of(frame)
    page = Page(text)
    assert len(page.all("script")) == 1
    assert not any("onload" in attributes for _, attributes in page.tags)
    assert "so not to be trusted: holov on &lt;script&gt;" in text
    assert "Wins and losses" in text


def test_the_same_rows_give_the_same_bytes(tmp_path):
    frame = sweep_of(tmp_path)
    assert page_of(frame) == page_of(frame)


def test_what_was_not_measured_is_left_out(tmp_path):
    times = ("ttft_ms", "ttft_spread_ms", "ttft_over_dense", "vision_ms", "select_ms", "prefill_ms")
    others = ("evidence_recall", "kept", "grid_height", "grid_width", "family", "machine", "flops", "kv_bytes")
    nothing = dict.fromkeys((*times, *others))
    text = page_of(sweep_of(tmp_path, **nothing))
    Page(text)
    for piece in ("Evidence</th>", "ms</th>", "GFLOPs</th>", "By kind of question", "Wins and losses", "milliseconds:"):
        assert piece not in text
    assert text.count("<figure>") == 1
    assert "98.0 tokens" in text


def test_the_dense_model_alone_is_a_page(tmp_path):
    made(tmp_path, "dense", 1.0, 196.0)
    text = page_of(rows.read(tmp_path))
    Page(text)
    assert "0 methods on m: scenes" in text
    assert "75.0%" in text


def test_long_answers_are_held_by_chrf(tmp_path):
    text = page_of(sweep_of(tmp_path, protocol="long-answer", chrf=42.5))
    assert "<figcaption>chrF, %</figcaption>" in text
    assert ">42.5<" in text
    assert '<path class="i"' not in text


def test_a_quick_sweep_stays_small(tmp_path):
    how = {"decode_ms": 1.0, "peak_bytes": 10**6, "probability": 0.5, "confidence": 0.5, "weight_bytes": 10**7}
    made(tmp_path, "dense", 1.0, 196.0, **how)
    for keep, tokens in ((0.5, 98.0), (0.25, 49.0), (0.1, 20.0)):
        for number in range(10):
            made(tmp_path, f"method-{number}" if number > 1 else METHODS[number], keep, tokens, **how)
    frame = rows.read(tmp_path)
    found = summarise(frame)
    places = [(task, rule) for task in ("scenes", "words", "charts") for rule in ("single", "detail", "x", "y")]
    every = [{**row, "task": task, "protocol": protocol} for task, protocol in places for row in found]
    text = render(frame, every, cases)
    assert text.count('<section id="place-') == 12
    assert len(text.encode()) < 1_500_000


def test_methods_with_other_counts_are_not_held_against_random(tmp_path):
    sweep_of(tmp_path)
    made(tmp_path, "yopo", 0.1, 98.0, (0,) * N)
    frame = sweep_of(tmp_path, task="words")
    found = summarise(frame)
    yopo = next(row for row in found if row["method"] == "yopo")
    assert yopo["over_random"] is not None
    judged = fair(found)
    unjudged = [row["method"] for row in judged if row["over_random"] is None]
    assert sorted(unjudged) == ["dense", "dense", "random", "random", "random", "random", "yopo"]
    assert '<td data-m="yopo" title="left with 98.0 tokens">≠</td>' in render(frame, found, cases)
    assert as_many(98, 100) and as_many(102, 100) and not as_many(97.9, 100) and not as_many(98, 20)


def test_the_report_is_written(tmp_path):
    sweep_of(tmp_path)
    paths = write(tmp_path)
    assert [path.name for path in paths] == ["report.md", "report.svg", "report.png", "report.html"]
    Image.open(paths[2]).load()
    assert paths[3].read_text().lstrip().startswith("<!doctype html>")
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write(tmp_path)] == before


def joint_of(folder):
    """Fewer tokens lose the first question, int8 the second, both also the third."""
    right = {
        ("dense", "none"): (1, 1, 1, 1),
        ("dense", "int8"): (1, 0, 1, 1),
        ("holov", "none"): (0, 1, 1, 1),
        ("holov", "int8"): (0, 0, 0, 1),
    }
    for (method, weights), hits in right.items():
        keep, tokens = (1.0, 196.0) if method == "dense" else (0.5, 98.0)
        size = {"none": 9 * 10**6, "int8": 3 * 10**6}[weights]
        made(folder, method, keep, tokens, hits, weights=weights, weight_bytes=size)
    return rows.read(folder)


def test_fewer_tokens_and_fewer_bits_stand_side_by_side(tmp_path):
    frame = joint_of(tmp_path)
    text = page_of(frame)
    Page(text)
    section = text[text.index('<section id="joint">') :]
    section = section[: section.index("</section>")]
    lines = re.findall(r"<tr data-m=.*?</tr>", section, re.S)
    assert [re.findall(r"data-m=\"(.*?)\".*?<td>(.*?)</td>", line, re.S)[0] for line in lines] == [
        ("dense", "as it is"), ("holov", "as it is"), ("dense", "int8 weights"), ("holov", "int8 weights"),
    ]  # fmt: skip
    assert "-75.0" in lines[3] and ">-25.0<" in lines[3]
    assert "<td>yes</td>" in lines[0] and "<td>yes</td>" not in lines[1]
    assert section.count("<title>") == 4
    assert "<polyline" not in section
    table = markdown(summarise(frame), frame)
    assert "## m, float32, scenes, single: fewer tokens and fewer bits" in table
    assert "| holov | int8 weights | 0.5 | 25.0% | -75.0 (" in table
    assert "## m, float32, int8 weights, scenes, single: 98.0 tokens" in table


def test_without_fewer_bits_there_is_no_word_of_them(tmp_path):
    frame = sweep_of(tmp_path)
    assert "fewer bits" not in page_of(frame)
    assert "fewer bits" not in markdown(summarise(frame), frame)


# The front ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.one_of(st.none(), st.integers(0, 5)), st.integers(0, 5)), max_size=12))
def test_the_front_is_what_nothing_beats(values):
    given_rows = [{"ms": cost, "accuracy": gain, "number": i} for i, (cost, gain) in enumerate(values)]

    def beats(a, b):
        as_good = a["accuracy"] >= b["accuracy"] and a["ms"] <= b["ms"]
        return as_good and (a["accuracy"] > b["accuracy"] or a["ms"] < b["ms"])

    known = [row for row in given_rows if row["ms"] is not None]
    expected = [row["number"] for row in known if not any(beats(other, row) for other in known)]
    found = front(given_rows, "ms")
    assert sorted(row["number"] for row in found) == expected
    assert [row["ms"] for row in found] == sorted(row["ms"] for row in found)


# Curves ---------------------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdef"), st.floats(0.01, 1e6), st.floats(0, 1)), min_size=1, max_size=20
    ),
    st.booleans(),
)  # fmt: skip
def test_curves_stay_in_their_frame(values, beside):
    points = [Point(name, cost, gain, max(0, gain - 0.1), min(1, gain + 0.1)) for name, cost, gain in values]
    drawn = chart(points, points[:1], beside=beside)
    assert sum(len(series["points"]) for series in drawn["series"]) == len(points)
    for series in drawn["series"]:
        for point in series["points"]:
            assert LEFT - 30 <= point["x"] <= WIDTH - RIGHT + 30
            assert TOP <= point["high"] <= point["y"] <= point["low"] <= HEIGHT - BOTTOM
    assert all(LEFT <= x <= WIDTH - RIGHT for x, _ in drawn["x_ticks"])
    assert len(drawn["y_ticks"]) >= 2


def test_higher_is_up_and_dearer_is_right():
    drawn = chart([Point("a", 10, 0.5), Point("a", 20, 0.9), Point("b", 10, 0.7)], [], beside=False)
    (low, high), (other,) = (series["points"] for series in drawn["series"])
    assert low["x"] == other["x"] < high["x"]
    assert low["y"] > other["y"] > high["y"]
    apart = chart([Point("a", 10, 0.5), Point("b", 10.1, 0.5), Point("a", 40, 0.5)], [], beside=True)
    assert 0 < apart["series"][1]["points"][0]["x"] - apart["series"][0]["points"][0]["x"] < 10


def test_no_two_methods_look_the_same():
    names = ["dense", "random", "uniform", *(f"m{number}" for number in range(30))]
    assert len({tuple(look.values()) for look in looks(names, names[:3]).values()}) == 33


# Wins and losses ------------------------------------------------------------------------------------------------------


def test_pictures_are_picked_by_rule(tmp_path):
    frame = sweep_of(tmp_path)
    found = pick(frame, cases)
    by_rule = {rule: [one for one in found if one.rule == rule] for rule in ("win", "loss", "lost")}
    # 1: both methods right, random wrong; then 2 and 3: one of the two.
    assert [one.dense["question"] for one in by_rule["win"]] == ["scenes:0:1", "scenes:0:2"]
    # 4: holov, the most accurate, is wrong where random is right.
    assert [one.dense["question"] for one in by_rule["loss"]] == ["scenes:0:4"]
    # From 5 on all are wrong but dense.
    assert [one.dense["question"] for one in by_rule["lost"]] == ["scenes:0:5", "scenes:0:6"]
    for one in found:
        assert one.best == "holov"
        assert [row["method"] for row in one.rows] == ["random", "uniform", "holov", "fastv"]
        assert one.case.question == one.dense["asked"]


def test_each_rule_prefers_another_place(tmp_path):
    sweep_of(tmp_path)
    frame = sweep_of(tmp_path, protocol="noise-1")
    wins = [one for one in pick(frame, cases) if one.rule == "win"]
    assert len({tuple(one.dense[name] for name in PLACE) for one in wins}) == 2
    assert len({one.dense["question"] for one in wins}) == 2


def test_the_probability_breaks_a_tie(tmp_path):
    made(tmp_path, "dense", 1.0, 196.0, (1,) * 3)
    made(tmp_path, "random", 0.5, 98.0, (0,) * 3, probability=0.1)
    made(tmp_path, "holov", 0.5, 98.0, (1, 1, 1), probability=0.5)
    path = rows.place(tmp_path, Cell("m", "holov", 0.5, "scenes", "single", "float32", 3, 0).key)
    import polars

    frame = polars.read_parquet(path).with_columns(polars.Series("probability", [0.5, 0.5, 0.9]))
    frame.write_parquet(path)
    assert [one.dense["question"] for one in pick(rows.read(tmp_path), cases)] == ["scenes:0:2", "scenes:0:0"]


@pytest.mark.parametrize("why", ["grid", "gone", "other", "shape", "random"])
def test_pictures_that_cannot_be_shown_are_left_out(tmp_path, why):
    frame = sweep_of(tmp_path, **({"grid_height": 7, "grid_width": 28} if why == "shape" else {}))
    if why == "grid":
        frame = frame.with_columns(grid_height=None)
    if why == "random":
        frame = frame.filter(frame["method"] != "random")

    def given_cases(cell):
        if why == "gone":
            raise FileNotFoundError("pictures.jsonl")
        found = cases(cell)
        return [one.__class__(one.picture, "another question") for one in found] if why == "other" else found

    assert pick(frame, given_cases) == []
    Page(render(frame, summarise(frame), given_cases))


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_what_is_dropped_is_dark(h, w, data):
    kept = data.draw(st.sets(st.integers(0, h * w - 1)))
    dark = np.zeros((h, w), dtype=int)
    for x, y, run in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\3z", dropped(sorted(kept), (h, w))):
        dark[int(y), int(x) : int(x) + int(run)] += 1
    assert set(np.flatnonzero(dark == 0)) == kept
    assert dark.max(initial=0) <= 1


def test_the_outline_keeps_its_distance():
    evidence = np.zeros((12, 16), dtype=bool)
    evidence[5, 7:9] = True
    evidence[0, 0] = True
    strokes = re.findall(r"M(\d+) (\d+)([hv])(\d+)", outline(evidence))
    drawn = sorted((int(x), int(y), way, int(run)) for x, y, way, run in strokes)
    around = [(5, 3, "h", 6), (5, 8, "h", 6), (5, 3, "v", 5), (11, 3, "v", 5)]
    corner = [(0, 0, "h", 3), (0, 3, "h", 3), (0, 0, "v", 3), (3, 0, "v", 3)]
    assert drawn == sorted(around + corner)


def test_a_picture_is_in_the_page_once_for_all_methods(tmp_path):
    text = page_of(sweep_of(tmp_path))
    page = Page(text)
    pictures = page.all("image")
    assert len(pictures) == 5
    assert len(page.all("use")) == 5 * 4
    assert {use["href"][1:] for use in page.all("use")} == {image["id"] for image in pictures}
    for image in pictures:
        Image.open(io.BytesIO(base64.b64decode(image["href"].partition(",")[2]))).load()
    assert "20 of 196 visual tokens stay with holov" in text
    assert text.count('class="best"') == 5
