"""The page and the sheet: whole, self-contained, safe against what models and users say."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from vistok.bench.compare import Comparison, Look, Survey, _beside, case_of, sample_cases, settings_of, survey_row
from vistok.bench.figures import OUTLINE, outlined, sheet
from vistok.bench.markdown import markdown
from vistok.bench.measure import Answered, Case, Cost
from vistok.bench.report import amount, bars, keep_text, render, replace_file, write
from vistok.world import make, photos

FACTS = {"model": "a <model>", "keep": "0.25", "seed": "0", "command": "vistok compare 'a & b'"}
EVIL = "<script>alert(1)</script>\" onload='x'"


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects what the page refers to."""

    VOID = ("meta", "link", "img", "br", "!doctype")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def look(method="random", keep=0.25, answer="yes", correct=True, recall=0.5, ms=10.0, side=112):
    kept = 196 if method == "dense" else 49
    overlay = Image.new("RGB", (side, side), "green")
    return Look(
        method,
        keep,
        Answered(answer, correct, 196, kept, kept, recall, overlay=overlay),
        Cost(ms, 1e9 * kept, 1000 * kept),
    )


@pytest.fixture
def comparison():
    picture = make("scenes", 1)
    drawn = case_of(picture, min(picture.questions, key=lambda q: q.evidence.sum()))
    free = Case(Image.new("RGB", (60, 40), "blue"), EVIL, name=EVIL)
    return Comparison(
        [drawn, free],
        [
            [look("dense", 1.0, ms=20), look(correct=False), look("pool", answer=EVIL, ms=40)],
            [look("dense", 1.0, "", None, None), look(answer="x" * 300, correct=None, recall=None),
             look("pool", correct=None, recall=None)],
        ],
        {"hiprune": EVIL},
    )  # fmt: skip


def test_the_page_needs_nothing_else(comparison):
    text = render(comparison, FACTS)
    page = Page(text)
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            if name in attributes:
                assert attributes[name].startswith("data:"), tag
    assert "@import" not in text
    assert not re.search(r"url\(|https?://", text)


def test_what_others_say_is_text(comparison):
    page = Page(render(comparison, FACTS))
    assert len(page.all("script")) == 1
    assert not any("onload" in attributes for _, attributes in page.tags)
    assert "a &lt;model&gt;" in render(comparison, FACTS)


def test_every_picture_has_an_alternative_text(comparison):
    images = Page(render(comparison, FACTS)).all("img")
    assert len(images) == 2 * (1 + 3)
    assert all(image["alt"] for image in images)
    assert images[2]["alt"] == "49 of 196 visual tokens stay with random"
    for image in images:
        data = base64.b64decode(image["src"].partition(",")[2])
        Image.open(io.BytesIO(data)).load()


def test_right_and_wrong_are_words_not_colours_alone(comparison):
    text = render(comparison, FACTS)
    assert text.count("✓ right</span>") == 2
    assert text.count("✗ wrong</span>") == 1
    assert "no answer" in text
    assert "1 of 1" in text
    assert "0 of 1" in text


def test_the_keep_column_is_there_for_several_keeps_only(comparison):
    assert ">Keep<" not in render(comparison, FACTS)
    both = Comparison(comparison.cases, [[*line, look(keep=20)] for line in comparison.looks])
    text = render(both, FACTS)
    assert ">Keep<" in text
    assert "2 methods at 20 and 25% of the visual tokens" in text


def test_a_survey_has_intervals_and_families():
    asked = [make("scenes", seed, questions=1) for seed in range(3)]
    cases = [case_of(p, p.questions[0]) for p in asked]
    shown = Comparison(cases[:1], [[look("dense", 1.0), look()]])
    answers = [Answered("yes", i > 0, 196, 49, 49, 0.5) for i in range(3)]
    cost = {"ttft_ms": 1.0, "flops": 1e9, "kv_bytes": 1e3, "task": "scenes"}
    rows = [{**survey_row(method, keep, answers), **cost} for method, keep in settings_of(["random"], [0.25])]
    families = [{**row, "family": "colour"} for row in rows]
    text = render(Survey("scenes", rows, families, shown), FACTS)
    Page(text)
    assert "3 held-out pictures, scenes" in text
    assert "66.7%" in text
    assert "colour (3)" in text
    assert 'class="band"' in text


def survey_of(hits, families=("colour",), tokens=()):
    """A survey at keep 0.25 with the answers ``hits[method]`` (dense first), all of them about ``families`` in turn.
    ``tokens``: (method, count) where that is not 49."""
    found = {(name, 1.0 if name == "dense" else 0.25): right for name, right in hits.items()}
    rows, by_family = [], []
    for (name, keep), right in found.items():
        left = dict(tokens).get(name, 49)
        answers = [Answered("yes", hit, 196, left, left, 0.5) for hit in right]
        cost = {"ttft_ms": 1.0, "flops": 1e9, "kv_bytes": 1e3, "task": "scenes"}
        method = None if name == "dense" else name
        rows.append({**survey_row(method, keep, answers), **cost, **_beside(found, name, keep, 0)})
        for number, family in enumerate(families):
            mine = answers[number :: len(families)]
            by_family.append({**survey_row(method, keep, mine), "family": family})
    asked = make("scenes", 0, questions=1)
    shown = Comparison([case_of(asked, asked.questions[0])], [[look("dense", 1.0), look()]], {"hiprune": "why | not"})
    return Survey("scenes", rows, by_family, shown)


