"""The tab Look without a browser: what is computed, that it is true, and that no text becomes HTML."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.studio.serving import tiny_studio
from vistok.bench.measure import answer_all, evidence_recall
from vistok.bench.pictures import Unusable
from vistok.catalogue import create, methods
from vistok.studio import drawing, look, looking, samples, words
from vistok.studio.looking import Failed
from vistok.studio.sessions import Page, Sessions, Stop, Stopped

NAMES = [card.slug for card in methods("reduce")]
EVIL = "<img src=x onerror=alert(1)></script>\"' what colour is the circle?"


@pytest.fixture(scope="module")
def tiny():
    return tiny_studio().models["vistok-tiny"]


@pytest.fixture(scope="module")
def case():
    return samples.case("world:scenes:28", None, samples.samples()["world:scenes:28"].question)


@pytest.fixture(scope="module")
def everything(tiny, case):
    """A run with all methods."""
    return list(looking.look(tiny, "vistok-tiny", case, NAMES, 0.25, 0, Stop()))[-1]


class Tags(HTMLParser):
    """Names of the tags, and their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


# What is computed ----------------------------------------------------------------------------------------------------


def test_answers_and_tokens_are_those_of_the_same_question_asked_without_the_studio(tiny, case, everything):
    for sight in everything.seen:
        method = None if sight.method == "dense" else [create(sight.method)]
        keep = 1.0 if method is None else 0.25
        plain = answer_all(tiny.model, tiny.processor, method, keep, [case], max_new_tokens=looking.ANSWER_TOKENS)[0]
        assert (sight.answer, sight.correct) == (plain.answer, plain.correct), sight.method
        assert sight.tokens_kept == pytest.approx(plain.tokens_kept)
        assert sight.recall == pytest.approx(plain.evidence_recall)
    assert everything.grid == (14, 14) and everything.tokens == 196
    assert [sight.method for sight in everything.sights] == ["dense", *NAMES]


def test_cards_come_one_after_the_other_and_the_costs_last(tiny, case):
    runs = list(looking.look(tiny, "vistok-tiny", case, ["fastervlm", "pool"], 0.5, 0, Stop()))
    assert [len(run.sights) for run in runs] == [0, 1, 2, 3, 3]
    assert [run.waiting[:1] for run in runs] == [("dense",), ("fastervlm",), ("pool",), (), ()]
    assert [run.done for run in runs] == [False] * 4 + [True]
    assert all(sight.cost is None for sight in runs[3].seen) and all(sight.cost.ttft_ms > 0 for sight in runs[4].seen)
    assert runs[4].seen[1].cost.flops < runs[4].seen[0].cost.flops


def test_places_count_the_tokens_of_every_layer_and_follow_the_merges(everything):
    for sight in everything.seen:
        counts = [len(np.unique(row[row >= 0])) for row in sight.places]
        assert np.mean(counts) == pytest.approx(sight.tokens_kept), sight.method
        for row in sight.places:
            anchors = np.unique(row[row >= 0])
            assert (row[anchors] == anchors).all(), sight.method  # what stands for others stands for itself
    named = {sight.method: sight for sight in everything.seen}
    for merging in ("visionzip", "tome-merge", "pool", "aim", "prumerge"):
        assert (named[merging].places[0] >= 0).sum() > 49, merging
    assert (named["lvlm-csp"].places[3] >= 0).all()  # it brings all tokens back


def test_recall_is_the_share_of_the_evidence_under_the_places_of_kept_tokens(case, everything):
    sight = next(sight for sight in everything.seen if sight.method == "pyramiddrop")
    by_layer = [evidence_recall(case.truth.evidence, everything.grid, row[row >= 0]) for row in sight.places]
    assert sight.recall == pytest.approx(np.mean(by_layer))


def test_ranks_are_of_the_scores_and_decide_where_a_method_ranks(everything):
    for sight in everything.seen:
        for stage in sight.stages:
            if stage.scores is None:
                assert stage.ranks is None
                continue
            there = stage.ranks > 0
            assert (
                sorted(stage.ranks[there]) == list(range(1, there.sum() + 1)) and (stage.of[there] == there.sum()).all()
            )
            best_first = stage.scores[np.argsort(np.where(there, stage.ranks, 10_000))][: there.sum()]
            assert (np.diff(best_first) <= 0).all() and np.isnan(stage.scores[~there]).all()
    sight = next(sight for sight in everything.seen if sight.method == "fastervlm")
    kept = np.flatnonzero(sight.places[0] >= 0)
    assert (sight.stages[0].ranks[kept] <= 49).all()


def test_a_method_that_cannot_work_gets_a_card_that_says_why(tiny, case, monkeypatch):
    def fails(*args, **kwargs):
        raise ValueError("evidence: not on this model")

    monkeypatch.setattr("vistok.reduce.fastervlm.FasterVLM.scores", fails)
    run = list(looking.look(tiny, "vistok-tiny", case, ["fastervlm", "random"], 0.5, 0, Stop()))[-1]
    assert [type(sight) for sight in run.sights] == [looking.Sight, Failed, looking.Sight] and run.done
    shown = drawing.look_page(run)
    assert "Cannot work here. evidence: not on this model" in shown and shown.count("<article") == 3
    assert len(json.loads(cells_of(shown))["methods"]) == 2


