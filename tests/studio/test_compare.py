"""The tab Compare without a browser: it shows the sweep's numbers, of places and tokens that may be compared."""

from __future__ import annotations

import re

import pytest

from tests.bench.test_page import EVIL, HITS, N, cases, made, sweep_of
from tests.bench.test_report import Page
from vistok.bench import rows, summary
from vistok.bench.summary import summarise
from vistok.bench.sweep import Cell
from vistok.studio import compare
from vistok.studio.results import EACH, Results, Where, curves, key_of, mechanisms_of, named, with_mechanisms

ASKED = ("scenes", "single", "float32", N, 0)
PLACE = Where("m, float32", "scenes", "single")


@pytest.fixture(autouse=True)
def quick_intervals(monkeypatch):
    """Ten thousand resamples for every number would take long."""
    middle = lambda ours, others, *, seed=0: (sum(ours) / len(ours) - sum(others) / len(others),) * 2  # noqa: E731
    monkeypatch.setattr(summary, "paired_bootstrap", middle)


@pytest.fixture
def found(tmp_path):
    return Results(sweep_of(tmp_path), cases)


def row_of(found, name, **family):
    return next(row for row in found.rows(PLACE._replace(**family)) if named(row) == name)


# Filters --------------------------------------------------------------------------------------------------------------


def test_what_can_be_chosen(tmp_path):
    sweep_of(tmp_path)
    sweep_of(tmp_path, task="words")
    made(tmp_path, "dense", 1.0, 196.0, weights="int8", protocol="noise-1")
    found = Results(rows.read(tmp_path), cases)
    assert found.models() == ["m, float32", "m, float32, int8 weights"]
    assert found.values("task") == ["scenes", "words"]
    assert found.values("protocol") == ["noise-1", "single"]
    assert found.values("family") == ["colour", "shape"]
    assert found.mechanisms() == ["similarity", "attention", "query"]  # of holov and fastv, in the catalogue's order


def test_a_place_shows_its_own_rows_only(tmp_path):
    frame = sweep_of(tmp_path)
    made(tmp_path, "holov", 0.5, 98.0, (0,) * N, task="words")
    found = Results(rows.read(tmp_path), cases)
    rows_here = found.rows(PLACE)
    assert {row["task"] for row in rows_here} == {"scenes"}
    expected = {(row["method"], row["keep"]): row["accuracy"] for row in summarise(frame)}
    assert {(row["method"], row["keep"]): row["accuracy"] for row in rows_here} == expected
    assert found.rows(PLACE._replace(task="words", protocol="noise-1")) == []
    assert found.rows(PLACE._replace(model="another")) == []


def test_a_kind_of_question_counts_its_questions_only(found):
    for family, start in (("colour", 0), ("shape", 1)):
        mine = HITS["holov"][start::2]
        assert row_of(found, "holov 50%", family=family)["accuracy"] == sum(mine) / len(mine)


def test_methods_by_mechanism(found):
    assert mechanisms_of("holov+fastv:select=topk") == {"attention", "similarity", "query"}
    assert mechanisms_of("dense") == mechanisms_of("random") == mechanisms_of("nobody-knows-it") == set()
    names = {row["method"] for row in with_mechanisms(found.rows(PLACE), ["query"])}
    assert names == {"dense", "random", "uniform", "fastv"}
    assert {row["method"] for row in with_mechanisms(found.rows(PLACE), [])} == {"dense", "random", "uniform"}


# Curves and tables ----------------------------------------------------------------------------------------------------


def test_every_setting_is_one_point_with_its_numbers(found):
    shown = found.rows(PLACE)
    text = compare.plot(found, PLACE, ["similarity", "attention", "query"], "tokens")
    points = {one["data-key"]: one for one in Page(text).all("g") if one.get("class") == "point"}
    assert set(points) == {row["key"] for row in shown}
    for row in shown:
        one = points[row["key"]]
        assert one["role"] == "button"
        assert one["aria-label"].startswith(f"{named(row)}: {100 * row['accuracy']:.1f}% right, 95% interval ")
        assert f", {row['tokens']:.1f} tokens" in one["aria-label"]
    # The higher the accuracy, the higher the point; the more tokens, the further to the right.
    by_name = {named(row): (row, points[row["key"]]) for row in shown}
    for one, other in (("holov 50%", "uniform 50%"), ("dense", "holov 10%")):
        (row, point), (below, lower) = by_name[one], by_name[other]
        assert row["accuracy"] > below["accuracy"] and float(point["data-y"]) < float(lower["data-y"])
    assert float(by_name["holov 50%"][1]["data-x"]) > float(by_name["holov 10%"][1]["data-x"])


def test_a_table_holds_methods_with_as_many_tokens_only(tmp_path):
    sweep_of(tmp_path)
    made(tmp_path, "yopo", 0.5, 196.0, (1,) * N)
    found = Results(rows.read(tmp_path), cases)
    tables = curves(found.rows(PLACE), "tokens")["tables"]
    assert [(table["tokens"], {row["name"] for row in table["rows"]}) for table in tables] == [
        ("196.0 tokens", {"dense", "yopo 50%"}),
        ("98.0 tokens", {"dense", "random 50%", "uniform 50%", "holov 50%", "fastv 50%"}),
        ("20.0 tokens", {"dense", "random 10%", "uniform 10%", "holov 10%", "fastv 10%"}),
    ]
    # It is not held against random tokens either, of which there are fewer.
    assert tables[0]["rows"][1]["over"] == ""
    assert next(row for row in tables[1]["rows"] if row["name"] == "holov 50%")["over"] == "+25.0"


