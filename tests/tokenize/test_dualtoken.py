"""DualToken: which layer feeds what, which loss reaches what, stacks of codes, and the transformer that runs on."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from tests.tokenize.test_contract import SIZE, built, pictures
from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.core.losses import distillation
from vistok.parts.quantize import EMAQuantizer, Residual
from vistok.parts.tokenizer import load_tokenizer
from vistok.parts.vision import FrozenVision
from vistok.tokenize._dual import hidden
from vistok.tokenize.dualtoken import DualToken, claim, pooled

SIGLIP = "vit_base_patch16_siglip_224"
VISION = dict(img_size=SIZE, patch_size=4, embed_dim=24, depth=4, num_heads=3)
SMALL = dict(
    image=SIZE,
    vision=SIGLIP,
    vision_arguments=VISION,
    layer_semantic=3,
    layer_pixel=2,
    layer_shortcut=1,
    depth=2,
    codes=32,
    dim=4,
    heads=6,
    latent=16,
    width=8,
    mults=(1, 1, 2),
    blocks=1,
    restart_after=3,
)
RECIPE = DualToken(**SMALL)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def vision():
    return FrozenVision.of(SIGLIP, **VISION)


def reached(model, loss):
    """The parts of the model that a loss teaches; of the transformer by block."""
    model.zero_grad()
    loss.backward(retain_graph=True)
    found = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    return {".".join(name.split(".")[: 4 if "blocks" in name else 2]) for name in found}


def test_losses_reach_their_own_side_only():
    seen = vision()
    model = RECIPE.build(seen, copy.deepcopy(seen)).train()
    codes = model.encode(pictures(4))
    stacks = [s.stages[0] for s in model.bottleneck.books]
    pixels = reached(model, model.render(codes.z).square().mean())
    assert {"downs.pixel", "downs.shortcut", "ups.pixel", "decoder.first", "vision.model.blocks.1"} <= pixels
    assert not any(
        "semantic" in name or "blocks.2" in name or "blocks.3" in name for name in pixels if "vision" in name
    )
    assert not any(name.endswith("semantic") for name in pixels)
    features = model.features(codes.z)
    meaning = reached(model, model.pooled(features).square().mean())
    assert {"downs.semantic", "ups.semantic", "vision.model.blocks.2", "vision.model.blocks.3"} <= meaning
    assert not any(name.startswith("decoder") or "pixel" in name or "shortcut" in name for name in meaning)
    assert all(not isinstance(s.codebook, torch.nn.Parameter) for s in stacks)


@torch.no_grad()
def test_what_each_layer_feeds():
    seen, x = vision(), pictures(2)
    model = RECIPE.build(seen).eval()
    one, two, three = hidden(seen, x, [1, 2, 3])
    downs = model.downs
    looks = downs["pixel"](two) + 0.6 * downs["shortcut"](one)
    torch.testing.assert_close(model.latents(x), torch.cat([downs["semantic"](three), looks], -1))
    model.recipe = replace(RECIPE, weight_shortcut=0.0)
    torch.testing.assert_close(model.latents(x)[..., 4:], downs["pixel"](two))


@torch.no_grad()
def test_the_transformer_runs_on_from_the_layer():
    """With its own features in place of codes it is the whole transformer, pooling included."""
    seen, x = vision(), pictures(2)
    model = RECIPE.build(seen).eval()
    whole = seen.model((x - seen.mean) / seen.std)
    torch.testing.assert_close(model.pooled(hidden(seen, x, [3])[0]), whole)
    plain = FrozenVision.of("vit_tiny_patch16_224", **VISION)
    x = hidden(plain, x, [3])[0]
    torch.testing.assert_close(pooled(plain, x, 3), plain.model.norm(plain.model.blocks[3](x)).mean(1))


@torch.no_grad()
def test_fewer_codes_are_the_partial_sums():
    model = built("dualtoken", depth=3)
    codes = model.encode(pictures())
    assert codes.ids.shape == (3, 16, 6) and codes.bits.tolist() == [16 * 6 * 5] * 3
    for i, stack in enumerate(model.bottleneck.books):
        ids, table = codes.ids[..., 3 * i : 3 * i + 3], stack.stages[0].codebook
        sums = stack.partial_sums(ids)
        for k in range(3):
            torch.testing.assert_close(sums[k], sum(table[ids[..., d]] for d in range(k + 1)))
            torch.testing.assert_close(stack.ids_to_z(ids[..., : k + 1]), sums[k])
        torch.testing.assert_close(codes.z[..., 4 * i : 4 * i + 4], sums[-1])


@torch.no_grad()
def test_error_falls_with_depth_where_a_code_may_change_nothing():
    table = EMAQuantizer(32, 4, restart_after=None)
    table.codebook[0] = 0
    stack, z = Residual([table], 5).eval(), torch.randn(2, 9, 4)
    left = [float((z - s).square().sum()) for s in stack.partial_sums(stack(z).ids)]
    assert left == sorted(left, reverse=True)


@torch.no_grad()
def test_without_memory_codes_are_the_means_of_their_vectors_and_unused_ones_zero():
    table = EMAQuantizer(32, 4, decay=0.0, restart_after=None)
    z = torch.randn(1, 40, 4)
    ids = table(z).ids[0]
    table.update()
    for k in range(32):
        own = z[0, ids == k]
        torch.testing.assert_close(table.codebook[k], own.mean(0) if len(own) else torch.zeros(4), atol=1e-3, rtol=1e-3)


def test_stages_by_hand():
    seen, x = vision(), pictures(4)
    for stage in (0, 1):
        model = replace(RECIPE, stage=stage).build(seen).eval()
        codes = model.encode(x)
        wanted = hidden(seen, x, [3])[0]
        features = model.features(codes.z)
        whole = distillation(model.pooled(features), pooled(seen, wanted, 3), "both")
        own = 5 * whole if stage == 0 else 5 * distillation(features, wanted, "both") + whole
        pixels = 5 * (model.render(codes.z) - x).square().mean()
        quantised = 5 * sum(
            torch.stack([(part - s.detach()).square().mean() for s in stack.partial_sums(ids)]).mean()
            for part, stack, ids in zip(
                model.latents(x).split(4, -1), model.bottleneck.books, codes.ids.split(2, -1), strict=True
            )
        )
        torch.testing.assert_close(model.objective(x), pixels + own + quantised)


def test_a_teacher_lets_the_transformer_learn_and_is_not_saved(tmp_path):
    seen = vision()
    teacher = copy.deepcopy(seen)
    model, x = RECIPE.build(seen, teacher), pictures(4)
    model.objective(x).backward()
    assert all(p.grad is not None for p in model.vision.parameters())
    assert all(p.grad is None for p in (*teacher.parameters(), *seen.parameters()))
    other = load_tokenizer(model.eval().save(tmp_path))
    assert torch.equal(other.encode(x).ids, model.encode(x).ids)


@torch.no_grad()
def test_a_grid_that_is_not_the_decoders_is_resized():
    model = replace(RECIPE, vision_arguments=VISION | dict(img_size=20)).build().eval()
    assert model.decode(model.encode(pictures())).shape == (3, 3, SIZE, SIZE) and model.tokens == 25


def test_refusals():
    with pytest.raises(ValueError, match="stage: got 2, must be 0 or 1"):
        replace(RECIPE, stage=2).build()
    with pytest.raises(ValueError, match=r"layers: got \(9, 2, 1\), must be between 1 and the 4 blocks"):
        replace(RECIPE, layer_semantic=9).build().encode(pictures())


def test_claim():
    outcome = claim(TokenizeTrial(pictures=2, size=16), steps=1, codes=8)
    assert outcome.note.endswith("1728 and 1728 bits a picture")
