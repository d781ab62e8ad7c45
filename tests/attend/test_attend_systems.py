"""The benchmark of single systems: its rows, its tables, and that a run goes on from its file."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from benchmarks import attend_systems


def test_forms_by_tokens():
    options = argparse.Namespace(device="cpu", repeats=1, quadratic=64)
    few, many = (attend_systems.infsa_rows(n, options) for n in (64, 128))
    assert [row["form"] for row in few] == ["softmax", "pure", "linear", "power"]
    assert [row["form"] for row in many] == ["linear", "power"] and "mixed_left" not in many[0]
    assert few[2]["drift_left"] > few[2]["mixed_left"] and all(row["ms"] > 0 for row in few + many)
    table = attend_systems.infsa_table(few + many)
    assert {len(line) for line in table} == {10} and table[1][4] == "" and table[3][4] != ""


def test_weights_are_the_eigenvector_where_no_product_is_negative():
    q, k = torch.rand(2, 1, 1, 200, 64, generator=torch.Generator().manual_seed(0))
    found = attend_systems.cosines(q, k)
    assert found["power"]["left"] == pytest.approx(1, abs=1e-4) and found["linear"]["left"] > found["linear"]["right"]


def test_mixers_by_tasks_and_a_run_that_goes_on(tmp_path, monkeypatch, capsys):
    path = tmp_path / "cells.json"
    options = argparse.Namespace(tasks=["text"], mixers=["dense", "infsa"], steps=1, train=20, seed=0, save=str(path))
    rows = attend_systems.lra_rows(options)
    assert [row["mixer"] for row in rows] == ["commonest", "counted", "dense", "infsa"]
    monkeypatch.setattr(attend_systems, "lra_cell", lambda *given: pytest.fail("measured again"))
    assert attend_systems.lra_rows(options) == rows
    assert len(next(iter(json.loads(path.read_text()).values()))) == 2
    table = attend_systems.lra_table(rows, ["text"])
    assert {len(line) for line in table} == {6} and table[1][3:] == ["", "", ""]
    capsys.readouterr()
    attend_systems.show(table, markdown=True)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("| mixer | text | mean |") and printed[1].count("---") == 6
    attend_systems.show(table, markdown=False)
    assert len({len(line) for line in capsys.readouterr().out.splitlines()}) == 1
