"""One ranking from cells that cover different questions."""

from __future__ import annotations

import numpy as np
import polars
import pytest

from tests.bench.test_sweep import made
from vistok.bench import rows
from vistok.bench.ranking import rank

METHODS = ("holov", "fastv", "todre", "random")
"""The best first."""


def simulated(folder, task, skill, ease, methods, n=60, seed=0, **more):
    """Cells of a task whose questions are all ``ease`` easy."""
    rng = np.random.default_rng([seed, *task.encode()])
    luck = rng.gumbel(size=(len(METHODS), n))
    for number, method in enumerate(METHODS):
        if method in methods:
            made(folder, method, 0.5, 98.0, tuple(skill[number] + luck[number] + ease > 0), task=task, **more)


def test_a_method_that_was_asked_hard_questions_only_is_not_last(tmp_path):
    skill = (1.5, 0.5, -0.5, -1.5)
    for number in range(6):
        simulated(tmp_path, f"easy{number}", skill, 2.0, ("todre", "random", "fastv"))
        simulated(tmp_path, f"hard{number}", skill, -2.0, ("holov", "fastv"))
    found = rank(rows.read(tmp_path), resamples=20)
    assert [row["method"] for row in found] == list(METHODS)
    assert max(found, key=lambda row: row["mean"])["method"] != "holov"  # where plain means go wrong
    assert all(row["low"] <= row["strength"] <= row["high"] for row in found)
    assert [row["samples"] for row in found] == [360, 720, 360, 360]
    assert sum(row["strength"] for row in found) == pytest.approx(0, abs=1e-9)


def test_only_equal_tokens_meet(tmp_path):
    made(tmp_path, "holov", 0.5, 98.0, (0, 0, 0, 0))
    made(tmp_path, "fastv", 0.5, 98.0, (0, 0, 1, 0))
    made(tmp_path, "todre", 0.1, 20.0, (1, 1, 1, 1))
    found = {row["method"]: row for row in rank(rows.read(tmp_path), resamples=5)}
    assert set(found) == {"holov", "fastv"}
    assert found["fastv"]["strength"] > found["holov"]["strength"]


def test_cells_of_several_people_are_pooled_and_count_once(tmp_path):
    for folder in ("a", "b"):
        made(tmp_path / folder, "holov", 0.5, 98.0, (1, 1, 1, 0))
    made(tmp_path / "b", "fastv", 0.5, 98.0, (0, 1, 0, 0))
    frame = polars.concat([rows.read(tmp_path / folder) for folder in ("a", "b")])
    found = rank(frame, resamples=5)
    assert [row["method"] for row in found] == ["holov", "fastv"]
    assert [row["samples"] for row in found] == [4, 4]
    with pytest.raises(ValueError, match="at least two methods"):
        rank(rows.read(tmp_path / "a"))
