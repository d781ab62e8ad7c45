"""What claims of the vit family are measured with: figures against brute force, and the method is in the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import vistok
from vistok.bench.vit_trial import IN_OBJECT, MaskScore, ViTTrial, mask_share
from vistok.world import derive_seed, make_object
from vistok.zoo.vit import save_vit, to_pixels
from vistok.zoo.vit_tasks import Objects, Places, Scenes


def small(classes: int) -> Any:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=96, patch_size=16, embed_dim=48, depth=3, num_heads=2, num_classes=classes
    ).eval()


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> ViTTrial:
    folder = tmp_path_factory.mktemp("models")
    names: list[Path] = [save_vit(small(n), folder / str(n)) for n in (18, 9, 0)]
    return ViTTrial(12, 0, *map(str, names))


def test_mask_share() -> None:
    inside = torch.tensor([True, True, False, False, True, False])
    assert mask_share(inside, torch.tensor([0, 2, 4])).tolist() == pytest.approx([2 / 3, 2 / 3, 1 / 2])
    assert mask_share(inside, torch.tensor([], dtype=torch.int64)).tolist() == [0, 0, 0.5]


def test_mask_score_by_brute_force(trial: ViTTrial) -> None:
    found = trial.mask_score("topk", 0.5, layers=(0, 2))
    precision, recall, chance = [], [], []
    for number in range(12):
        picture = make_object(derive_seed(1, number, "test"))
        with torch.no_grad(), vistok.apply(trial.classifier, "topk", keep=0.5, layers=(0, 2)) as session:
            trial.classifier(to_pixels(picture.image[None]))
            kept = set(session.pictures[0].keep.tolist())
        mask = picture.things[0].mask
        inside = {
            6 * y + x
            for y in range(6)
            for x in range(6)
            if mask[16 * y : 16 * y + 16, 16 * x : 16 * x + 16].mean() >= IN_OBJECT
        }
        assert len(kept) == 9
        precision.append(len(kept & inside) / 9)
        recall.append(len(kept & inside) / len(inside))
        chance.append(len(inside) / 36)
    right = [sum(values) / 12 for values in (precision, recall, chance)]
    assert [found.precision, found.recall, found.chance] == pytest.approx(right)
    assert found.accuracy == pytest.approx(trial.accuracy("topk", 0.5, layers=(0, 2)))


def test_keeping_all_is_the_plain_model(trial: ViTTrial) -> None:
    assert trial.accuracy("topk", 1.0, layers=(0,)) == trial.accuracy()
    assert trial.miou("topk", 1.0, layers=(0,)) == trial.miou()
    assert trial.recall("topk", 1.0, layers=(0,)) == trial.recall()
    whole = trial.mask_score("topk", 1.0, layers=(0,))
    assert whole == MaskScore(whole.chance, 1.0, whole.chance, pytest.approx(trial.accuracy()))


def test_figures_are_those_of_the_tasks(trial: ViTTrial) -> None:
    assert trial.accuracy() == Objects().score(trial.classifier, 12)["accuracy"]
    assert trial.miou() == Scenes().score(trial.segmenter, 12)["miou"]
    assert trial.recall(k=5, pooling="mean") == Places(pooling="mean").score(trial.finder, 12)["recall@5"]
    other = small(18)
    torch.nn.init.zeros_(other.head.weight)
    torch.nn.init.constant_(other.head.bias[3:4], 1.0)
    share = sum(derive_seed(1, number, "test") % 18 == 3 for number in range(12)) / 12
    assert trial.accuracy(model=other) == pytest.approx(share)
    with pytest.raises(ValueError, match="k: got 2"):
        trial.recall(k=2)


def test_the_method_is_in_the_model(trial: ViTTrial, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call with a method goes through vistok.apply with its arguments, and leaves the model plain."""
    from vistok.bench import vit_trial

    seen: list[tuple[Any, Any, dict[str, Any]]] = []
    true = vit_trial.apply

    def watched(model: Any, method: Any, keep: Any = None, **hyper: Any) -> Any:
        seen.append((method, keep, hyper))
        return true(model, method, keep=keep, **hyper)

    monkeypatch.setattr(vit_trial, "apply", watched)
    trial.accuracy("topk", 0.5, layers=(1,))
    trial.miou("topk", 0.5, layers=(1,))
    trial.recall("topk", 0.5, layers=(1,))
    method = vistok.create("topk", keep=0.5, layers=(1,))
    assert trial.milliseconds(method, batch=2, repeats=2) > 0
    trial.fit(trial.fresh(), 1, method=method, batch_size=2)
    assert seen == [
        ("topk", 0.5, {"layers": (1,)}),
        ("topk", 0.5, {"layers": (1,), "restore": "nearest"}),
        ("topk", 0.5, {"layers": (1,)}),
        *[(method, None, {})] * 4,
    ]
    assert trial.classifier.forward_features(torch.zeros(1, 3, 96, 96)).shape[1] == 37


def test_training_takes_a_copy(trial: ViTTrial) -> None:
    before = trial.classifier.head.weight.clone()
    model = trial.fresh()
    losses = trial.fit(model, 2, batch_size=4, dense=True)
    assert len(losses) == 2 and not torch.equal(model.head.weight, before)
    assert torch.equal(trial.classifier.head.weight, before)
    assert trial.fit(trial.fresh(), 2, batch_size=4) == trial.fit(trial.fresh(), 2, batch_size=4)
    assert trial.fit(trial.fresh(), 2, batch_size=4) != trial.fit(trial.fresh(), 2, batch_size=4, seed=5)
    assert len(trial.fit(trial.fresh(Places()), 1, task=Places(), batch_size=4)) == 1
