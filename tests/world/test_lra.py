"""Tasks on long sequences: answers by another way, balance, pairs, no row twice, and what does not fit."""

from __future__ import annotations

import random

import numpy as np
import pytest

from vistok.world.lra import (
    END,
    MARKS,
    MAX,
    MED,
    MIN,
    SM,
    listops,
    listops_value,
    pathfinder,
    pixels,
    retrieval,
    text,
)


def words(row):
    return bytes(row.astype(np.uint8)).decode()


def test_listops_values_are_those_of_the_evaluator_and_lengths_fit():
    task = listops(200, 10, 60, 0)
    lengths = (task.tokens >= 0).sum(1)
    assert lengths.min() >= 10 and lengths.max() <= 60 and task.tokens.shape == (200, 60)
    assert [listops_value(row) for row in task.tokens] == task.labels.tolist()
    padded = np.arange(60) >= lengths[:, None]
    assert ((task.tokens < 0) == padded).all() and set(task.labels) <= set(range(10))


def test_listops_operators():
    assert listops_value([MIN, 4, 2, 9, END]) == 2 and listops_value([MAX, 4, 2, 9, END, -1]) == 9
    assert listops_value([MED, 1, 4, END]) == 2 and listops_value([MED, 5, 1, 3, END]) == 3  # 2.5 is cut
    assert listops_value([SM, 9, 4, MIN, 3, 8, END, END]) == 6 and listops_value([7]) == 7


@pytest.mark.parametrize("tokens", [[], [1, 2], [MIN, 3], [END], [MIN, END], [3, END]])
def test_what_is_no_expression_is_said(tokens):
    with pytest.raises(ValueError, match="tokens: got"):
        listops_value(tokens)


def test_listops_trees_are_as_published():
    """Arguments 2 to ``max_args``, ``depth`` levels, operators a quarter of the nodes that may be one."""
    task = listops(3000, 1, 400, 0, depth=3, max_args=3)
    deepest, arguments = 0, set()
    for row in task.tokens:
        open_ = [0]
        for token in row[row >= 0]:
            if token == END:
                arguments.add(open_.pop())
            else:
                open_[-1] += 1
                if token > 9:
                    open_.append(0)
                    deepest = max(deepest, len(open_))
    assert arguments == {2, 3} and deepest == 3  # operators at levels 1 and 2, digits at 3
    operators = np.isin(task.tokens, (MIN, MAX, MED, SM)).sum(0)
    assert set(task.tokens[:, 0]) >= {MIN, MAX, MED, SM} and operators[0] > 0


@pytest.mark.parametrize("size", [16, 24])
def test_pairs_of_curves_differ_in_the_second_dot_alone(size):
    task = pathfinder(20, size, 0)
    pictures = task.tokens.reshape(-1, size, size)
    assert task.labels.tolist() == [0, 1] * 10 and pictures.min() == 0 and pictures.max() > 200
    rows, columns = np.mgrid[:size, :size]
    for no, yes in zip(pictures[::2], pictures[1::2], strict=True):
        changed = no != yes
        # What changed lies in two small places: where the dot was, and where it is.
        brighter, darker = changed & (yes > no), changed & (yes < no)
        for part in (brighter, darker):
            assert 0 < part.sum() <= 25 and np.ptp(rows[part]) <= 4 and np.ptp(columns[part]) <= 4


def test_distance_of_the_dots_tells_nothing():
    task = pathfinder(60, 16, 1)
    far = []
    for picture in task.tokens.reshape(-1, 16, 16):
        bright = np.argwhere(picture > 150)
        far.append(np.linalg.norm(bright[:, None] - bright, axis=2).max())
    no, yes = np.array(far).reshape(-1, 2).T
    assert abs(no.mean() - yes.mean()) < 0.7 and np.abs(no - yes).mean() < 1.5


def test_digits_are_large_pixels():
    task, small = pixels(16, True), pixels(8, True)
    assert (task.tokens.reshape(-1, 16, 16)[:, ::2, 1::2].reshape(-1, 64) == small.tokens).all()
    assert task.tokens.max() <= 255 and len(pixels(8, False).labels) > len(task.labels)


@pytest.mark.parametrize("length", [40, 64, 200])
def test_reviews_say_what_their_clauses_say(length):
    task = text(100, length, 0, denied=0.5)
    for row, label in zip(task.tokens, task.labels, strict=True):
        clauses = [clause.split() for clause in words(row).split(".")[:-1]]
        score = 0
        for clause in clauses:
            sign = 1 if clause[-1] in ("good", "fine", "warm") else -1
            score += -sign if clause[-2] == "not" else sign
        assert len(clauses) % 2 and (score > 0) == bool(label)
    assert task.labels.mean() == 0.5


def test_pairs_of_documents_share_a_code_word_or_do_not():
    task = retrieval(100, 40, 0, topics=6)
    found = set()
    for (first, second), label in zip(task.tokens, task.labels, strict=True):
        marks = ["".join(c for c in words(row) if c in MARKS.decode()) for row in (first, second)]
        assert all(mark[:4] == mark[4:] and sorted(mark[:4]) == list("abcd") for mark in marks)
        assert (marks[0] == marks[1]) == bool(label)
        found |= {mark[:4] for mark in marks}
    assert len(found) == 6 and task.labels.mean() == 0.5


MAKERS = {
    "listops": lambda seed: listops(100, 5, 40, seed),
    "pathfinder": lambda seed: pathfinder(20, 16, seed),
    "text": lambda seed: text(100, 64, seed),
    "retrieval": lambda seed: retrieval(100, 32, seed),
}


@pytest.mark.parametrize("name", MAKERS)
def test_equal_seeds_give_equal_data_and_no_row_twice(name):
    state = random.getstate()
    task, again, other = (MAKERS[name](seed) for seed in (3, 3, 4))
    assert (task.tokens == again.tokens).all() and (task.labels == again.labels).all()
    assert task.tokens.shape == other.tokens.shape and (task.tokens != other.tokens).any()
    assert len(np.unique(task.tokens.reshape(len(task.tokens), -1), axis=0)) == len(task.tokens)
    assert task.tokens.max() < task.vocabulary and task.labels.max() < task.classes
    assert random.getstate() == state
    part = task[10:20]
    assert (part.tokens == task.tokens[10:20]).all() and part.classes == task.classes


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="min_len, max_len: got 2, 2"):
        listops(10, 2, 2, 0)
    with pytest.raises(ValueError, match="n, size: got 3"):
        pathfinder(3, 16, 0)
    with pytest.raises(ValueError, match="side: got 12"):
        pixels(12, True)
    with pytest.raises(ValueError, match="length: got 10"):
        text(2, 10, 0)
    with pytest.raises(ValueError, match="topics, length: got 30"):
        retrieval(2, 64, 0, 30)
