"""docs/bench.md says what is true."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from vistok.bench.rows import COLUMNS
from vistok.bench.sweep import PROTOCOLS, Sweep

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/bench.md").read_text()


def test_every_column_is_in_the_table():
    table = TEXT.partition("<!-- columns:begin -->\n")[2].partition("<!-- columns:end -->")[0]
    rows = [f"| `{name}` | {kind} | {meaning} |" for name, (kind, meaning) in COLUMNS.items()]
    assert table.splitlines() == ["| column | type | meaning |", "|---|---|---|", *rows]


def test_the_sweep_shown_is_one():
    shown = re.search(r"```toml\n(.*?)```", TEXT, flags=re.DOTALL)
    assert shown
    assert len(Sweep.of(tomllib.loads(shown[1])).cells()) == 5 + 2 * 2 * (1 + 2 * 5)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/configs").glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_sweeps_are_read(path):
    assert Sweep.read(path).cells()


@pytest.mark.parametrize("protocol", sorted({re.sub(r"-\d$", "-", name) for name in PROTOCOLS}))
def test_every_protocol_is_explained(protocol):
    assert f"`{protocol}" in TEXT
