"""Ming-UniVision: causal expansion with a cache, finer tokens, normalised latents, and the flow head."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.tokenize.test_contract import SIZE, built, pictures
from tests.tokenize.test_flextok import teacher
from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.core.flow import MING
from vistok.parts.diffusion_transformer import unpatch
from vistok.parts.flow_head import LatentHead
from vistok.parts.tokenizer import load_tokenizer
from vistok.tokenize.ming_univision import MingUniVision, claim, generate

SMALL = dict(size="T", image=SIZE, patch=4, finer=2, dim=8, teacher_dim=0, head_width=16, head_depth=2)
RECIPE = MingUniVision(**SMALL)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * 16, [3, 1, 12]])
def test_expanding_with_the_cache_is_expanding_at_once(pieces):
    model, z = built("ming-univision"), torch.randn(2, 16, 8)
    whole, _ = model.expand(z)
    found, past = [], None
    for piece in z.split(pieces, 1):
        features, past = model.expand(piece, past)
        found.append(features)
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_latent_changes_features_from_its_own_on():
    model, z = built("ming-univision"), torch.randn(2, 16, 8)
    before, _ = model.expand(z)
    z[:, 5] += torch.randn(8)
    changed = (model.expand(z)[0] - before).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [False] * 5 + [True] * 11


@torch.no_grad()
def test_finer_tokens_stand_where_patchify_takes_them_from():
    x = torch.randn(2, 5, 6, 4)  # a map of 3 x 2 tokens, each 2 x 2 finer ones
    rows = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1).flatten(1, 2).flatten(2)
    assert torch.equal(unpatch(rows, (3, 2), 2), x)
    model = built("ming-univision")
    seen = []
    model.drawer.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    assert model.to_pixels(torch.randn(2, 16, 96)).shape == (2, 3, 16, 16) and seen == [(2, 64, 96)]


@torch.no_grad()
def test_normalised_latents():
    model, x = built("ming-univision"), pictures(8)
    plain, made = model.latents(x), model.decode(model.encode(x))
    model.measure(x)
    z = model.latents(x)
    torch.testing.assert_close(z.mean((0, 1)), torch.zeros(8), atol=1e-5, rtol=0)
    assert float(z.square().mean()) == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(z * model.scale + model.mean, plain)
    torch.testing.assert_close(model.decode(model.encode(x)), made, atol=1e-5, rtol=1e-4)
    model.measure(x)
    torch.testing.assert_close(model.latents(x), z, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_head_follows_the_true_velocity_in_one_step():
    head, noise, target = LatentHead(8, 4, 16, 1), torch.randn(5, 8), torch.randn(5, 8)
    head.net.forward = lambda x, t, cond: target - noise
    for steps, shift in ((1, 1.0), (6, 2.0)):
        torch.testing.assert_close(head.sample(torch.randn(5, 4), steps=steps, shift=shift, noise=noise), target)


@torch.no_grad()
def test_guidance():
    head = LatentHead(8, 4, 16, 2, zero_init=False)
    c, u, n, noise = torch.randn(5, 4), torch.randn(5, 4), torch.randn(5, 4), torch.randn(5, 8)
    how = dict(steps=3, noise=noise)
    plain = head.sample(c, **how)
    torch.testing.assert_close(head.sample(c, u, scale=1.0, **how), plain)
    torch.testing.assert_close(head.sample(c, u, n, scale=1.0, image_scale=1.0, **how), plain)
    torch.testing.assert_close(
        head.sample(c, u, u, scale=3.0, image_scale=9.0, **how), head.sample(c, u, scale=3.0, **how)
    )
    x, t = noise, torch.ones(5)
    vc, vu, vn = (head.net(x, t, cond) for cond in (c, u, n))
    v = vu + 2 * (vn - vu) + 3 * (vc - vn)
    torch.testing.assert_close(head.sample(c, u, n, scale=3.0, image_scale=2.0, steps=1, noise=noise), x + v)
    short = v * (vc.norm(dim=1, keepdim=True) / v.norm(dim=1, keepdim=True)).clamp_max(1)
    made = head.sample(c, u, n, scale=3.0, image_scale=2.0, steps=1, noise=noise, renormed=True)
    torch.testing.assert_close(made, x + short)
    still = LatentHead(8, 4, 16, 1)  # velocity of length 0
    torch.testing.assert_close(still.sample(c, u, noise=noise, renormed=True, temperature=0.5), noise / 2)
    with pytest.raises(ValueError, match="uncond: got None, must be given with no_text"):
        head.sample(c, None, n)


def test_the_head_learns_and_its_rows_are_apart():
    head, cond = RECIPE.build_head(4), torch.eye(4)
    target = torch.randn(4, 8)
    optimizer = torch.optim.AdamW(head.parameters(), 1e-2)
    for _ in range(150):
        loss = head.loss(cond.repeat(16, 1), target.repeat(16, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (head.sample(cond, steps=8) - target).square().mean() < 0.3 * target.square().mean()
    noise = torch.randn(4, 8)
    alone = head.sample(cond[1:2], noise=noise[1:2], steps=3)
    torch.testing.assert_close(head.sample(cond, noise=noise, steps=3)[1:2], alone)
    torch.manual_seed(2)
    found = head.loss(cond, target)
    torch.manual_seed(2)
    t, noise = torch.randn(4).sigmoid(), torch.randn(4, 8)
    noisy = t[:, None] * noise + (1 - t[:, None]) * target
    torch.testing.assert_close(found, (head.net(noisy, t, cond) - (target - noise)).square().mean())
    assert MING.value_of(head.velocity(noisy, t, cond)).shape == (4, 8)


@torch.no_grad()
def test_generation_is_fed_features_not_latents():
    model, head = built("ming-univision"), LatentHead(8, 96, 16, 1, zero_init=False)
    given = []

    def hidden(feature):
        given.append(feature)
        return torch.zeros(2, 96) if feature is None else feature

    latents, features = generate(model, head, hidden, steps=2)
    assert latents.shape == (2, 16, 8) and features.shape == (2, 16, 96)
    torch.testing.assert_close(model.expand(latents)[0], features, atol=1e-5, rtol=1e-4)
    assert given[0] is None and all(torch.equal(a, b) for a, b in zip(given[1:], features.unbind(1), strict=False))


def test_a_teacher_and_masked_latents(tmp_path):
    model, x = replace(RECIPE, teacher_dim=12).build(teacher()).train(), pictures(4)
    torch.manual_seed(1)
    with_it = model.objective(x)
    with_it.backward()
    assert model.masked.grad.abs().sum() > 0 and model.alignment.mlp[0].weight.grad.abs().sum() > 0
    model._teacher = ()
    torch.manual_seed(1)
    assert 0 < float((with_it - model.objective(x)).detach()) <= 2
    other = load_tokenizer(model.eval().save(tmp_path))
    assert torch.equal(other.encode(x).z, model.encode(x).z)
    whole = replace(RECIPE, mask_ratio=0.0).build()
    made, _ = whole(x)
    torch.testing.assert_close(whole.objective(x), (made - x).abs().mean() + (made - x).square().mean())


def test_refusals():
    for how, message in (
        (dict(size="S"), "size: got 'S', must be one of T, L"),
        (dict(patch=5), "patch: got 5, must divide image, 16"),
        (dict(finer=3), "patch: got 4, must divide image, 16, by a multiple of 3"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(RECIPE, **how).build()


def test_claim():
    outcome = claim(TokenizeTrial(pictures=2, size=32), steps=1)
    assert outcome.metric == "objects named right, latents and features" and "dB" in outcome.note