def test_the_table_says_who_loses_to_random():
    n = 40
    hits = {"dense": [True] * n, "random": [True] * 30 + [False] * 10, "good": [True] * 36 + [False] * 4,
            "bad": [False] * n, "close": [True] * 29 + [False] * 11}  # fmt: skip
    text = markdown(survey_of(hits, ("colour", "shape")), FACTS)
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    del lines["---"]
    assert list(lines) == ["method", "dense", "random", "good", "close", "**bad**"]
    assert lines["method"].count("|") == lines["dense"].count("|") == lines["**bad**"].count("|")
    assert "colour (20) | shape (20)" in lines["method"]
    assert "-100.0 (-100.0 to -100.0)" in lines["**bad**"] and "-75.0 (" in lines["**bad**"]
    assert "+15.0 (" in lines["good"]
    assert "Less accurate than random tokens: bad. Below random, but within chance: close." in text
    assert "hiprune is left out: why | not" in text
    assert "- command: `vistok compare 'a & b'`" in text


def test_only_as_many_tokens_are_held_against_random():
    hits = {"dense": [True] * 40, "random": [True] * 30 + [False] * 10, "yopo": [False] * 40, "mean": [False] * 40}
    text = markdown(survey_of(hits, tokens=[("yopo", 196), ("mean", 49.5)]), FACTS)
    assert "Less accurate than random tokens: mean. Not held against random" in text
    assert "since it keeps another number of tokens: yopo." in text
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert lines["yopo"].count("-100.0 (") == 1  # over dense, but not over random
    assert "-75.0 (" in lines["**mean**"]
    text = markdown(survey_of(hits, tokens=[("yopo", 196), ("mean", 48)]), FACTS)
    assert "No method is less accurate than random tokens. Not held against" in text
    assert "another number of tokens: yopo, mean." in text


def test_the_table_without_a_random_control():
    text = markdown(survey_of({"dense": [True, True], "good": [True, False]}), FACTS)
    assert "Random tokens were not measured." in text
    assert "No method is less accurate" not in text
    text = markdown(survey_of({"dense": [True, True], "random": [True, False], "good": [True, False]}), FACTS)
    assert "No method is less accurate than random tokens." in text


def test_a_survey_is_written_as_a_table_too(tmp_path):
    paths = write(tmp_path, survey_of({"dense": [True], "random": [True]}), FACTS)
    assert [path.name for path in paths] == ["compare.html", "compare.png", "compare.md"]
    assert paths[2].read_text().startswith("# scenes: 1 questions")


def test_bars_stand_beside_dense():
    dense = {"ttft_ms": 10.0, "flops": 2e9, "kv_bytes": 4e6}
    time, flops, cache = bars({"ttft_ms": 12.0, "flops": 1e9, "kv_bytes": 1e6}, dense)
    assert (time["text"], time["share"], time["more"]) == ("12.0 ms", pytest.approx(120), True)
    assert (flops["text"], flops["share"], flops["more"]) == ("1.00 G", 50, False)
    assert (cache["text"], cache["share"]) == ("1.00 MB", 25)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 "), (999, "999 "), (999.6, "1.00 k"), (1234, "1.23 k"), (12_345, "12.3 k"), (123_456, "123 k"),
     (9.996e6, "10.0 M"), (1e9, "1.00 G"), (9.996e8, "1.00 G"), (2.5e12, "2.50 T"), (5e15, "5000 T")],
)  # fmt: skip
def test_amounts_have_three_digits(value, text):
    assert amount(value) == text


def test_keep_is_told_as_it_was_given():
    assert [keep_text(k) for k in (0.25, 0.111, 1.0, 64, 1)] == ["25%", "11.1%", "100%", "64 tokens", "1 token"]


def test_the_sheet_has_a_row_a_case(comparison):
    drawn = sheet(comparison)
    assert drawn.height > 2 * 168
    assert drawn.width > 4 * 168
    one = sheet(Comparison(comparison.cases[:1], [[look("dense", 1.0), *[look(answer="long " * 30)] * 11]]))
    assert one.width == 6 * (168 + 14) + 14
    assert one.height > 3 * 168


def test_evidence_is_outlined_and_not_covered():
    picture = make("scenes", 1)
    question = min(picture.questions, key=lambda q: q.evidence.sum())
    drawn = np.asarray(outlined(case_of(picture, question)))
    plain = np.asarray(picture.pil().resize((336, 336), Image.Resampling.NEAREST))
    changed = (drawn != plain).any(axis=2)
    assert (drawn[changed] == OUTLINE).all()
    assert changed.any()
    evidence = question.evidence.repeat(3, 0).repeat(3, 1)
    assert not (changed & evidence).any()
    whole = next(q for q in (q for seed in range(50) for q in make("scenes", seed).questions) if q.evidence.all())
    assert (np.asarray(outlined(case_of(picture, whole))) == plain).all()


def test_files_are_whole_or_not_there(tmp_path, comparison, monkeypatch):
    page, png = write(tmp_path, comparison, FACTS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["compare.html", "compare.png"]
    Image.open(png).load()
    before = page.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        replace_file(page, b"half")
    assert page.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["compare.html", "compare.png"]


def test_the_samples_are_always_the_same_and_can_do_without_photographs(monkeypatch):
    first, again = sample_cases(), sample_cases()
    assert [c.name.split(":")[1] for c in first[:4]] == ["scenes", "words", "charts", "forms"]
    assert all(np.array_equal(a.picture, b.picture) for a, b in zip(first, again, strict=True))
    assert all(c.truth is not None for c in first[:4])

    def absent(size):
        raise ModuleNotFoundError("scikit-image")

    monkeypatch.setattr("vistok.bench.compare.photos", absent)
    assert len(sample_cases()) == 4
    assert photos is not absent
