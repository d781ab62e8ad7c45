"""The visual tokenizers of the zoo: training that resumes, cards, and those inside the package."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import vistok
from vistok.zoo import MODELS, load, shipped
from vistok.zoo.visual_tokenizers import (
    TokenizerRecipe,
    code_usage,
    evaluate_jpeg,
    evaluate_tokenizer,
    held_out,
    train_tokenizer,
)
from vistok.zoo.vit_training import Pace

ALL = shipped("tokenizer")


def recipes() -> list[TokenizerRecipe]:
    stems = [path.stem for path in (MODELS.parent / "recipes").glob("[!_]*.py")]
    found = [import_module(f"vistok.zoo.recipes.{stem}").RECIPE for stem in sorted(stems)]
    return [recipe for recipe in found if isinstance(recipe, TokenizerRecipe)]


def small_recipe(name: str = "small", seed: int = 0) -> TokenizerRecipe:
    hyper = dict(size="T", tokens=6, image=16, patch=4, codes=32, dim=4, restart_after=2, per="sample")
    return TokenizerRecipe(name, "one-d-piece", hyper, Pace(4, batch_size=4), "It is small.", seed, held_out=8)


def test_training_that_was_stopped_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    recipe, told = small_recipe(), []
    train_tokenizer(recipe, tmp_path / "whole", checkpoint_every=2, on_step=told.append)
    train_tokenizer(recipe, tmp_path / "parts", checkpoint_every=2, stop_at=2)
    train_tokenizer(recipe, tmp_path / "parts", checkpoint_every=2)
    names = [tmp_path / part / "model.safetensors" for part in ("whole", "parts")]
    assert names[0].read_bytes() == names[1].read_bytes()
    assert [t["step"] for t in told] == [1, 2, 3, 4] and told[0]["stage"] == "pictures"
    train_tokenizer(replace(recipe, seed=1), tmp_path / "other", checkpoint_every=2)
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != names[0].read_bytes()


def test_vistok_train_trains_and_writes_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vistok.cli import train as command
    from vistok.cli.app import app

    monkeypatch.setattr(command, "find_recipe", lambda name: small_recipe(name))
    ran = CliRunner().invoke(app, ["train", "small", "--out", str(tmp_path / "out")])
    assert ran.exit_code == 0, ran.output
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`vistok train small` makes it again" in card and "| all | 4 |" in card and "| first 3 | 2 |" in card
    assert "4 steps of 4 pictures" in card and "(JPEG, quality 1)" in card
    model = vistok.load(tmp_path / "out", device="cpu")
    assert evaluate_tokenizer(model, 4).psnr > 0 and len(code_usage(model, 4)) == 1


def test_held_out_pictures_are_objects_and_photographs_in_turn() -> None:
    (batch,) = held_out(4, 32)
    (again,) = held_out(4, 32)
    (other,) = held_out(4, 32, seed=2)
    assert batch.shape == (4, 3, 32, 32) and 0 <= batch.min() and batch.max() <= 1
    assert torch.equal(batch, again) and not torch.equal(batch, other)


def test_jpeg_of_more_bytes_is_closer() -> None:
    (low, worse), (high, better) = (evaluate_jpeg(4, 32, most) for most in (600, 1100))
    assert low < high and worse.bytes < better.bytes and worse.psnr < better.psnr and better.bytes >= 1100


@pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.name)
def test_recipes_build(recipe: TokenizerRecipe) -> None:
    path = MODELS.parent / "recipes" / f"{recipe.name.replace('-', '_')}.py"
    assert path.is_file() and recipe.build().tokens > 0
    assert sum(p.numel() for p in recipe.build().parameters()) < 2e6  # 4 MB in half precision


@pytest.mark.parametrize("name", ALL)
def test_what_is_shipped_does_what_its_card_says(name: str) -> None:
    folder = MODELS / name
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert (folder / "model.safetensors").stat().st_size < 4e6
    card = (folder / "README.md").read_text()
    (told,) = re.findall(r"\| all \| \d+ \| ([\d.]+) \|", card)
    assert card.count(f"vistok train {name}") == 1
    found = evaluate_tokenizer(load(name, device="cpu"), 64, seed=2)
    assert found.psnr == pytest.approx(float(told), abs=1.2)
