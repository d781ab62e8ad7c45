"""Slot-MLLM: slot attention of both types against loops, residual codes as words, and how objects are told apart."""

from __future__ import annotations

import pytest
import torch

from tests.tokenize.test_contract import built, pictures
from tests.tokenize.test_seed import SMALL as SEED
from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.tokenize._slots import SlotCrossAttention, adjusted_rand, owners, scenes
from vistok.tokenize.slot_mllm import SlotMLLM, claim

SMALL = {k: v for k, v in SEED.items() if k not in ("restore_depth", "conditions")}
SMALL |= dict(depth=3, features=20, decode_depth=1, vector=10)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def given():
    return torch.randn(2, 4, 8), torch.randn(2, 5, 6), torch.tensor([[True] * 5, [True, True, False, True, False]])


@torch.no_grad()
def test_morph_against_a_loop(given):
    module, (x, features, mask) = SlotCrossAttention(8, 6, 2), given
    found = module(x, features, mask)
    q, k, v = module.query(module.norm(x)), module.key(features), module.value(features)
    for b in range(2):
        parts = torch.zeros(4, 8)
        for h in range(2):
            span = slice(4 * h, 4 * h + 4)
            shares = torch.zeros(4, 5)
            for n in range(5):
                each = torch.stack([(q[b, s, span] @ k[b, n, span] / 2).exp() for s in range(4)])
                shares[:, n] = each / each.sum() if mask[b, n] else 0
            for s in range(4):
                parts[s, span] = sum(shares[s, n] * v[b, n, span] for n in range(5)) / (shares[s].sum() + 1)
        torch.testing.assert_close(found[b], x[b] + module.out(parts))


@torch.no_grad()
def test_gru_against_a_loop(given):
    module, (x, features, mask) = SlotCrossAttention(8, 6, 2, "gru", 2), given
    found = module(x, features, mask)
    k, v = module.key(features), module.value(features)
    for b in range(2):
        slots = x[b]
        for _ in range(2):
            q = module.query(module.norm(slots))
            shares = torch.zeros(2, 4, 5)
            for n in range(5):
                scores = [
                    [q[s, 4 * h : 4 * h + 4] @ k[b, n, 4 * h : 4 * h + 4] / 4**0.5 for s in range(4)] for h in (0, 1)
                ]
                each = torch.tensor(scores).flatten().softmax(0).view(2, 4) + 1e-4
                shares[:, :, n] = each if mask[b, n] else 0
            weights = shares / shares.sum(2, keepdim=True)
            update = torch.cat([weights[h] @ v[b, :, 4 * h : 4 * h + 4] for h in (0, 1)], 1)
            slots = module.gru(update, slots)
            slots = slots + module.mlp(module.norm_mlp(slots))
        torch.testing.assert_close(found[b], slots)


@torch.no_grad()
def test_shares_and_weights_of_morph(given):
    module, (x, features, _) = SlotCrossAttention(8, 6, 2), given
    torch.testing.assert_close(module.shares(x, features).sum(2), torch.ones(2, 2, 5))
    assert (module.weights(x, features).sum(3) < 1).all()
    alone = module.weights(x[:, :1], features)
    torch.testing.assert_close(alone, torch.full_like(alone, 1 / 6))
    expected = x[:, :1] + module.out(module.value(features).sum(1, keepdim=True) / 6)
    torch.testing.assert_close(module(x[:, :1], features), expected)


@torch.no_grad()
@pytest.mark.parametrize(("mode", "iterations"), [("morph", 1), ("gru", 3)])
def test_slots_that_are_permuted_come_out_permuted(given, mode, iterations):
    module, (x, features, _) = SlotCrossAttention(8, 6, 2, mode, iterations), given
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(module(x[:, order], features), module(x, features)[:, order])


