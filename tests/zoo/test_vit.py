"""The small vision transformers: tasks tell the truth, training resumes to the byte, folders are timm's own."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from typer.testing import CliRunner

import vistok
from vistok.world import OBJECTS, derive_seed, make_object
from vistok.zoo import ModelNotFound, load, load_vit, shipped
from vistok.zoo.vit import build_vit, class_names, describe, save_vit, segment, to_pixels
from vistok.zoo.vit_evaluation import write_vit_card
from vistok.zoo.vit_tasks import (
    TASKS,
    Objects,
    Places,
    Scenes,
    confusion,
    fewer_patches,
    half_of_the_patches,
    mean_iou,
    patch_classes,
    recall,
)
from vistok.zoo.vit_training import Batches, Pace, ViTRecipe, fit, train_vit

RECIPES = ("vistok_vit", "vistok_vit_seg", "vistok_vit_place")


def small(classes: int = len(OBJECTS)) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=96, patch_size=16, embed_dim=48, depth=2, num_heads=2, num_classes=classes
    )


def small_recipe(**changes: object) -> ViTRecipe:
    pace = Pace(steps=4, batch_size=6, peak_lr=1e-3, warmup=1, sparse=3)
    recipe = ViTRecipe("small", Objects(), pace, small, "It is small.", held_out=8)
    return replace(recipe, **changes)


# Tasks ---------------------------------------------------------------------------------------------------------------


def test_a_batch_is_a_function_of_its_number() -> None:
    for task in TASKS.values():
        batches, again = Batches(task, 4, seed=3), Batches(task, 4, seed=3)
        assert torch.equal(batches[2].images, again[2].images)
        assert not torch.equal(batches[2].images, batches[1].images)
        test = task.draw(8, 4, seed=3, split="test")
        assert not torch.equal(batches[2].images, test.images)
        assert batches[2].images.shape == (4, 96, 96, 3) and batches[2].truth.shape == (4, 96, 96)


def test_patch_classes_by_brute_force() -> None:
    batch = Objects().draw(0, 18, seed=1)
    found = patch_classes(batch, 144).view(18, 12, 12)
    kinds = set()
    for row in range(18):
        picture = make_object(derive_seed(1, row))
        for y in range(12):
            for x in range(12):
                share = picture.things[0].mask[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].mean()
                label = picture.things[0].attributes["label"] + 1
                right = label if share >= 0.4 else 0 if share < 0.1 else -1
                assert found[row, y, x] == right
                kinds.add(min(right, 1))
    assert kinds == {-1, 0, 1}


def test_half_of_the_patches_holds_the_object() -> None:
    batch = Objects().draw(0, 18, seed=2)
    places = half_of_the_patches(batch, 144, torch.Generator().manual_seed(0))
    assert places.shape == (18, 72) and (places.diff(dim=1) > 0).all()
    for row in range(18):
        touched = {
            12 * y + x
            for y in range(12)
            for x in range(12)
            if batch.truth[row, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].any()
        }
        kept = set(places[row].tolist())
        assert touched <= kept or (len(touched) > 72 and kept <= touched)


def test_fewer_patches_are_the_rows_of_the_embedding() -> None:
    """Against the blocks called by hand on the rows that are left; after it the model is whole again."""
    model, pixels = small().eval(), torch.randn(2, 3, 96, 96)
    places = torch.tensor([[0, 3, 17], [5, 20, 35]])
    with torch.no_grad():
        whole = model(pixels)
        x = model._pos_embed(model.patch_embed(pixels))
        by_hand = torch.stack([x[row][[0, *(1 + places[row]).tolist()]] for row in range(2)])
        by_hand = model.forward_head(model.norm(model.blocks(by_hand)))
        with fewer_patches(model, places):
            assert torch.equal(model(pixels), by_hand)
        assert torch.equal(model(pixels), whole)


def test_mean_iou_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 3, (2, 40, 40))
    truth[truth == 2] = 0
    count = confusion(torch.from_numpy(truth), torch.from_numpy(found), 5)
    ious = [
        ((truth == c) & (found == c)).sum() / ((truth == c) | (found == c)).sum() for c in range(3)
    ]  # classes 3 and 4 never occur
    assert mean_iou(count) == pytest.approx(np.mean(ious))
    assert mean_iou(confusion(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]), 5)) == 1


def test_recall_by_brute_force() -> None:
    found = torch.nn.functional.normalize(torch.randn(20, 4, generator=torch.Generator().manual_seed(1)), dim=1)
    label = torch.arange(10).repeat_interleave(2)
    hits = {1: 0, 5: 0}
    for row in range(20):
        far = sorted((j for j in range(20) if j != row), key=lambda j: -float(found[row] @ found[j]))
        for k in hits:
            hits[k] += any(label[j] == label[row] for j in far[:k])
    assert recall(found, label) == pytest.approx({"recall@1": hits[1] / 20, "recall@5": hits[5] / 20})
    same = found.repeat_interleave(2, 0)
    assert recall(same, torch.arange(20).repeat_interleave(2))["recall@1"] == 1


def test_the_loss_of_places_draws_views_of_a_place_together() -> None:
    """Its value, against the formula written out."""
    task, batch, model = Places(), Places().draw(0, 6), small(0)
    with torch.no_grad():
        loss, _ = task.loss(model, batch)
        d = describe(model, to_pixels(batch.images))
    total = 0.0
    for row in range(6):
        others = [j for j in range(6) if j != row]
        cosine = torch.stack([d[row] @ d[j] for j in others]) / task.temperature
        (mate,) = [i for i, j in enumerate(others) if batch.label[j] == batch.label[row]]
        total -= cosine.log_softmax(0)[mate].item()
    assert loss.item() == pytest.approx(total / 6, rel=1e-4)
    with pytest.raises(ValueError, match="multiples of the 2 views"):
        task.draw(1, 4)


def test_scores_are_of_the_test_split() -> None:
    """A model that knows the truth of the test stream by heart scores 1, and 1 only there."""

    class Oracle(torch.nn.Module):
        def __init__(self, split: str) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            batch = Objects().draw(0, 18, seed=1, split=split)
            pixels = to_pixels(batch.images).flatten(1)
            self.known = dict(zip((p.sum().item() for p in pixels), batch.label.tolist(), strict=True))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            labels = [self.known.get(p.sum().item(), 0) for p in x.flatten(1)]
            return torch.nn.functional.one_hot(torch.tensor(labels), 18).float()

    assert Objects().score(Oracle("test"), 18) == {"accuracy": 1.0, "digits": 1.0, "shapes": 1.0}
    assert Objects().score(Oracle("train"), 18)["accuracy"] < 0.2


# Uses of the encoder -------------------------------------------------------------------------------------------------


def test_segment_is_the_head_on_every_patch() -> None:
    model, pixels = small(9).eval(), torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        logits = segment(model, pixels)
        rows = model.head(model.forward_features(pixels)[:, 1:])
    assert logits.shape == (2, 9, 96, 96)
    # the middle of a patch lies between its own logits and its neighbours'
    grid = rows.transpose(1, 2).unflatten(2, (6, 6))
    right = torch.nn.functional.interpolate(grid, size=(96, 96), mode="bilinear", align_corners=False)
    assert torch.equal(logits, right)


def test_segment_needs_every_patch() -> None:
    model, pixels = small(9).eval(), torch.randn(1, 3, 96, 96)
    with vistok.apply(model, "topk", keep=0.5, layers=(1,)), pytest.raises(ValueError, match="restore='nearest'"):
        segment(model, pixels)
    with vistok.apply(model, "topk", keep=0.5, layers=(1,), restore="nearest"):
        assert segment(model, pixels).shape == (1, 9, 96, 96)


@pytest.mark.parametrize("pooling", ["gem", "mean", "class"])
def test_descriptors(pooling: str) -> None:
    model, pixels = small(0).eval(), torch.randn(3, 3, 96, 96)
    with torch.no_grad():
        found = describe(model, pixels, pooling)  # type: ignore[arg-type]
        tokens = model.forward_features(pixels)
    assert torch.allclose(found.norm(dim=1), torch.ones(3))
    rows = tokens[:, 1:].double()
    right = {"class": tokens[:, 0], "mean": rows.mean(1), "gem": (rows.clamp(min=1e-6) ** 3).mean(1) ** (1 / 3)}[
        pooling
    ]
    assert torch.allclose(found.double(), right.double() / right.double().norm(dim=1, keepdim=True), atol=1e-5)
    with pytest.raises(ValueError, match="pooling"):
        describe(model, pixels, "max")  # type: ignore[arg-type]


def test_pixels() -> None:
    images = np.array([[[[0, 127, 255]]]], np.uint8)
    assert to_pixels(images).flatten().tolist() == pytest.approx([-1, 127 / 127.5 - 1, 1])
    assert to_pixels(images, small().half()).dtype == torch.float16
    with pytest.raises(ValueError, match=r"uint8 \(B, H, W, 3\)"):
        to_pixels(np.zeros((1, 3, 4, 4), np.uint8))


# Folders -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [len(OBJECTS), 0])
def test_a_saved_folder_is_timms_own(tmp_path: Path, classes: int) -> None:
    model, pixels = build_vit(classes).half().float().eval(), torch.randn(2, 3, 96, 96)
    save_vit(model, tmp_path / "vit", OBJECTS if classes else ())
    assert {path.name for path in (tmp_path / "vit").iterdir()} == {"config.json", "model.safetensors"}
    assert (tmp_path / "vit" / "model.safetensors").stat().st_size < 5e6
    with torch.no_grad():
        wanted = model(pixels)
        theirs = timm.create_model(f"local-dir:{tmp_path / 'vit'}", pretrained=True).eval()
        assert torch.equal(theirs(pixels), wanted)
        assert torch.equal(load_vit(tmp_path / "vit", device="cpu")(pixels), wanted)
        assert torch.equal(load(tmp_path / "vit", device="cpu")(pixels), wanted)
    assert class_names(tmp_path / "vit") == (list(OBJECTS) if classes else [])
    assert load_vit(tmp_path / "vit", dtype="bfloat16", device="cpu").head_drop is not None
    assert (len(model.blocks), model.num_prefix_tokens, model.patch_embed.num_patches) == (12, 1, 144)


def test_another_head_is_saved_as_it_is(tmp_path: Path) -> None:
    model = build_vit(len(OBJECTS))
    model.reset_classifier(9)
    assert load_vit(save_vit(model, tmp_path / "vit"), device="cpu").head.weight.shape[0] == 9


def test_folders_that_hold_no_vit(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="not a folder with a timm model"):
        load_vit("vistok-tiny")
    folder = save_vit(build_vit(3), tmp_path / "vit")
    with pytest.raises(ValueError, match="weights"):
        load(folder, weights="int8")
    told = json.loads((folder / "config.json").read_text())
    told["model_args"]["depth"] = 3
    (folder / "config.json").write_text(json.dumps(told))
    with pytest.raises(ModelNotFound, match="cannot be loaded"):
        load_vit(folder)


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "classes"), [(Objects(), 18), (Scenes(), 9), (Places(), 0)])
def test_a_few_steps_lower_the_loss(task: Objects | Scenes | Places, classes: int) -> None:
    class Once(type(task)):  # type: ignore[misc]
        """The same few pictures at every step."""

        def draw(self, start: int, n: int, **where: object):  # type: ignore[no-untyped-def]
            return super().draw(0, n, **where)

    model = small(classes)
    losses = fit(model, Once(), Pace(steps=12, batch_size=6, peak_lr=2e-3, warmup=1), dense=True, workers=0)
    assert len(losses) == 12 and losses[-1] < 0.8 * losses[0]
    assert not model.training


def test_equal_seeds_train_alike_with_a_method_in_the_model() -> None:
    found = []
    for seed in (0, 0, 1):
        model = small()
        with vistok.apply(model, "evit", keep=0.5, layers=(1,)):
            losses = fit(model, Objects(), Pace(steps=2, batch_size=4, warmup=1), seed=seed, workers=0)
        found.append((losses, model.head.weight.detach().clone()))
    assert found[0][0] == found[1][0] != found[2][0]
    assert torch.equal(found[0][1], found[1][1])


def test_a_loss_of_its_own_and_frozen_parts() -> None:
    model, asked = small(), []
    model.blocks.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def loss(net, batch):  # type: ignore[no-untyped-def]
        asked.append(len(batch.label))
        return net(to_pixels(batch.images)).square().mean(), torch.ones(())

    fit(model, Objects(), Pace(steps=2, batch_size=3, warmup=1), loss=loss, workers=0)
    assert asked == [3, 3]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("blocks."), name


def test_only_objects_are_learnt_on_half_of_the_patches() -> None:
    with pytest.raises(ValueError, match="sparse: got 1, must be 0 for scenes"):
        fit(small(9), Scenes(), Pace(steps=1, sparse=1))


def test_training_that_was_stopped_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    recipe, told = small_recipe(), []
    train_vit(recipe, tmp_path / "whole", on_step=told.append)
    train_vit(recipe, tmp_path / "parts", stop_at=2)
    train_vit(recipe, tmp_path / "parts")
    names = [tmp_path / part / "model.safetensors" for part in ("whole", "parts")]
    assert names[0].read_bytes() == names[1].read_bytes()
    assert [t["step"] for t in told] == [1, 2, 3, 4] and told[0]["stage"] == "objects"
    train_vit(replace(recipe, seed=1), tmp_path / "other")
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != names[0].read_bytes()


def test_vistok_train_trains_and_writes_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vistok.cli import train as command
    from vistok.cli.app import app

    monkeypatch.setattr(command, "find_recipe", lambda name: small_recipe(name=name))
    ran = CliRunner().invoke(app, ["train", "small-vit", "--out", str(tmp_path / "out"), "--steps", "2"])
    assert ran.exit_code == 0 and not (tmp_path / "out" / "README.md").exists()
    ran = CliRunner().invoke(app, ["train", "small-vit", "--out", str(tmp_path / "out")])
    assert ran.exit_code == 0, ran.output
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`vistok train small-vit` makes it again" in card and "| all |" in card and "| random 30% |" in card
    assert "objects: 4 steps of 6 pictures" in card


@pytest.mark.parametrize("task", [Scenes(), Places()])
def test_cards_of_the_other_tasks(tmp_path: Path, task: Scenes | Places) -> None:
    recipe = small_recipe(task=task, build=partial(small, len(task.classes)))
    card = write_vit_card(recipe, recipe.build().eval(), tmp_path, pictures=4).read_text()
    assert ("miou" in card) == (task.name == "scenes") and ("recall@1" in card) == (task.name == "places")


@pytest.mark.parametrize("module", RECIPES)
def test_recipes_are_found_by_their_names(module: str) -> None:
    recipe = import_module(f"vistok.zoo.recipes.{module}").RECIPE
    assert recipe.name == module.replace("_", "-")
    if module != "vistok_vit" and "vistok-vit" not in shipped("vit"):
        pytest.skip("it begins as vistok-vit, which is not shipped")
    model = recipe.build()
    assert model.num_classes == len(recipe.task.classes) and len(model.blocks) == 12