@pytest.mark.parametrize(
    ("name", "question", "sentence"),
    [
        (samples.OWN, "what?", "picture: choose a sample"),
        ("world:scenes:28", "  \n ", "question: ask something"),
        ("photo:nobody", "what?", "photo:nobody: must be world:TASK:NUMBER or one of"),
        ("/etc/passwd", "what?", "must be world:TASK:NUMBER"),
    ],
)
def test_what_cannot_be_asked_is_said(name, question, sentence):
    with pytest.raises(Unusable, match=re.escape(sentence)):
        samples.case(name, None, question)


def test_a_question_may_not_hold_what_stands_for_a_picture(tiny, case):
    asked = replace(case, question="is <image> red?")
    with pytest.raises(Unusable, match="question: must not hold <image>, which stands for a picture"):
        next(looking.look(tiny, "vistok-tiny", asked, [], 0.5, 0, Stop()))


def test_the_truth_is_known_of_a_pictures_own_questions_only():
    known = samples.picture("world:scenes:3")[1][0]
    assert samples.case("world:scenes:3", None, known.text.upper()).truth.text == known.text
    assert samples.case("world:scenes:3", None, "who made this?").truth is None
    assert samples.case(samples.OWN, Image.new("RGB", (20, 20)), known.text).truth is None


# Stopping ------------------------------------------------------------------------------------------------------------


def test_a_stop_reaches_the_model_before_its_next_layer_and_leaves_no_trace(tiny, case):
    stop, layers = Stop(), tiny.model.model.language_model.layers
    entered = []
    handle = layers[2].register_forward_pre_hook(lambda *given: (entered.append(1), stop.set())[0])
    try:
        with pytest.raises(Stopped):
            list(looking.look(tiny, "vistok-tiny", case, ["fastv"], 0.5, 0, stop))
    finally:
        handle.remove()
    assert len(entered) == 1 and not tiny.lock.locked()
    assert not any(layer._forward_pre_hooks for layer in layers)
    again = list(looking.look(tiny, "vistok-tiny", case, ["fastv"], 0.5, 0, Stop()))[-1]
    assert again.done and again.seen[0].correct


def test_who_waits_for_the_model_can_stop_too(tiny, case):
    stop, failed = Stop(), []

    def wait():
        try:
            list(looking.look(tiny, "vistok-tiny", case, [], 0.5, 0, stop))
        except Stopped as error:
            failed.append(error)

    with tiny.lock:
        thread = threading.Thread(target=wait)
        thread.start()
        stop.set()
        thread.join(30)
    assert len(failed) == 1 and not thread.is_alive()


def test_pages_are_kept_apart_and_the_longest_unused_goes():
    sessions = Sessions(most=2)
    first, second = sessions.page("a"), sessions.page("b")
    first.run = "mine"
    assert sessions.page("a") is first and second.run is None
    flag = second.begin()
    sessions.page("c")
    with pytest.raises(Stopped):
        flag.check()
    assert len(sessions) == 2 and sessions.page("a").run == "mine" and sessions.page("b") is not second
    sessions.close("a")
    assert sessions.page("a").run is None


def test_new_work_of_a_page_stops_what_was_under_way():
    page = Page()
    first = page.begin()
    second = page.begin()
    with pytest.raises(Stopped):
        first.check()
    second.check()


# What is drawn -------------------------------------------------------------------------------------------------------


def cells_of(shown):
    return next(attrs["data-cells"] for _, attrs in Tags(shown).found if "data-cells" in attrs)


def test_every_patch_says_what_became_of_it_under_every_method(everything):
    told = json.loads(cells_of(drawing.look_page(everything)))
    assert told["grid"] == [14, 14] and [m["name"] for m in told["methods"]] == ["dense", *NAMES]
    for method, sight in zip(told["methods"], everything.seen, strict=True):
        assert len(method["fate"]) == len(method["score"]) == len(method["place"]) == 196
        for patch in range(196):
            here = sight.places[:, patch] >= 0
            assert method["fate"][patch].startswith("dropped before") == (not here.any())
            assert ("gone from layer" in method["fate"][patch]) == (
                here[0] and not here[-1] and "only" not in method["fate"][patch]
            )
            assert ("rank" in method["score"][patch]) == any(
                stage.ranks is not None and stage.ranks[patch] > 0 for stage in sight.stages
            )


def test_the_words_for_a_patch():
    def fate(rows, patch=0):
        return words.fates(SimpleNamespace(places=np.array(rows)), 2)[patch]

    assert fate([[0, 1], [0, 1]]) == "kept"
    assert fate([[-1, 1], [-1, 1]]) == "dropped before the language model"
    assert fate([[0, 1], [-1, 1], [-1, 1]]) == "kept, gone from layer 2 on"
    assert fate([[0, 0, 0], [0, 0, 0]]) == "kept, 2 merged into it"
    assert fate([[3, 1, 2, 3]]) == "merged into row 2, column 2"
    assert fate([[0, 1], [-1, 1], [0, 1], [0, 1]]) == "kept, only in layers 1, 3 to 4"


