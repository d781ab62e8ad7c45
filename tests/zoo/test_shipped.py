"""The models inside the package: they load as anybody would load them, and see what their cards say."""

from __future__ import annotations

import json

import pytest

from vistok.world import sample
from vistok.zoo import MODELS, load, load_processor, shipped
from vistok.zoo.evaluation import evaluate

ALL = ["vistok-tiny", "vistok-tiny-diffusion", "vistok-tiny-qwen"]
EASY = ("existence", "colour", "shape")


def test_what_is_shipped() -> None:
    assert shipped() == ALL


@pytest.mark.parametrize("name", ALL)
def test_it_sees(name: str) -> None:
    """Far above what guessing gives (about a third), on pictures that no training step drew."""
    found = evaluate(load(name), load_processor(name), sample("scenes", 12, seed=2, size=112, split="test"))
    easy = [score for (_, family), score in found.items() if family in EASY]
    assert sum(score.right for score in easy) >= 0.8 * sum(score.n for score in easy)


@pytest.mark.parametrize("name", ALL)
def test_its_folder(name: str) -> None:
    folder = MODELS / name
    files = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json", "processor_config.json"} <= files
    assert not {name for name in files if name.endswith((".bin", ".pt", ".pkl", ".py"))}
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    assert (folder / "README.md").read_text().count(f"vistok train {name}") == 1
