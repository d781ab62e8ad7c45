"""What each protocol asks, and how its answers come about."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from vistok.bench.corruptions import BLUR, JPEG, LETTERBOX, NOISE, boxed_mask, corrupt
from vistok.bench.measure import Case, answer_all, cases_of
from vistok.bench.metrics import answer_probability, chrf, exact_match
from vistok.bench.protocols import (
    DETAIL_SHARE,
    READING,
    WHICH,
    detail,
    long_answer,
    multi_turn,
    robustness,
    single,
    two_pictures,
)
from vistok.host import apply
from vistok.world import Question, dialogue, sample
from vistok.zoo import load, load_processor
from vistok.zoo.asking import ask, ask_again, encode

KINDS = ("noise", "blur", "jpeg", "letterbox")


@pytest.fixture(scope="module")
def pictures():
    return list(sample("all", 8, split="test", questions=4))


def plain(colour, question="is there a star?", truth=None):
    return Case(Image.new("RGB", (64, 64), colour), question, truth)


def known(share=0.01, family="colour", answer="red"):
    evidence = np.zeros((10, 10), bool)
    evidence.flat[: round(100 * share)] = True
    return Question(family, "what colour is the star?", answer, evidence)


# What is asked ---------------------------------------------------------------------------------------------------


def test_single(pictures):
    mine = plain("red")
    cases = single([pictures[0], mine, pictures[1]])
    assert cases[4] is mine
    assert [c.question for c in cases[:4]] == [q.text for q in pictures[0].questions]
    assert len(cases) == 9


def test_dialogues_of_the_world(pictures):
    turns = multi_turn(pictures)
    assert len(turns) == len(pictures)
    for one, picture in zip(turns, pictures, strict=True):
        first, second = dialogue(picture)
        assert (one.first, one.question) == ((first.text, first.answer), second.text)
        assert one.truth is second and one.picture.tobytes() == picture.pil().tobytes()
    assert multi_turn(list(sample("scenes", 2, questions=1))) == []


def test_dialogues_of_the_user():
    red = [plain("red", f"question {n}", known(answer=f"answer {n}")) for n in range(3)]
    blue = [plain("blue", "a", known()), plain("blue", "b")]
    turns = multi_turn([red[0], blue[0], red[1], blue[1], red[2]])
    assert [(t.first, t.question) for t in turns] == [(("question 0", "answer 0"), "question 1"), (("a", "red"), "b")]
    assert turns[1].truth is None
    with pytest.raises(ValueError, match="given: the answer to 'b' is not known"):
        multi_turn([blue[1], blue[0]])


def test_details(pictures):
    cases = cases_of(pictures)
    found = detail(pictures)
    assert 0 < len(found) < len(cases)
    for case in cases:
        small = case.truth.family in READING or case.truth.evidence.sum() <= DETAIL_SHARE * case.truth.evidence.size
        assert any(f.truth is case.truth for f in found) == small
    mine = [plain("red", truth=t) for t in (known(0.01), known(0.05), known(0.05, "reading"), None)]
    assert detail(mine) == [mine[0], mine[2]]
    assert detail(mine, share=0.05) == mine[:3]
    assert detail([plain("red", truth=known(1.0, "existence", "no"))]) == []
    with pytest.raises(ValueError, match="share: got 0"):
        detail(mine, share=0)


def test_long_answers(pictures):
    mine = [plain("red", "what is written?", known(answer="a long text")), plain("red")]
    cases = long_answer([*pictures, *mine], "say all .")
    assert cases[-1] is mine[0] and len(cases) == len(pictures) + 1
    for case, picture in zip(cases[:-1], pictures, strict=True):
        assert (case.question, case.truth.answer, case.truth.family) == ("say all .", picture.caption, "caption")
        shown = np.any([thing.mask for thing in picture.things], axis=0)
        assert np.array_equal(case.truth.evidence, shown) and shown.any()
    assert long_answer(pictures[:1])[0].question == "describe the picture ."


def test_pairs_of_pictures(pictures):
    cases = cases_of(pictures)
    made = two_pictures(pictures)
    assert len(made) == len(cases)
    assert [one.place for one in made[:4]] == [0, 1, 0, 1]
    for one, case in zip(made, cases, strict=True):
        assert one.question == WHICH[one.place] + case.question
        assert one.truth is case.truth
        assert one.pictures[one.place].tobytes() == case.picture.tobytes()
        assert one.pictures[1 - one.place].tobytes() != case.picture.tobytes()
    red, blue = plain("red"), plain("blue")
    assert two_pictures([red, blue, red])[0].pictures == (red.picture, blue.picture)
    assert two_pictures([red, red, blue])[2].pictures == (blue.picture, red.picture)
    with pytest.raises(ValueError, match="given: got one picture"):
        two_pictures([red, red])


# Worse pictures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_get_worse_step_by_step(kind, pictures):
    picture = pictures[0].pil()
    far = []
    for severity in range(1, 6):
        worse = corrupt(picture, kind, severity, seed=3)
        assert (worse.size, worse.mode) == (picture.size, "RGB")
        assert worse.tobytes() == corrupt(picture, kind, severity, seed=3).tobytes()
        far.append(np.abs(np.asarray(worse, float) - np.asarray(picture)).mean())
    assert far[0] > 0.1
    assert far == sorted(far) or kind == "letterbox"


def test_severities_are_as_stated():
    grey = Image.new("RGB", (200, 200), (128, 128, 128))
    for severity, deviation in enumerate(NOISE[:2], 1):
        noise = np.asarray(corrupt(grey, "noise", severity), float) - 128
        assert noise.std() == pytest.approx(255 * deviation, rel=0.02)
    assert corrupt(grey, "noise", 1).tobytes() != corrupt(grey, "noise", 1, seed=1).tobytes()
    # Blurred twice as far in a picture of twice the side.
    edge = np.zeros((224, 224, 3), np.uint8)
    edge[:, 112:] = 255
    large = Image.fromarray(edge.repeat(2, 0).repeat(2, 1))
    widths = []
    for picture in (Image.fromarray(edge), large):
        row = np.asarray(corrupt(picture, "blur", 3), int)[50, :, 0]
        widths.append(((row > 255 * 0.16) & (row < 255 * 0.84)).sum())
    assert widths[0] == pytest.approx(2 * BLUR[2], abs=1) and widths[1] == pytest.approx(4 * BLUR[2], abs=1)
    assert list(JPEG) == sorted(JPEG, reverse=True)
    for severity, share in enumerate(LETTERBOX, 1):
        white = np.asarray(corrupt(Image.new("RGB", (100, 50), "white"), "letterbox", severity))[..., 0] == 255
        assert white.sum() == (100 * share) * (50 * share)
        rows, columns = np.nonzero(white)
        assert abs(rows.min() - (49 - rows.max())) <= 1 and abs(columns.min() - (99 - columns.max())) <= 1


def test_evidence_moves_with_the_letterbox(pictures):
    for severity in (1, 3, 5):
        for case in single(pictures):
            moved = boxed_mask(case.truth.evidence, severity)
            assert moved.any() and moved.shape == case.truth.evidence.shape
            drawn = Image.fromarray(np.uint8(255 * case.truth.evidence)).convert("RGB")
            seen = np.asarray(corrupt(drawn, "letterbox", severity))[..., 0] > 200
            frame = np.asarray(corrupt(Image.new("RGB", drawn.size, "white"), "letterbox", severity))[..., 0] == 255
            assert not (moved & ~frame).any()
            assert (seen & moved).sum() >= 0.95 * seen.sum()
    single_pixel = np.zeros((10, 10), bool)
    single_pixel[9, 0] = True
    assert np.argwhere(boxed_mask(single_pixel, 5)).tolist() == [[6, 2]]


def test_robustness(pictures):
    given = [*pictures[:2], plain("red")]
    before = single(given)
    for kind in KINDS:
        after = robustness(given, kind, 2, seed=5)
        assert len(after) == len(before)
        for old, new in zip(before, after, strict=True):
            assert (new.question, new.name) == (old.question, old.name)
            assert new.picture.tobytes() != old.picture.tobytes() or (kind == "blur" and old is before[-1])
            if old.truth is None:
                assert new.truth is None
            elif kind == "letterbox":
                assert np.array_equal(new.truth.evidence, boxed_mask(old.truth.evidence, 2))
                assert new.truth.answer == old.truth.answer
            else:
                assert new.truth is old.truth
    assert after[0].picture is after[1].picture  # one picture, many questions
    noisy = [robustness(order, "noise", 1) for order in (pictures[:2], pictures[1::-1])]
    assert noisy[0][0].picture.tobytes() == noisy[1][-1].picture.tobytes()
    assert robustness([plain("red")], "noise", 1)[0].picture.tobytes() != (
        robustness([plain("red")], "noise", 1, seed=1)[0].picture.tobytes()
    )
    with pytest.raises(ValueError, match="kind: got 'fog'"):
        robustness(given, "fog", 1)
    for severity in (0, 6):
        with pytest.raises(ValueError, match=f"severity: got {severity}"):
            robustness(given, "blur", severity)


# How it is answered ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reselect", [False, True])
def test_second_answers_are_those_of_the_dialogue(model, processor, pictures, reselect):
    turns = multi_turn(pictures)
    how = {"batch_size": 3, "max_new_tokens": 6}
    found = answer_all(model, processor, "fastv", 0.1, turns, reselect=reselect, **how)
    asked = [one.picture for one in turns], [(*one.first, one.question) for one in turns]
    with apply(model, "fastv", keep=0.1, reselect=reselect):
        assert [one.answer for one in found] == ask_again(model, processor, *asked, **how)
    assert all(0 < one.tokens_kept < one.tokens_in for one in found)
    dense = answer_all(model, processor, "dense", 0.1, turns[:2], reselect=reselect)
    assert [one.answer for one in dense] == ask_again(model, processor, asked[0][:2], asked[1][:2])
    with pytest.raises(ValueError, match="cases: got some with a first turn"):
        answer_all(model, processor, "fastv", 0.1, [turns[0], *single(pictures[:1])])


def test_several_pictures_in_a_prompt(model, processor, pictures):
    made = two_pictures(pictures)[::5]
    together = answer_all(model, processor, "uniform", 0.25, made, batch_size=4)
    alone = [answer_all(model, processor, "uniform", 0.25, [case])[0] for case in made]
    assert together == alone
    assert {one.tokens_in for one in together} == {196} and {one.tokens_input for one in together} == {49}
    shown, questions = [one.pictures for one in made], [one.question for one in made]
    with apply(model, "uniform", keep=0.25) as session:
        assert ask(model, processor, shown, questions) == [one.answer for one in together]
        assert len(session.pictures) == 2 * len(made)
    first = [[pair[0]] for pair in shown]
    assert ask(model, processor, first, questions) == ask(model, processor, [p for (p,) in first], questions)
    one = encode(processor, [pair[0] for pair in shown], questions)
    for name, values in encode(processor, first, questions).items():
        assert np.array_equal(values, one[name])
    mixed = encode(processor, [shown[0], first[1]], questions[:2])
    assert len(mixed["pixel_values"]) == 3


def test_evidence_counts_in_the_picture_that_is_asked_about(model, processor, pictures):
    """Tokens of the other picture do not answer the question."""
    half = np.zeros((112, 112), bool)
    half[:56] = True
    top = plain("red", truth=Question("colour", "?", "red", half))
    case = two_pictures([top, plain("blue")])[0]
    found = answer_all(model, processor, "random", 0.25, [case, replace(case, place=1)])
    with apply(model, "random", keep=0.25) as session:
        ask(model, processor, [case.pictures, case.pictures[::-1]], [case.question] * 2)
    grids = [picture.keep for picture in session.pictures]
    want = [float((grid < 98).sum()) / 98 for grid in (grids[0], grids[3])]
    assert [one.evidence_recall for one in found] == pytest.approx(want)
    assert found[0].kept == tuple(grids[0].tolist()) and found[0].grid == (14, 14)


def test_the_shipped_model_under_each_protocol():
    """A few pictures: that the words of the protocols are its words, and that captions and second turns go well."""
    model, processor = load(), load_processor()
    pictures = list(sample("all", 4, split="test"))
    captions = long_answer(pictures)
    said = [a.answer for a in answer_all(model, processor, None, 1.0, captions, max_new_tokens=64)]
    right = [case.truth.answer for case in captions]
    scores = [chrf(a, b) for a, b in zip(said, right, strict=True)]
    assert np.mean(scores) > 70
    assert np.mean(scores) > np.mean([chrf(a, b) for a, b in zip(said[1:], right, strict=False)]) + 20
    turns = multi_turn(pictures)
    second = [one.answer for one in answer_all(model, processor, None, 1.0, turns)]
    assert exact_match(second, [one.truth.answer for one in turns]).mean() >= 0.6
    unknown = processor.tokenizer.unk_token_id
    assert all(unknown not in processor.tokenizer(words)["input_ids"] for words in WHICH)
    asked = [case.picture for case in captions], [p.questions[0].text for p in pictures]
    own = answer_probability(model, processor, *asked, ask(model, processor, *asked))
    wrong = answer_probability(model, processor, *asked, ["ring"] * len(pictures))
    assert own.product.mean() > 0.5 > wrong.product.mean()
