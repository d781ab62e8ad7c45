"""What README.md and CONTRIBUTING.md show is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from vistok import catalogue
from vistok.catalogue import Card, Registry, readme

ROOT = Path(__file__).parents[2]


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)


def test_table_of_systems_is_up_to_date():
    text = (ROOT / "README.md").read_text()
    assert readme.renewed(text, catalogue.systems()) == text, "run: python -m vistok.catalogue.readme"


def test_table_is_renewed_between_the_markers(tmp_path, capsys):
    file = tmp_path / "README.md"
    file.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter")
    assert readme.main(["--check"], file) == 1
    assert "out of date" in capsys.readouterr().err
    assert "old" in file.read_text()
    assert readme.main([], file) == 0
    assert file.read_text().startswith(f"before\n{readme.BEGIN}\n")
    assert file.read_text().endswith(f"{readme.END}\nafter")
    assert "old" not in file.read_text()
    assert readme.main(["--check"], file) == 0


def test_row_of_the_table():
    card = Card(
        title="A | B", kind="control", site="here", paper="P", repository="o/n", slug="a-b", family="reduce", claim="C"
    )
    assert readme.table([card]).splitlines() == [
        "**reduce** (1)",
        "",
        "| system | what | where it acts | source |",
        "|---|---|---|---|",
        "| [`a-b`](vistok/reduce/a_b.py) | A \\| B | here | P, [o/n](https://github.com/o/n) |",
    ]


def test_markers_must_be_there():
    with pytest.raises(ValueError, match="must hold the lines"):
        readme.renewed("nothing", [])


def test_example_of_contributing_is_a_system(tmp_path, monkeypatch):
    """The file that CONTRIBUTING.md shows is found, built and right, as it stands there."""
    from vistok.host.reducer import Evidence

    (text,) = python_blocks("CONTRIBUTING.md")
    (tmp_path / "shown" / "reduce").mkdir(parents=True)
    (tmp_path / "shown" / "reduce" / "example_norm.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry(tmp_path / "shown", "shown")
    assert registry.names() == ["example-norm"]
    assert registry.card("example-norm").hyper == {"p": 2.0}
    assert registry.hyper_of("example-norm")[0].description == "Order of the norm."

    features = torch.tensor([[[1.0, 0.0], [3.0, 4.0], [0.0, 2.0], [4.5, 0.0]]])
    reduction = registry.create("example-norm").reduce(Evidence(features=features), keep=2)
    assert reduction.keep.tolist() == [[1, 3]]
    assert reduction.source.tolist() == [[-1, 0, -1, 1]]

    class Trial:
        def evidence_recall(self, method, keep, tasks=()):
            return 0.5 * method.p * keep * 2

    outcome = registry.claim_of("example-norm")(Trial())
    assert (outcome.baseline, outcome.value, outcome.holds) == (0.25, 0.5, True)


def test_example_of_the_readme_is_ten_lines_of_python():
    blocks = python_blocks("README.md")
    assert len(blocks) == 4
    for text in blocks:
        compile(text, "README.md", "exec")
        assert len(text.strip().splitlines()) <= 11


def test_examples_of_the_readme_with_a_tokenizer_and_with_attention_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for text in python_blocks("README.md")[2:]:
        exec(compile(text, "README.md", "exec"), names)
    assert names["codes"].ids.shape == (4, 64) and names["out"].shape == (1, 8, 1024, 64)
    assert (tmp_path / "my-tokenizer" / "model.safetensors").is_file()


def test_example_of_the_readme_with_a_vision_transformer_runs(monkeypatch, capsys):
    import timm

    small = timm.create_model("deit_small_patch16_224", pretrained=False, depth=4, embed_dim=24, num_heads=3)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: small)
    exec(compile(python_blocks("README.md")[1].replace("32, 3", "2, 3"), "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("[")
