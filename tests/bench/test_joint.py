"""Fewer tokens and fewer bits together: rows by hand."""

from __future__ import annotations

import pytest

from tests.bench.test_sweep import made
from vistok.bench import rows
from vistok.bench.joint import combinations

# What is right, by question: fewer tokens lose the first, int8 the second, fp8 nothing, all of them also the third.
DENSE, TOKENS, INT8, FP8 = (1, 1, 1, 1), (0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 1, 1)


def sweep_of(folder, joint=(0, 0, 0, 1), **hidden):
    size = {"none": 9000, "int8": 3000}
    kept = {"none": 1000, "fp8": 250}
    right = {
        ("dense", "none", "none"): DENSE,
        ("dense", "int8", "none"): INT8,
        ("dense", "none", "fp8"): FP8,
        ("dense", "int8", "fp8"): (1, 0, 0, 1),
        ("holov", "none", "none"): TOKENS,
        ("holov", "int8", "none"): (0, 0, 1, 1),
        ("holov", "none", "fp8"): TOKENS,
        ("holov", "int8", "fp8"): joint,
    } | hidden
    for (method, weights, cache), hits in right.items():
        keep, tokens = (1.0, 196.0) if method == "dense" else (0.5, 98.0)
        held = {"weight_bytes": size[weights], "kv_bytes": kept[cache] // (2 if method == "holov" else 1)}
        made(folder, method, keep, tokens, hits, row=held, weights=weights, cache=cache)
    return combinations(rows.read(folder))


def test_losses_are_held_against_the_sum_of_their_parts(tmp_path):
    found = {(row["method"], row["weights"], row["cache"]): row for row in sweep_of(tmp_path)}
    assert len(found) == 8
    plain = found["dense", "none", "none"]
    assert plain["change"] is None and plain["interaction"] is None
    assert (found["holov", "none", "none"]["change"], found["holov", "none", "none"]["interaction"]) == (-0.25, None)
    two = found["holov", "int8", "none"]
    assert (two["change"], two["interaction"]) == (-0.5, 0)  # one question each, none more
    assert (two["interaction_low"], two["interaction_high"]) == (0, 0)
    assert found["dense", "int8", "fp8"]["interaction"] == -0.25
    three = found["holov", "int8", "fp8"]
    assert (three["change"], three["interaction"]) == (-0.75, -0.25)
    assert three["interaction_low"] <= -0.25 <= three["interaction_high"]
    assert three["bytes"] == 3000 + 125


def test_the_front_is_what_nothing_beats(tmp_path):
    found = sweep_of(tmp_path)
    for row in found:
        beaten = any(
            other["accuracy"] >= row["accuracy"]
            and other["bytes"] <= row["bytes"]
            and (other["accuracy"], other["bytes"]) != (row["accuracy"], row["bytes"])
            for other in found
        )
        assert row["front"] == (not beaten)
    assert {True, False} == {row["front"] for row in found}


def test_a_sweep_without_other_compression_has_no_combinations(tmp_path):
    made(tmp_path, "dense", 1.0, 196.0)
    made(tmp_path, "holov", 0.5, 98.0)
    assert combinations(rows.read(tmp_path)) == []


def test_a_part_that_was_not_measured_leaves_the_sum_open(tmp_path):
    made(tmp_path, "dense", 1.0, 196.0)
    made(tmp_path, "holov", 0.5, 98.0)
    made(tmp_path, "holov", 0.5, 98.0, weights="int8")
    row = next(row for row in combinations(rows.read(tmp_path)) if row["weights"] == "int8")
    assert row["interaction"] is None
    assert row["change"] == pytest.approx(0)
