"""The contract of the systems that are built and trained: every one in the registry, each as a small network."""

from __future__ import annotations

import inspect

import pytest
import torch
from safetensors.torch import load, save
from torch.utils._pytree import tree_leaves

import vistok
from tests.vit.made_trial import tiny_vit
from vistok.catalogue import methods
from vistok.vit.patch_scaling import small_adventurer

SIZE = 96
TEXT = 6
NAMES = [card.slug for card in methods("vit") if hasattr(vistok.create(card.slug), "build")]
SMALL = {
    "lookupvit": dict(image=SIZE, patch=16, dim=24, depth=3, heads=3, sizes=(2, 3)),
    "stvit-supertoken": dict(dims=(8, 8, 12, 12), depths=(1,) * 4, heads=(1, 1, 2, 2), projection=16),
    "top-vim": dict(image=SIZE, patch=16, dim=16, depth=4, prune_after=(0, 1, 2)),
    "patch-scaling": dict(model_fn=small_adventurer, patch_sizes=(16,), size=SIZE),
    "stvit-semantic": dict(window=4),
    "bus": dict(summary=4, decoder_layers=1),
    "dtop": dict(dim=24, num_heads=3, decoder_layers=1, p0=0.5),
}  # fmt: skip
"""Hyper-parameters of a small network, where the defaults make a large one; the ViTs around which others are built are
small already."""
BUILT_FOR = {"num_classes": 5, "patch": 16, "text_dim": TEXT}
"""What ``build`` is given besides a ViT."""
AROUND = [n for n in NAMES if {"vit", "backbone"} & set(inspect.signature(vistok.create(n).build).parameters)]
every = pytest.mark.parametrize("name", NAMES)


def vit():
    return tiny_vit(img_size=SIZE, patch_size=8, embed_dim=24, depth=12, num_heads=3)


def built(name, around=None, seed=0):
    """The system's network, in evaluation mode."""
    system = vistok.create(name, **SMALL.get(name, {}))
    wanted = inspect.signature(system.build).parameters
    given = [around if around is not None else vit()] if {"vit", "backbone"} & set(wanted) else []
    torch.manual_seed(seed)
    return system.build(*given, **{n: value for n, value in BUILT_FOR.items() if n in wanted}).eval()


def pictures(count=3):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(count))


def run(model, x):
    """All float tensors of what the model gives, a row a picture."""
    text = {"text": torch.randn(8, TEXT, generator=torch.Generator().manual_seed(0))[: len(x)]}
    found = model(x, **(text if "text" in inspect.signature(model.forward).parameters else {}))
    found = getattr(found, "map", found)  # of a segmenter with exits
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


@every
def test_rows_do_not_see_one_another(name):
    model, x = built(name), pictures()
    with torch.no_grad():
        together, alone = run(model, x), [run(model, x[i : i + 1]) for i in range(1)]
    for whole, one in zip(together, alone[0], strict=True):
        assert len(whole) == 3
        torch.testing.assert_close(whole[:1], one, atol=1e-4, rtol=1e-3)


@every
def test_the_same_seed_builds_the_same_network(name):
    one, same, other = (dict(built(name, seed=seed).named_parameters()) for seed in (0, 0, 1))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


@every
def test_weights_go_through_safetensors(name):
    """A network of other weights gives the same after loading them."""
    model, other, x = built(name), built(name, seed=1), pictures(2)
    other.load_state_dict(load(save({key: value.clone() for key, value in model.state_dict().items()})))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(run(model, x), run(other, x), strict=True))


@every
def test_what_is_to_be_trained_gets_a_gradient_and_nothing_else(name):
    model = built(name).train()
    sum(out.float().square().sum() for out in run(model, pictures(4))).backward()
    learned = [p for p in model.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert learned and all(p.requires_grad and torch.isfinite(p.grad).all() for p in learned)


@pytest.mark.parametrize("name", AROUND)
def test_the_vit_that_it_is_built_around_stays_as_it_was(name):
    around = vit()
    before = {key: value.clone() for key, value in around.state_dict().items()}
    x = pictures(2)
    with torch.no_grad():
        plain = around(x)
    model = built(name, around).train()
    sum(out.float().sum() for out in run(model, pictures(2))).backward()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
        assert torch.equal(around.eval()(x), plain)
    after = around.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in around.modules())
    assert all(p.grad is None and p.requires_grad for p in around.parameters())


@every
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_picture_of_one_colour_gives_numbers(name, value):
    with torch.no_grad():
        for out in run(built(name), torch.full((2, 3, SIZE, SIZE), value)):
            assert torch.isfinite(out[~torch.isneginf(out)]).all()
