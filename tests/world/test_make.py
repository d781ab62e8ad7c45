"""Seeds, sizes, streams, arguments, labels, dialogues."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys

import numpy as np
import pytest

from vistok.world import (
    CHARACTER_LABELS,
    COLOUR_LABELS,
    SHAPE_LABELS,
    TASKS,
    Picture,
    Question,
    derive_seed,
    dialogue,
    make,
    patch_labels,
    sample,
)


def fingerprint(picture: Picture) -> str:
    parts = [picture.image.tobytes(), picture.caption.encode()]
    for question in picture.questions:
        parts += [question.text.encode(), question.answer.encode(), question.evidence.tobytes()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", [64, 112])
def test_same_seed_same_bytes_whatever_was_drawn_before(task, size):
    first = fingerprint(make(task, 77, size))
    list(sample("all", 12, seed=5, size=96))
    assert fingerprint(make(task, 77, size)) == first
    assert fingerprint(make(task, 78, size)) != first
    assert fingerprint(make(task, np.int64(77), np.int32(size))) == first


def test_same_bytes_in_another_process():
    code = "import hashlib; from vistok.world import make\nfor t in ('scenes', 'words', 'charts', 'forms'): "
    code += "print(hashlib.sha256(make(t, 2**63 + 9, 80).image.tobytes()).hexdigest())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert told == [hashlib.sha256(make(t, 2**63 + 9, 80).image.tobytes()).hexdigest() for t in TASKS]


def test_world_stays_as_the_shipped_models_saw_it():
    """Captions, questions and answers of the first pictures: a change here changes what was trained on."""
    text = "\n".join(
        " | ".join([p.caption, *(f"{q.text} {q.answer}" for q in p.questions)]) for p in sample("all", 200, size=112)
    )
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "ed024fcf87b1cccb"


@pytest.mark.parametrize("task", TASKS)
def test_every_size_shows_the_same(task):
    for seed in range(12):
        pictures = [make(task, seed, size) for size in (64, 96, 113, 336, 672)]
        assert len({p.caption for p in pictures}) == 1
        assert len({tuple((q.text, q.answer) for q in p.questions) for p in pictures}) == 1
        for picture in pictures:
            side = picture.size
            assert picture.image.shape == (side, side, 3) and picture.image.dtype == np.uint8
            assert picture.pil().size == (side, side)
            for thing, reference in zip(picture.things, pictures[-1].things, strict=True):
                assert thing.mask.any() and thing.mask.shape == (side, side)
                here, there = np.array(thing.box) / side, np.array(reference.box) / 672
                assert np.abs(here - there).max() < 0.06


def test_imports_neither_torch_nor_scikit():
    code = "import sys, vistok.world; print([m for m in ('torch', 'skimage', 'sklearn', 'scipy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_streams_never_share_a_seed():
    def seeds(**how):
        return {p.seed for p in sample("scenes", 40, size=64, questions=0, **how)}

    groups = [seeds(seed=s, split=split) for s in (0, 1, 2**31 - 1) for split in ("train", "test")]
    assert all(len(group) == 40 for group in groups)
    assert all(not a & b for a, b in itertools.combinations(groups, 2))
    assert all(s < 2**63 for g in groups[::2] for s in g) and all(2**63 <= s < 2**64 for g in groups[1::2] for s in g)
    assert derive_seed(1, 2, "test") == 2**63 + 2**32 + 2


def test_sample_can_start_in_the_middle_and_takes_the_tasks_in_turn():
    every = list(sample("all", 9, seed=3, size=64))
    assert [p.task for p in every] == [*TASKS, *TASKS, TASKS[0]]
    assert [fingerprint(p) for p in sample("all", 4, seed=3, size=64, start=5)] == [fingerprint(p) for p in every[5:]]


@pytest.mark.parametrize("questions", [0, 1, 16])
@pytest.mark.parametrize("task", TASKS)
def test_number_of_questions(task, questions):
    for picture in sample(task, 40, seed=4, size=64, questions=questions):
        assert len(picture.questions) <= questions
        assert len(picture.questions) >= min(questions, 8)


def test_more_questions_do_not_change_the_picture():
    assert (make("words", 5, questions=2).image == make("words", 5, questions=12).image).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cats", 0), "task: 'cats'"),
        (("scenes", -1), "seed: got -1"),
        (("scenes", 2**64), "seed: got"),
        (("scenes", 1.5), "seed: got 1.5"),
        (("scenes", True), "seed: got True"),
        (("scenes", 0, 63), "size: got 63; must be a whole number from 64 to 672"),
        (("scenes", 0, 673), "size: got 673"),
        (("scenes", 0, "big"), "size: got 'big'"),
        (("scenes", 0, 112, -1), "questions: got -1"),
        (("scenes", 0, 112, 17), "questions: got 17"),
        (("scenes", 0, 112, 8, 0), "max_objects: got 0"),
        (("scenes", 0, 112, 8, 9), "max_objects: got 9"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make(*arguments)


def test_sample_checks_its_arguments_at_the_call():
    for how in ({"task": "dogs"}, {"size": 10}, {"split": "validation"}, {"seed": 2**31}, {"n": -1}, {"questions": 99}):
        with pytest.raises(ValueError, match=f"{next(iter(how))}: "):
            sample(**{"task": "all", "n": 1, **how})


def test_max_objects_bounds_and_reaches():
    counts = [len(p.things) for p in sample("scenes", 200, seed=6, size=64, questions=0, max_objects=8)]
    assert min(counts) == 1 and max(counts) == 8
    assert {len(p.things) for p in sample("scenes", 20, seed=6, size=64, questions=0, max_objects=1)} == {1}


@pytest.mark.parametrize(("size", "grid"), [(112, 14), (112, 16), (100, 7), (64, (8, 5)), (168, 24)])
def test_patch_labels_by_brute_force(size, grid):
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    for picture in sample("all", 16, seed=7, size=size):
        labels = patch_labels(picture, grid)
        assert set(labels) == {"shape", "colour", "character", "index"}
        assert all(a.shape == (rows, columns) and a.dtype == np.uint8 for a in labels.values())
        for i, j in itertools.product(range(rows), range(columns)):
            where = np.s_[i * size // rows : (i + 1) * size // rows, j * size // columns : (j + 1) * size // columns]
            shown = [t for t in picture.things if t.kind in ("object", "bar", "line")]
            best = max(shown, key=lambda t: t.mask[where].sum(), default=None)
            patch = size / rows * size / columns
            shape = colour = 0
            if best is not None and best.mask[where].sum() >= patch * (0.1 if best.kind == "line" else 0.3):
                shape = SHAPE_LABELS.index(best.attributes["shape"] if best.kind == "object" else best.kind)
                colour = COLOUR_LABELS.index(best.attributes["colour"])
            y, x = (i + 0.5) * size / rows, (j + 0.5) * size / columns
            character = index = 0
            for thing in picture.things:
                for at, (name, (x0, y0, x1, y1)) in enumerate(thing.attributes.get("cells", ())):
                    if x0 <= x < x1 and y0 <= y < y1:
                        index = at + 1
                        character = CHARACTER_LABELS.index(name)
                        if thing.kind == "word":
                            colour = COLOUR_LABELS.index(thing.attributes["colour"])
            assert (labels["character"][i, j], labels["index"][i, j]) == (character, index)
            if picture.task != "charts":
                assert (labels["shape"][i, j], labels["colour"][i, j]) == (shape, colour)
            elif shape == 0:
                assert labels["shape"][i, j] == 0


@pytest.mark.parametrize("grid", [0, 113, (4, 0), (200, 4)])
def test_patch_labels_reject_a_grid_that_does_not_fit(grid):
    with pytest.raises(ValueError, match="grid: "):
        patch_labels(make("scenes", 1), grid)


def test_dialogue_asks_about_different_regions():
    apart = 0
    pictures = [p for p in sample("scenes", 120, seed=8) if len(p.things) >= 2]
    for picture in pictures:
        first, second = dialogue(picture)
        assert first is not second and {first, second} <= set(picture.questions)
        apart += not (first.evidence & second.evidence).any()
    assert apart / len(pictures) > 0.9


def test_dialogue_finds_the_pair_that_overlaps_least():
    picture = make("forms", 3)

    def overlap(a: Question, b: Question) -> float:
        return (a.evidence & b.evidence).sum() / (a.evidence | b.evidence).sum()

    best = min(overlap(a, b) for a, b in itertools.combinations(picture.questions, 2))
    assert overlap(*dialogue(picture)) == best
    with pytest.raises(ValueError, match="at least 2"):
        dialogue(make("forms", 3, questions=1))