def test_what_was_not_measured_is_told(tmp_path):
    made(tmp_path, "random", ttft_ms=None)
    found = Results(rows.read(tmp_path), cases)
    assert compare.NOT_TIMED in compare.plot(found, PLACE, [], "time")
    assert compare.NO_CELL in compare.plot(found, PLACE._replace(task="words"), [], "tokens")
    assert 'scope="col">ms<' not in compare.plot(found, PLACE, [], "tokens")
    made(tmp_path, "dense", 1.0, 196.0)
    assert 'scope="col">ms<' in compare.plot(Results(rows.read(tmp_path), cases), PLACE, [], "tokens")
    # One point alone, and without the dense model, is drawn too.
    assert 'class="point"' in compare.plot(found, PLACE, [], "tokens")


def test_long_answers_are_drawn_by_chrf(tmp_path):
    made(tmp_path, "dense", 1.0, 196.0, protocol="long-answer", chrf=61.5)
    found = Results(rows.read(tmp_path), cases)
    text = compare.plot(found, PLACE._replace(protocol="long-answer"), [], "tokens")
    assert "chrF 61.5" in text and "chrF of the answers" in text


# Pictures of a point --------------------------------------------------------------------------------------------------


def test_pictures_right_and_wrong_with_what_was_dropped(found):
    row = row_of(found, "holov 50%")
    pictures = found.pictures(PLACE, row["key"])
    assert [one["number"] for one in pictures["right"]] == [f"scenes:0:{n}" for n in (1, 2, 3, 0)]  # random: 0 and 4
    assert [one["number"] for one in pictures["wrong"]] == [f"scenes:0:{n}" for n in (4, 5, 6, 7)]
    assert pictures["right"][0]["question"] == cases(Cell("m", "holov", 0.5, *ASKED))[1].question
    one = pictures["right"][0]
    assert one["drawn"] and one["kept"] == 98 and one["tokens"] == 196
    gone = sum(int(run) for run in re.findall(r"h(\d+)v1", one["dropped"]))
    assert gone == 196 - 98


def test_wrong_ones_that_dense_gets_right_come_first(tmp_path):
    made(tmp_path, "dense", 1.0, 196.0, (0, 0, 1, 1, 0, 1, 0, 0))
    made(tmp_path, "random", 0.5, 98.0, (0,) * N)
    found = Results(rows.read(tmp_path), cases)
    wrong = found.pictures(PLACE, row_of(found, "random 50%")["key"])["wrong"]
    assert [one["number"][-1] for one in wrong] == ["2", "3", "5", "0", "1", "4"][:EACH]
    assert [one["dense"] for one in wrong][:4] == ["red", "red", "red", "blue"]


def test_pictures_of_one_kind_of_question(found):
    key = row_of(found, "holov 50%")["key"]
    shown = found.pictures(PLACE._replace(family="shape"), key)
    assert {int(one["number"][-1]) % 2 for side in shown.values() for one in side} == {1}


def test_what_cannot_be_drawn_is_told(tmp_path):
    made(tmp_path, "dense", 1.0, 196.0, grid_height=None, grid_width=None)
    found = Results(rows.read(tmp_path), cases)
    row = found.rows(PLACE)[0]
    assert "its tokens form no grid" in compare.point(found, PLACE, row["key"])
    # A user's own pictures are not at hand.
    gone = Results(rows.read(tmp_path), lambda cell: [])
    assert "can be drawn again" in compare.point(gone, PLACE, row["key"])


def test_a_key_that_is_none_of_the_place_gives_the_hint(found):
    for key in ("", "0" * 12, EVIL):
        assert compare.CHOOSE in compare.point(found, PLACE, key)
        assert found.pictures(PLACE, key) == {"wrong": [], "right": []}


def test_keys_tell_settings_apart(found):
    keys = [row["key"] for row in found.rows(PLACE)]
    assert len({*keys}) == len(keys)
    assert key_of({**found.rows(PLACE)[0], "accuracy": 0.0}) == keys[0]


def test_what_others_say_is_text(tmp_path):
    sweep_of(tmp_path, model=EVIL, answer=EVIL, truth=EVIL, family=EVIL)
    made(tmp_path, "holov", 0.5, 98.0, model=EVIL, hyper=(("mode", EVIL),))
    found = Results(rows.read(tmp_path), cases)
    place = Where(f"{EVIL}, float32", "scenes", "single", EVIL)
    texts = [compare.plot(found, place, ["similarity", "attention", "query"], "tokens")]
    texts += [compare.point(found, place, row["key"]) for row in found.rows(place)]
    texts.append(compare.how(EVIL))
    for text in texts:
        page = Page(text)
        assert not page.all("script")
        assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
        assert "&lt;script&gt;" in text


# The folder -----------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_again_where_it_has_changed(tmp_path):
    made(tmp_path, "dense", 1.0, 196.0)
    folder = compare.Folder(tmp_path)
    first = folder.results()
    assert folder.results() is first and folder.held() is first
    made(tmp_path, "random")
    assert folder.held() is first
    assert {row["method"] for row in folder.results().rows(PLACE)} == {"dense", "random"}


def test_a_folder_without_results_says_how_to_make_some(tmp_path):
    with pytest.raises(ValueError, match="vistok bench run"):
        compare.Folder(tmp_path).results()
    assert "vistok bench run --methods" in compare.how()
