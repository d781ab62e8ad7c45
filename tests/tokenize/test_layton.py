"""Layton: the consistency function's boundary and oracle, gradients through its steps, and its two stages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.tokenize.test_contract import SIZE, built, pictures
from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.parts.tokenizer import load_tokenizer
from vistok.tokenize.layton import Layton, claim, colour_error
from vistok.tokenize.vq_grid import VQGrid

SMALL = dict(
    size="T",
    image=SIZE,
    view=8,
    view_patch=2,
    patch=4,
    codes=32,
    dim=4,
    restart_after=3,
    diffusion_steps=3,
    zero_init=False,
)
RECIPE = Layton(**SMALL)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@torch.no_grad()
def test_the_boundary_is_exact():
    model, x = built("layton"), torch.randn(3, 3, SIZE, SIZE)
    told = torch.randn(3, 16, 96)
    assert torch.equal(model.consistency_step(x, torch.zeros(3), told), x)
    t = torch.tensor([0.2, 0.5, 1.0])
    by_hand = x - t[:, None, None, None] * model.decoder(x, t, told)
    torch.testing.assert_close(model.consistency_step(x, t, told), by_hand)


@torch.no_grad()
def test_with_the_true_velocity_one_step_is_two_steps_from_any_time():
    model, clean = built("layton"), torch.randn(2, 3, SIZE, SIZE)
    noise = torch.randn(2, 2, 3, SIZE, SIZE)

    def oracle(x, t, told):
        return (x - clean) / t[:, None, None, None]

    model.decoder.forward = oracle
    for t in (0.1, 0.6, 1.0):
        at = torch.full((2,), t)
        found = model.consistency_step(model.flow.mix(clean, noise[0], at), at, None)
        torch.testing.assert_close(found, clean, atol=1e-5, rtol=1e-4)
    for steps in (1, 2):
        torch.testing.assert_close(model.consistent(None, noise, steps), clean, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_two_steps_put_other_noise_in_between():
    model = built("layton")
    codes = model.encode(pictures())
    one = model.decode(codes)
    model.recipe = replace(model.recipe, steps=2)
    told, noise = model.condition(codes.z), [model.noise(3, turn) for turn in (0, 1)]
    assert not torch.equal(*noise) and torch.equal(noise[0], model.noise(3))
    x = model.consistency_step(noise[0], torch.ones(3), told)
    half = torch.full((3,), 0.5)
    x = model.consistency_step((x + noise[1]) / 2, half, told)
    torch.testing.assert_close(model.decode(codes), ((x + 1) / 2).clamp(0, 1))
    assert not torch.allclose(model.decode(codes), one, atol=1e-4)
    model.seed = 1
    model.recipe = RECIPE
    assert not torch.allclose(model.decode(codes), one, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2])
def test_pixels_have_a_gradient_at_the_codes_and_the_encoder(steps):
    model = replace(RECIPE, steps=steps).build().train()
    made, codes = model(pictures())
    (grad,) = torch.autograd.grad((made - pictures()).square().mean(), codes.z, retain_graph=True)
    assert bool((grad.abs().sum(2) > 0).all())
    made.sum().backward()
    assert model.embed.weight.grad.abs().sum() > 0


def test_stages(tmp_path):
    model, x = replace(RECIPE, stage=1).build().train(), pictures(4)
    torch.manual_seed(2)
    first = model.objective(x)
    torch.manual_seed(2)
    codes, t, noise = model.encode(x), torch.rand(4), torch.randn(4, 3, SIZE, SIZE)
    mixed = t[:, None, None, None] * noise + (1 - t[:, None, None, None]) * (2 * x - 1)
    error = (model.decoder(mixed, t, model.condition(codes.z)) - (noise - (2 * x - 1))).square().mean()
    torch.testing.assert_close(first, error + codes.loss)
    assert not model(x)[0].requires_grad
    model.begin_second_stage()
    torch.manual_seed(2)
    assert model(x)[0].requires_grad and float((model.objective(x) - first).detach()) > 0
    other = load_tokenizer(model.eval().save(tmp_path))
    assert other.recipe.stage == 2 and torch.equal(other.decode(other.encode(x)), model.decode(model.encode(x)))


def test_a_perceptual_loss_counts_in_the_second_stage():
    torch.manual_seed(0)
    model, x = RECIPE.build(network=lambda pictures: [pictures, pictures[:, :, ::2]]), pictures(4)
    found = []
    for weight in (0.0, 1.0):
        model.recipe = replace(RECIPE, perceptual_weight=weight)
        torch.manual_seed(2)
        found.append(float(model.objective(x).detach()))
    assert found[1] > found[0]


def test_on_the_grid_of_a_frozen_tokenizer():
    vae = VQGrid("T", SIZE, 4, 32, 4, None).build()
    vae(pictures())
    model = RECIPE.build(vae).train()
    model.objective(pictures(4)).backward()
    assert model.embed.weight.grad.abs().sum() > 0 and all(p.grad is None for p in model.vae.parameters())
    assert model.eval().decode(model.encode(pictures())).shape == (3, 3, SIZE, SIZE)


@torch.no_grad()
def test_colour_error_by_hand():
    model = built("layton")
    model.consistent = lambda told, noise, steps: torch.zeros(len(told), 3, SIZE, SIZE)  # grey
    rng = torch.Generator().manual_seed(4)
    colours = torch.rand(64, 3, 1, 1, generator=rng)
    assert colour_error(model, 4) == pytest.approx(float((colours - 0.5).abs().mean()), rel=1e-5)


def test_refusals():
    for how, message in (
        (dict(size="XL"), "size: got 'XL', must be one of T, B"),
        (dict(view_patch=3), "view_patch: got 3, must divide view, 8"),
        (dict(stage=3), "stage: got 3, must be 1 or 2"),
        (dict(steps=4), "steps: got 4, must be 1 or 2"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(RECIPE, **how).build()


def test_claim():
    outcome = claim(TokenizeTrial(pictures=2, size=16), steps=1)
    assert outcome.metric == "error of the mean colour" and outcome.note.startswith("PSNR")
