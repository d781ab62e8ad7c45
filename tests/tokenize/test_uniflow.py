"""UniFlow: patches are drawn each from its own condition, and the encoder is held to what it was."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import timm
import torch

from tests.tokenize.test_contract import SIZE, built, pictures
from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.core.flow import NOISE_FIRST, power_schedule
from vistok.parts.flow_decoder import fat_logit_normal
from vistok.parts.tokenizer import load_tokenizer
from vistok.tokenize.uniflow import UniFlow, claim, dispersive, layerwise_distillation

SMALL = dict(size="T", image=SIZE, patch=4, dim=8, global_depth=1, head_depth=2, steps=2, parity="authors")
RECIPE = UniFlow(**SMALL)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def vit(depth=4):
    torch.manual_seed(7)
    return timm.models.VisionTransformer(16, 4, 3, 0, "token", 96, depth, 3)


@torch.no_grad()
def test_patches_are_channel_row_column_and_come_back():
    model, x = built("uniflow"), pictures()
    rows = model.rows(x).view(3, 16, 3, 4, 4)
    assert torch.equal(rows[1, 6], x[1, :, 4:8, 8:12])
    assert torch.equal(model.unrows(model.rows(x)), x)


@torch.no_grad()
def test_begins_with_a_velocity_of_zero_and_as_released_not():
    paper = replace(RECIPE, parity="paper").build().eval()
    made = paper.decode(paper.encode(pictures()))
    torch.testing.assert_close(made, paper.pixels(paper.noise(3)).clamp(0, 1))
    authors = RECIPE.build().eval()
    assert authors.head.out.weight.std() > 0.01 and not authors.head.out.bias.any()
    assert not torch.allclose(authors.decode(authors.encode(pictures())), made, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 7])
def test_the_true_velocity_leads_to_the_picture(steps):
    model, x = replace(RECIPE, steps=steps, power=2.0).build().eval(), pictures(1)
    model.head.forward = lambda rows, t, cond: model.rows(model.data(x) - model.noise(1))
    torch.testing.assert_close(model.decode(model.encode(x)), x)
    steps_taken = [a - b for a, b in zip(power_schedule(7, 2.0)[:-1], power_schedule(7, 2.0)[1:], strict=True)]
    assert sum(steps_taken) == pytest.approx(1) and len(set(steps_taken)) == 7


@torch.no_grad()
def test_guidance_only_inside_its_interval():
    model = built("uniflow")
    codes = model.encode(pictures())
    plain = model.decode(codes)
    model.recipe = replace(model.recipe, guidance=3.0)
    assert not torch.allclose(model.decode(codes), plain, atol=1e-4)
    model.recipe = replace(model.recipe, interval=(0.6, 1.0))  # the two steps are at times 0 and 0.5
    torch.testing.assert_close(model.decode(codes), plain)


def test_distillation_weights():
    same = [torch.randn(2, 5, 4) for _ in range(3)]
    loss, weights = layerwise_distillation(same, same, 2.0)
    assert float(loss) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(weights, torch.tensor([1, 2, 3]) / 6)
    teachers = [torch.randn(2, 5, 4) for _ in range(3)]
    loss, weights = layerwise_distillation(same, teachers, 0.0)
    torch.testing.assert_close(weights, torch.tensor([1, 2, 3]) / 6)
    away = [1 - torch.cosine_similarity(s, t, dim=-1).mean().item() for s, t in zip(same, teachers, strict=True)]
    raw = [(i + 1) / 3 * math.exp(1.5 * a) for i, a in enumerate(away)]
    loss, weights = layerwise_distillation(same, teachers, 1.5)
    assert weights.tolist() == pytest.approx([r / sum(raw) for r in raw], rel=1e-5)
    assert float(loss) == pytest.approx(sum(r * a for r, a in zip(raw, away, strict=True)) / sum(raw), rel=1e-5)
    worse = [teachers[0], -same[1], teachers[2]]
    assert layerwise_distillation(same, worse, 1.5)[1][1] > weights[1]


def test_dispersive_by_hand():
    z = torch.randn(3, 2, 4)
    pairs = [math.exp(-float((a - b).square().sum()) / 8) for a in z for b in z]
    assert float(dispersive(z)) == pytest.approx(math.log(sum(pairs) / 9), rel=1e-5)
    z.requires_grad_()
    dispersive(z).backward()
    assert z.grad.abs().sum() > 0
    model = replace(RECIPE, dispersive=1.0).build()
    torch.manual_seed(1)
    with_it = model.objective(pictures())
    model.recipe = RECIPE
    torch.manual_seed(1)
    assert float((with_it - model.objective(pictures())).detach()) < 0


def test_a_pretrained_encoder_is_its_own_teacher(tmp_path):
    given = vit()
    model, x = RECIPE.build(given).train(), pictures(4)
    want = given.eval().forward_features(2 * x - 1)[:, 1:]
    torch.testing.assert_close(model.features(x), want)
    torch.manual_seed(1)
    loss = model.objective(x).detach()
    with torch.no_grad():
        for p in model.encoder.blocks.parameters():
            p.add_(0.05 * torch.randn_like(p))
    torch.manual_seed(1)
    moved = model.objective(x)
    moved.backward()
    (teacher,) = model._teacher
    assert torch.equal(teacher.blocks[0].mlp.fc1.weight, given.blocks[0].mlp.fc1.weight)
    assert all(p.grad is None for p in teacher.parameters())
    _, layers = model._layers(model.encoder, x)
    away, _ = layerwise_distillation(layers, model._layers(teacher, x)[1], 1.0)
    assert float(away.detach()) > 1e-3
    model._teacher = ()
    torch.manual_seed(1)
    torch.testing.assert_close(moved.detach() - away.detach(), model.objective(x).detach())
    assert loss.isfinite()
    other = load_tokenizer(model.eval().save(tmp_path))
    assert torch.equal(other.encode(x).z, model.encode(x).z) and other._teacher == ()


def test_a_step_of_training_by_hand():
    model, x = replace(RECIPE, unconditional=0.5).build().train(), pictures(2)
    torch.manual_seed(3)
    found = model.objective(x)
    torch.manual_seed(3)
    lost, t = torch.rand(32, 1) < 0.5, fat_logit_normal(32)
    noise, rows = torch.randn(32, 48), model.rows(2 * x - 1)
    told = model.condition(model.latents(x)).flatten(0, 1)
    each = []
    for i in range(32):
        noisy = (1 - t[i]) * noise[i] + t[i] * rows[i]
        v = model.head(noisy[None], t[i : i + 1], told[i : i + 1] * ~lost[i])
        each.append((v[0] - (rows[i] - noise[i])).square().mean())
    torch.testing.assert_close(found, torch.stack(each).mean())
    assert model.flow == NOISE_FIRST


def test_refusals():
    with pytest.raises(ValueError, match="size: got 'S', must be one of T, L"):
        UniFlow("S").build()
    with pytest.raises(ValueError, match="pretrained: must be a plain ViT of this size"):
        RECIPE.build(vit(depth=2))


def test_claim():
    outcome = claim(TokenizeTrial(pictures=2, size=16), steps=1)
    assert outcome.metric == "objects named right by the features" and "before" in outcome.note