@torch.no_grad()
@pytest.mark.parametrize("mode", ["morph", "gru"])
def test_padding_is_as_if_cut_and_in_the_released_code_without_effect(given, mode):
    x, features, mask = given
    module = SlotCrossAttention(8, 6, 2, mode)
    torch.testing.assert_close(module(x, features, mask)[1], module(x[1:], features[1:, mask[1]])[0])
    module.legacy = True
    torch.testing.assert_close(module(x, features, mask), module(x, features), atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_the_gru_runs_in_float32(given):
    module, (x, features, _) = SlotCrossAttention(8, 6, 2, "gru", 3), given
    exact = module(x, features)
    half = module.bfloat16()(x.bfloat16(), features.bfloat16())
    assert half.dtype == torch.bfloat16 and (half.float() - exact).abs().max() < 0.1


@torch.no_grad()
def test_residual_codes_are_words_of_a_language_model():
    recipe, model = SlotMLLM(**SMALL), built("slot-mllm")
    codes = model.encode(pictures())
    assert codes.ids.shape == (3, 5, 3) and recipe.words(codes.ids).shape == (3, 15)
    assert recipe.words(codes.ids)[0].tolist() == [int(i) for slot in codes.ids[0] for i in slot]
    assert torch.equal(recipe.ids(recipe.words(codes.ids)), codes.ids)
    sums = model.bottleneck.partial_sums(codes.ids)
    assert torch.equal(model.bottleneck.ids_to_z(codes.ids[..., :2]), sums[1]) and torch.equal(sums[2], codes.z)
    assert torch.equal(model.bottleneck.stage(0).codebook, model.bottleneck.stage(2).codebook)
    vocabulary = recipe.vocabulary()
    assert vocabulary.starts == (32000, 32032) and vocabulary.wrap(recipe.words(codes.ids)).shape == (3, 17)
    slots, clip = model.decode_condition(codes.ids)
    assert slots.shape == (3, 5, 10) and clip.shape == (3, 10)


@torch.no_grad()
def test_slots_compete_with_later_ones_too():
    model = built("slot-mllm")
    before = model.latents(pictures())
    model.reader.queries[3] += torch.randn(24)
    changed = (model.latents(pictures()) - before).abs().amax(2)
    assert (changed[:, 3:] > 1e-6).all()
    # What an earlier slot gets of a patch depends on what the later one asks for, though it does not see it.
    assert 0 < changed[:, :3].max() < changed[:, 3].min()


def test_stages():
    model = SlotMLLM(**SMALL).build(teacher=lambda images: images.new_ones(len(images), 10))
    model.slot_objective(pictures(), torch.randn(3, 24)).backward()
    assert all(p.grad is not None for part in (model.reader, model.widen, model.vector) for p in part.parameters())
    assert all(p.grad is None for part in (model.restore, model.bottleneck, model.vision) for p in part.parameters())
    model.zero_grad()
    model.begin_second_stage()
    model.objective(pictures()).backward()
    assert all(p.grad is None for part in (model.reader, model.widen) for p in part.parameters())
    assert all(p.grad is not None for part in (model.restore, model.down, model.bottleneck) for p in part.parameters())
    assert not any("teacher" in key for key in model.state_dict())


@pytest.mark.parametrize(("parity", "legacy"), [("paper", False), ("authors", True)])
def test_parity(parity, legacy):
    model = SlotMLLM(**SMALL | dict(parity=parity, mode="gru", iterations=2)).build()
    crosses = [block.cross for block in model.reader.blocks if block.cross is not None]
    assert all(c.legacy == legacy and c.mode == "gru" and c.iterations == 2 for c in crosses)


@torch.no_grad()
def test_owners_of_patches():
    model = built("slot-mllm")
    features = model.features(pictures())
    assert owners(model.reader, features).shape == (3, 16)
    plain = SlotMLLM(**SMALL).build(plain=True)
    assert owners(plain.reader, plain.features(pictures())).max() < 5 and plain.recipe is None


def test_adjusted_rand_against_pairs():
    truth, found = torch.randint(3, (4, 12)), torch.randint(4, (4, 12))
    counted = torch.rand(4, 12) < 0.8
    value = adjusted_rand(truth, found, counted)
    for b in range(4):
        places = counted[b].nonzero()[:, 0].tolist()
        both = one = two = every = 0
        for i in places:
            for j in places:
                if i < j:
                    a, c = bool(truth[b, i] == truth[b, j]), bool(found[b, i] == found[b, j])
                    both, one, two, every = both + (a and c), one + a, two + c, every + 1
        expected = one * two / every
        assert float(value[b]) == pytest.approx((both - expected) / ((one + two) / 2 - expected))
    assert adjusted_rand(truth, (truth + 1) % 3, counted).tolist() == pytest.approx([1.0] * 4)


def test_scenes_know_their_objects():
    images, objects = scenes(2, "test", 0, 64)
    assert images.shape == (2, 3, 64, 64) and objects.shape == (2, 64, 64) and objects.max() >= 1


def test_refusals():
    for how, message in (
        (dict(mode="other"), "mode: got 'other'"),
        (dict(iterations=2), "iterations: got 2, must be 1 for 'morph'"),
    ):
        with pytest.raises(ValueError, match=message):
            SlotMLLM(**SMALL | how).build()


def test_claim_runs():
    outcome = claim(TokenizeTrial(pictures=8), steps=1, train=4, batch=2)
    assert -1 <= outcome.value <= 1 and -1 <= outcome.baseline <= 1
