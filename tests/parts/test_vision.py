"""The frozen vision transformer of tokenizers."""

from __future__ import annotations

import pytest
import timm
import torch

from vistok.parts.vision import FrozenVision


def small():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=3)


def test_it_gives_what_the_model_gives_and_learns_nothing():
    model = small().eval()
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    vision = FrozenVision(model, prefix=True).train()
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    assert torch.equal(vision(x), model.forward_features((x - 0.5) / 0.25))
    patches = FrozenVision(model)
    assert torch.equal(patches(x), vision(x)[:, 1:]) and patches.grid == (4, 4) and patches.dim == 12
    assert patches(torch.rand(1, 3, 20, 24)).shape == (1, 16, 12)
    patches(x).sum().backward()
    assert x.grad is not None and not vision.model.training
    assert all(p.grad is None for p in vision.parameters())


def test_one_is_made_from_its_name_and_goes_through_a_state():
    torch.manual_seed(0)
    told = dict(img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=3)
    vision = FrozenVision.of("vit_tiny_patch16_224", prefix=True, **told)
    x = torch.rand(2, 3, 20, 24)
    assert vision.size == (32, 32) and vision(x).shape == (2, 17, 12) and vision.model.num_classes == 0
    vision.mean += 0.25
    other = FrozenVision.of("vit_tiny_patch16_224", prefix=True, **told)
    other.load_state_dict(vision.state_dict())
    assert torch.equal(other(x), vision(x))
    for name, message in (("vit_no_such", "must be a model of timm, e.g. "), ("resnet18", "no patch tokens")):
        with pytest.raises(ValueError, match=message):
            FrozenVision.of(name)
