"""FlexTok: causal registers, beginnings, its flow and guidance, and a teacher that leaves no trace."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch

from tests.tokenize.test_contract import SIZE, built, pictures
from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.parts.tokenizer import load_tokenizer
from vistok.parts.vision import FrozenVision
from vistok.tokenize.flextok import FlexTok, claim
from vistok.tokenize.vq_grid import VQGrid

SMALL = dict(
    size="T",
    tokens=6,
    image=SIZE,
    patch=4,
    levels=(5, 5, 4),
    unconditional=0.5,
    steps=3,
    guidance=2.0,
    teacher_dim=0,
    zero_init=False,
)
RECIPE = FlexTok(**SMALL)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def teacher():
    torch.manual_seed(1)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=12, depth=1, num_heads=2, num_classes=0
    )
    model.pretrained_cfg = model.pretrained_cfg | {"input_size": (3, 32, 32)}
    return FrozenVision(model)


@torch.no_grad()
def test_a_register_changes_itself_and_those_behind_it_only():
    model, x = built("flextok"), pictures()
    before = model.latents(x)
    model.registers[3] += torch.randn(96)
    changed = (model.latents(x) - before).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [False, False, False, True, True, True]


@torch.no_grad()
def test_patches_do_not_see_registers():
    model, x = built("flextok"), pictures()
    kept = []
    model.norm.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    model.blocks[-1].register_forward_hook(lambda _, given, out: kept.append(out[:, :16]))
    model.latents(x)
    before = kept[0].clone()
    model.registers.normal_()
    kept.clear()
    model.latents(x)
    assert torch.equal(kept[0], before)


@torch.no_grad()
def test_a_beginning_depends_on_its_own_tokens_only():
    model = built("flextok")
    ids = model.encode(pictures()).ids
    padded = torch.where(torch.arange(6) < 2, ids, -1)
    torch.testing.assert_close(model.decode_ids(padded), model.decode_ids(ids[:, :2]))
    other = torch.where(torch.arange(6) < 2, ids, (ids + 7) % 100)
    short = torch.tensor([2, 2, 2])
    shown = [model.condition(model.codes(given).z, short) for given in (ids, other)]
    assert torch.equal(*shown)


@torch.no_grad()
def test_one_step_along_the_true_velocity_is_the_picture():
    model, x = FlexTok(**SMALL | dict(steps=1, guidance=1.0)).build().eval(), pictures(1)
    model.decoder.forward = lambda noisy, t, told: model.noise(1) - model.data(x)
    torch.testing.assert_close(model.decode(model.encode(x)), x)


@torch.no_grad()
def test_the_noise_is_the_seeds_and_guidance_changes_the_picture():
    model = built("flextok")
    codes = model.encode(pictures())
    one = model.decode(codes)
    model.seed = 1
    assert not torch.allclose(model.decode(codes), one, atol=1e-3)
    model.seed = 0
    assert torch.equal(model.decode(codes), one)
    model.recipe = replace(model.recipe, guidance=1.0)
    assert not torch.allclose(model.decode(codes), one, atol=1e-4)


@torch.no_grad()
def test_a_new_decoder_gives_no_velocity_so_that_the_picture_is_the_noise():
    model = replace(RECIPE, zero_init=True).build().eval()
    made = model.decode(model.encode(pictures()))
    torch.testing.assert_close(made, model.pixels(model.noise(3)).clamp(0, 1))


def test_a_step_of_training_by_hand():
    """The objective against the same written out, picture by picture."""
    model, x = built("flextok").train(), pictures(4)
    torch.manual_seed(5)
    found = model.objective(x)
    torch.manual_seed(5)
    z = model.encode(x).z
    drawn = torch.randint(1, 7, (4,)).tolist()
    k = [min(1 << (d - 1).bit_length(), 6) for d in drawn]
    lost, t, noise = torch.rand(4) < 0.5, torch.randn(4).sigmoid(), torch.randn(4, 3, 16, 16)
    each = []
    for i in range(4):
        tokens = [model.back(z[i, j]) if j < k[i] else model.masked for j in range(6)]
        if lost[i]:
            tokens = [model.null] * 6
        told = (torch.stack(tokens) + model.positions)[None]
        data = 2 * x[i] - 1
        noisy = t[i] * noise[i] + (1 - t[i]) * data
        each.append((model.decoder(noisy[None], t[i : i + 1], told)[0] - (noise[i] - data)).square().mean())
    torch.testing.assert_close(found, torch.stack(each).mean())


def test_a_teacher_adds_its_term_and_is_not_saved(tmp_path):
    recipe = replace(RECIPE, teacher_dim=12)
    model, x = recipe.build(teacher=teacher()), pictures(4)
    torch.manual_seed(3)
    model.objective(x).backward()
    assert all(p.grad is not None for p in model.alignment.parameters())
    assert all(p.grad is None for p in model._teacher[0].parameters())
    with torch.no_grad():
        torch.manual_seed(3)
        with_it = model.objective(x)
        model._teacher = ()
        torch.manual_seed(3)
        assert 0 < float((with_it - model.objective(x)).detach()) <= 2
    other = load_tokenizer(model.eval().save(tmp_path))
    assert torch.equal(other.encode(x).ids, model.encode(x).ids)


def test_on_the_grid_of_a_frozen_tokenizer(tmp_path):
    vae = VQGrid("T", SIZE, 4, 32, 4, None).build()
    vae(pictures())
    model = replace(RECIPE, patch=8).build(vae)
    model.measure(pictures(8))
    assert model.train().vae.training is False and model.channels == 4
    torch.testing.assert_close(model.data(pictures(8)).std(), torch.tensor(1.0))
    whole = vae.eval()
    torch.testing.assert_close(model.pixels(model.data(pictures())).clamp(0, 1), whole.decode(whole.encode(pictures())))
    model.objective(pictures()).backward()
    assert all(p.grad is None for p in model.vae.parameters())
    other = load_tokenizer(model.eval().save(tmp_path))
    codes = model.encode(pictures())
    assert torch.equal(other.decode(other.encode(pictures())), model.decode(codes))


def test_refusals():
    vae = VQGrid("T", SIZE, 8, 32, 4, None).build()
    for make, message in (
        (lambda: FlexTok("XL").build(), "size: got 'XL', must be one of T, d12-d12"),
        (lambda: replace(RECIPE, patch=5).build(), "patch: got 5, must divide image, 16"),
        (lambda: RECIPE.build(vae), "patch: got 4, must be a multiple of the vae's 8 pixels a cell"),
        (lambda: replace(RECIPE, image=32).build(vae), "vae: must have a grid and take pictures of 32 pixels"),
        (lambda: RECIPE.build(teacher=teacher()), "teacher: has features of 12 channels, must have teacher_dim, 0"),
        (lambda: RECIPE.build().measure(pictures()), "vae: got None"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_claim():
    outcome = claim(TokenizeTrial(pictures=2, size=16), steps=1, noises=2)
    assert outcome.metric == "PSNR of 4 of 16 tokens, dB" and outcome.note.count("dB") == 5
