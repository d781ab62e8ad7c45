"""``vistok systems`` and ``vistok show``, in process and cold."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from vistok import catalogue
from vistok.catalogue import Registry, tags
from vistok.cli.app import app

SYSTEM = '''
CARD = Card(title="Title [x]", kind="training-free", site="Site", paper="Paper", repository="o/n",
            mechanism=("similarity",), needs=("keys",), score="norm", claim="A claim.", departures=("Rounds up.",))

@dataclass
class System:
    layer: int | None = -2
    """Which layer."""
'''


@pytest.fixture
def vistok():
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, list(arguments))


@pytest.fixture
def one_system(tmp_path, monkeypatch):
    (tmp_path / "reduce").mkdir()
    (tmp_path / "reduce" / "some_system.py").write_text(SYSTEM)
    registry = Registry(tmp_path, "vistok")
    for name in ("systems", "card", "hyper_of", "module_of"):
        monkeypatch.setattr(catalogue, name, getattr(registry, name))
    monkeypatch.setattr(tags, "systems", registry.systems)


@pytest.mark.usefixtures("one_system")
def test_systems_lists_rows(vistok):
    result = vistok("systems")
    assert result.exit_code == 0
    assert "some-system" in result.stdout
    assert "Title [x]" in result.stdout
    assert "1 system;" in result.stdout


@pytest.mark.usefixtures("one_system")
def test_systems_json_is_one_object_a_line(vistok):
    result = vistok("systems", "--family", "reduce", "--json")
    (row,) = map(json.loads, result.stdout.splitlines())
    assert row["slug"] == "some-system"
    assert row["hyper"] == {"layer": -2}
    assert row["claim"] == "A claim."


@pytest.mark.usefixtures("one_system")
@pytest.mark.parametrize(("mechanism", "there"), [("similarity", True), ("query", False)])
def test_systems_of_a_mechanism(vistok, mechanism, there):
    assert ("some-system" in vistok("systems", "--mechanism", mechanism, "--json").stdout) == there


@pytest.mark.usefixtures("one_system")
def test_map_by_mechanism_shows_gaps(vistok):
    rows = {
        row["mechanism"]: row
        for row in map(json.loads, vistok("systems", "--by", "mechanism", "--json").stdout.splitlines())
    }
    assert list(rows) == list(catalogue.TAGS["mechanism"])
    assert rows["similarity"]["image"] == ["some-system"] and rows["similarity"]["video"] == []
    assert rows["query"]["image"] == []
    (line,) = [line for line in vistok("systems", "--by", "mechanism").stdout.splitlines() if "similarity" in line]
    assert line.split() == ["similarity", "some-system"]


@pytest.mark.usefixtures("one_system")
def test_show_tells_all(vistok):
    result = vistok("show", "some_system")
    assert result.exit_code == 0
    for text in ("some-system: Title [x]", "Paper", "o/n", "vistok.reduce.some_system", "keys", "norm", "A claim.",
                 "Rounds up.", "layer", "int | None", "-2", "Which layer."):  # fmt: skip
        assert text in result.stdout


@pytest.mark.usefixtures("one_system")
def test_show_json(vistok):
    row = json.loads(vistok("show", "some-system", "--json").stdout)
    assert row["module"] == "vistok.reduce.some_system"
    assert row["departures"] == ["Rounds up."]
    assert row["parameters"] == [{"name": "layer", "type": "int | None", "default": -2, "description": "Which layer."}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "fastrvlm"), "unknown system 'fastrvlm'"),
        (("systems", "--family", "nope"), "family: got 'nope', must be one of reduce"),
        (("systems", "--by", "site"), "by: got 'site', must be one of family, kind, mechanism, modality"),
        (("systems", "--kind", "free"), "kind: got 'free', must be one of training-free"),
        (("systems", "--nope"), "No such option: --nope"),
        (("show",), "Missing argument"),
        (("sytems",), "unknown command 'sytems', must be one of ask, compare"),
        (("--nope",), "No such option: --nope"),
        (("world", "nope"), "unknown command 'nope', must be one of sample"),
    ],
)
def test_mistakes_give_one_line_and_two(vistok, arguments, message):
    result = vistok(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    assert result.stdout == ""


@pytest.mark.parametrize(
    "arguments", [("--debug", "show", "nope"), ("show", "nope", "--debug"), ("show", "--debug", "nope")]
)
def test_debug_shows_the_traceback(vistok, arguments):
    result = vistok(*arguments)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: unknown system 'nope'")


@pytest.mark.parametrize("arguments", [("systems",), ("systems", "--json"), ("show", "fastervlm"), ("show", "nope")])
def test_cold_start_is_under_a_second_and_without_torch(arguments):
    """Processor time, best of three; about 0.3 s on a free machine, half as much again on a busy one."""
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "from vistok.cli.app import main; main()"
    )
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.returncode == (2 if "nope" in arguments else 0)
    assert done.stderr.splitlines()[-1] == "False"
    assert min(seconds) < 1
