"""The vision transformers inside the package: they load as anybody would load them, and see what their cards say."""

from __future__ import annotations

import re

import pytest
import timm
import torch

from vistok.bench.vit_trial import ViTTrial
from vistok.cli.train import find_recipe
from vistok.zoo import MODELS, load, shipped
from vistok.zoo.vit import class_names

ALL = shipped("vit")


@pytest.mark.parametrize("name", ALL)
def test_its_folder(name: str) -> None:
    folder = MODELS / name
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert (folder / "model.safetensors").stat().st_size < 5e6
    assert (folder / "README.md").read_text().count(f"vistok train {name}") == 1
    assert tuple(class_names(name)) == find_recipe(name).task.classes  # type: ignore[union-attr]
    with torch.no_grad():
        pixels = torch.randn(1, 3, 96, 96)
        theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert torch.equal(theirs(pixels), load(name, device="cpu")(pixels))


@pytest.mark.parametrize("name", ALL)
def test_it_sees(name: str) -> None:
    """About what its card says, on other held-out pictures."""
    (row,) = re.findall(r"\| all \| ([\d.]+)%", (MODELS / name / "README.md").read_text())
    task = find_recipe(name).task  # type: ignore[union-attr]
    found = next(iter(task.score(load(name, device="cpu"), 144, seed=2).values()))
    told = float(row) / 100
    assert found > told - 0.1
    assert found < told + 0.1 or task.name == "places"  # a place among fewer others is found more often


@pytest.mark.skipif("vistok-vit" not in ALL, reason="the classifier is not shipped")
def test_attention_finds_the_object() -> None:
    """What the class token attends to is where the object is; a random choice is not."""
    trial = ViTTrial(pictures=64)
    chosen, random = (trial.mask_score(name, 0.5, layers=(6,)) for name in ("topk", "random-drop"))
    assert chosen.precision > 1.25 * chosen.chance
    assert abs(random.precision - random.chance) < 0.06
    assert trial.accuracy("topk", 0.5) > trial.accuracy("random-drop", 0.5) + 0.1
