"""``vistok try``: rows, honest words, and claims that cannot be measured."""

from __future__ import annotations

import json

import pytest

from vistok import catalogue
from vistok.catalogue import Outcome

FIELDS = ["system", "claim", "metric", "baseline", "value", "holds", "seconds"]


@pytest.fixture
def claims(monkeypatch):
    """Stands in for the claims of the systems named."""

    def put(**claims):
        given = {name.replace("_", "-"): claim for name, claim in claims.items()}
        monkeypatch.setattr("vistok.bench.trial.claim_of", given.__getitem__)
        monkeypatch.setattr(catalogue, "systems", lambda family=None: [catalogue.card(name) for name in given])

    return put


def test_json_has_the_figures(run, small):
    result = run("try", "uniform", "--model", small, "--pictures", "4", "--json")
    assert result.exit_code == 0, result.output
    (row,) = [json.loads(line) for line in result.stdout.splitlines()]
    assert list(row)[:7] == FIELDS
    assert row["system"] == "uniform"
    assert row["claim"] == catalogue.card("uniform").claim
    assert row["baseline"] == 0.25
    assert 0 < row["value"] < 0.6
    assert row["holds"] == (abs(row["value"] - 0.25) <= 0.05)
    assert row["seconds"] > 0


def test_the_table_does_not_pretend(run, small, claims):
    claims(
        random=lambda trial: Outcome("share", 0.5, 0.25, False, "because"),
        uniform=lambda trial: Outcome("share", 0.5, 0.75, True),
    )
    result = run("try", "all", "--model", small)
    assert result.exit_code == 0
    words = " ".join(result.stdout.split())
    assert "did not hold at this scale" in words
    assert "held" in words
    assert "random: because" in words


def test_one_that_fails_does_not_stop_all(run, small, claims):
    def fail(trial):
        raise ValueError("evidence: not for this one")

    claims(random=fail, uniform=lambda trial: Outcome("share", 0.5, 0.75, True))
    result = run("try", "all", "--model", small, "--json")
    assert result.exit_code == 2
    assert [json.loads(line)["system"] for line in result.stdout.splitlines()] == ["uniform"]
    assert "random cannot be measured: evidence: not for this one" in result.stderr
    assert result.stderr.splitlines()[-1] == f"error: --model: got {small}, cannot serve random"


def test_mistakes(run, small):
    for arguments, message in {
        ("nope",): "unknown system 'nope'",
        ("uniform", "--model", "./none"): "--model: got ./none",
        ("uniform", "--pictures", "0"): "--pictures",
        (): "Missing argument",
    }.items():
        result = run("try", *arguments)
        assert result.exit_code == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
