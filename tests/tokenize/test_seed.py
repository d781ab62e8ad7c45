"""SEED: causal codes, what reaches the codebook, the condition, and the weight of beta."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.tokenize.test_contract import SIZE, built, pictures
from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.parts.vision import FrozenVision
from vistok.tokenize._pairs import caption_vectors
from vistok.tokenize.seed import Seed, claim

VISION = dict(img_size=SIZE, patch_size=4, embed_dim=24, depth=1, num_heads=3)
SMALL = dict(
    tokens=5,
    codes=32,
    dim=6,
    image=SIZE,
    vision="vit_tiny_patch16_224",
    vision_arguments=VISION,
    reader=(24, 2, 3),
    restore_depth=1,
    conditions=(4, 10),
    patch=4,
    drawn=(24, 1, 3),
    steps=3,
    restart_after=None,  # a table of the batch itself would leave the codebook nothing to learn
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@torch.no_grad()
def test_a_code_depends_on_the_queries_up_to_its_own():
    model = built("seed")
    before = model.latents(pictures())
    for j in range(5):
        kept = model.reader.queries[j].clone()
        model.reader.queries[j] += torch.randn(24)
        changed = (model.latents(pictures()) - before).abs().amax((0, 2)) > 1e-6
        model.reader.queries[j] = kept
        assert changed.tolist() == [i >= j for i in range(5)]


@torch.no_grad()
def test_any_change_of_the_picture_may_change_every_code():
    model, x = built("seed"), pictures()
    other = x.clone()
    other[:, :, -1, -1] = 1 - other[:, :, -1, -1]
    assert ((model.latents(other) - model.latents(x)).abs().amax((0, 2)) > 1e-6).all()


@torch.no_grad()
def test_the_codes_are_the_nearest_and_the_same_each_time():
    model, x = built("seed"), pictures()
    codes, z, table = model.encode(x), model.latents(x), model.bottleneck.codebook
    for b in range(3):
        for i in range(5):
            assert codes.ids[b, i] == ((table - z[b, i]) ** 2).sum(1).argmin()
    assert torch.equal(model.encode(x).ids, codes.ids)
    assert torch.equal(model.decode_ids(codes.ids), model.decode_ids(codes.ids))


def test_the_gradient_passes_straight_through_and_reaches_used_codes_only():
    model = built("seed").train()
    model.bottleneck.eval()
    z = model.latents(pictures(seed=9)).detach().requires_grad_()
    codes = model.bottleneck(z)
    probe = torch.randn_like(codes.z)
    (grad,) = torch.autograd.grad((codes.z * probe).sum(), z, retain_graph=True)
    assert torch.equal(grad, probe)
    (table,) = torch.autograd.grad(codes.loss, model.bottleneck.codebook)
    used = torch.zeros(32, dtype=torch.bool)
    used[codes.ids.flatten()] = True
    assert not table[~used].any() and table[used].abs().sum() > 0


@pytest.mark.parametrize(("parity", "codebook", "commitment"), [("paper", 1.0, 0.25), ("authors", 0.25, 1.0)])
def test_what_beta_weights(parity, codebook, commitment):
    model = Seed(**SMALL | dict(parity=parity)).build()
    z = torch.randn(2, 5, 6)
    codes = model.bottleneck(z)
    away = (codes.z - z).square().mean()
    torch.testing.assert_close(codes.losses["codebook"], codebook * away)
    torch.testing.assert_close(codes.losses["commitment"], commitment * away)


def test_condition_and_its_losses():
    model = built("seed")
    ids = model.encode(pictures()).ids
    assert model.embed(ids).shape == (3, 5, 24) and model.decode_condition(ids).shape == (3, 4, 10)
    torch.testing.assert_close(model.condition(model.encode(pictures()).z), model.decode_condition(ids))
    target = torch.randn(3, 4, 10)
    away = (model.decode_condition(ids) - target).square().mean()
    torch.testing.assert_close(model.generation(pictures(), target), away)
    with pytest.raises(ValueError, match=r"text: got shape \(3, 4, 9\), must be \(3, 4, 10\)"):
        model.generation(pictures(), target[..., :9])


def test_contrast_reads_the_last_embedding_and_teaches_all_queries():
    model, text = built("seed"), caption_vectors(3, 24)
    last = torch.nn.functional.normalize(model.causal(pictures())[:, -1], dim=1)
    logits = last @ text.t() / 0.07
    same = torch.arange(3)
    by_hand = sum(torch.nn.functional.cross_entropy(x, same) for x in (logits, logits.t())) / 2
    loss = model.contrast(pictures(), text)
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    assert (model.reader.queries.grad.abs().sum(1) > 0).all()
    assert all(p.grad is None for p in model.vision.parameters())


def test_another_frozen_model_may_be_given():
    vision = FrozenVision.of("vit_tiny_patch16_224", prefix=True, **VISION)
    model = replace(Seed(**SMALL), image=SIZE).build(vision)
    assert model.vision is vision and not model.train().vision.model.training


def test_a_picture_in_a_language_model_is_34_ids():
    vocabulary = Seed().vocabulary(50272)
    assert vocabulary.size == 50272 + 8192 + 2
    assert vocabulary.wrap(torch.randint(8192, (1, 32))).shape == (1, 34)


def test_claim_runs():
    outcome = claim(TokenizeTrial(pictures=16), steps=1)
    assert 0 <= outcome.baseline <= 1 and 0 <= outcome.value <= 1
    assert outcome.holds == (outcome.value >= outcome.baseline + 0.1)