def test_a_score_is_never_made_up(everything):
    named = {sight.method: words.scores(sight) for sight in everything.seen}
    assert set(named["random"]) == {"no score"} == set(named["uniform"])
    assert all(said.startswith("no score, chosen by similarity") for said in named["divprune"])
    assert sum("chosen as number" in said for said in named["divprune"]) == 49
    assert "no score, chosen by similarity; chosen as number 1" in named["divprune"]
    assert all(re.fullmatch(r"\S+, rank \d+ of 196", said) for said in named["fastervlm"])
    assert all(said.startswith("layer 2: ") for said in named["pyramiddrop"])
    assert set(named["dense"]) == {"all tokens stay, none is scored"}


def test_the_veil_is_dark_where_no_layer_saw_a_patch_and_clear_where_all_did(everything):
    for sight in everything.seen:
        alpha = drawing.veil(sight, (14, 14))[..., 3].ravel()
        seen = (sight.places >= 0).mean(0)
        assert (alpha[seen == 0] == round(255 * drawing.DARK)).all()
        alone = (seen == 1) & (np.array([(row == p).sum() for row in sight.places[-1:] for p in row]) == 1)
        assert (alpha[alone] == 0).all(), sight.method
    zipped = next(sight for sight in everything.seen if sight.method == "visionzip")
    pixels, last = drawing.veil(zipped, (14, 14)).reshape(-1, 4), zipped.places[-1]
    groups = [np.flatnonzero(last == place) for place in np.unique(last[last >= 0])]
    colours = {tuple(pixels[group[0]]) for group in groups if len(group) > 1}
    assert all((pixels[group] == pixels[group[0]]).all() for group in groups)
    assert len(colours) == sum(len(group) > 1 for group in groups)


def test_the_heat_of_scores_is_brightest_at_the_best_and_missing_without_any(everything):
    named = {sight.method: sight for sight in everything.seen}
    heat = drawing.score_heat(named["fastervlm"], (14, 14))
    light = heat[..., :3].astype(int).sum(2).ravel()
    assert light.argmax() == named["fastervlm"].stages[0].ranks.argmin()
    assert (
        drawing.score_heat(named["divprune"], (14, 14)) is None and drawing.score_heat(named["dense"], (14, 14)) is None
    )


def test_questions_and_answers_are_text_and_never_html(tiny):
    own = Image.new("RGB", (160, 120), "green")
    run = list(looking.look(tiny, "vistok-tiny", samples.case("", own, EVIL), ["fastervlm"], 0.5, 0, Stop()))[-1]
    run = replace(run, sights=tuple(replace(sight, answer=EVIL) for sight in run.seen))
    for shown in (drawing.look_page(run), drawing.layers_page(run), look._message(EVIL, problem=True)):
        tags = Tags(shown).found
        assert not any(name.startswith("on") for _, attrs in tags for name in attrs)
        assert not any(tag == "script" for tag, _ in tags)
        assert all(attrs["src"].startswith("data:image/") for tag, attrs in tags if tag == "img")
        assert " ".join(EVIL.split()) in unescape(shown)


def test_pictures_have_alternative_texts_and_nothing_is_fetched(everything):
    for shown in (drawing.look_page(everything), drawing.layers_page(everything)):
        pictures = [attrs for tag, attrs in Tags(shown).found if tag == "img"]
        assert pictures and all("alt" in attrs for attrs in pictures)
        assert not re.search(r"(src|href|url\()=?[\"']?(https?:)?//", shown)
    assert "The picture under fastervlm: 49 of 196 patches kept, 147 of 196 patches dropped" in drawing.look_page(
        everything
    )


def test_a_picture_that_the_processor_crops_shows_its_patches_on_the_crop(everything):
    wide = Image.new("RGB", (200, 100))
    run = looking.Run("m", SimpleNamespace(picture=wide), 0.5, (), fit="crop")
    assert drawing.region(run) == (25, 0, 50, 100)
    assert drawing.region(everything) == (0, 0, 100, 100)


def test_a_picture_that_the_model_cuts_shows_overlays_and_no_patches(everything):
    few = everything.seen[:3]
    overlays = tuple(Image.new("RGB", (60, 40), colour) for colour in ("red", "green", "blue"))
    run = replace(everything, sights=few, grid=None, overlays=overlays)
    shown = drawing.look_page(run)
    assert "its tokens form no one grid" in shown and "vt-cursor" not in shown and "vt-veil" not in shown
    assert len({attrs["src"] for tag, attrs in Tags(shown).found if tag == "img"}) == 3
    layers = drawing.layers_page(run)
    assert "only the counts are shown" in layers and "<img" not in layers and layers.count("<article") == 3
