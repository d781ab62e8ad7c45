"""Hita: who knows what of carriers and patches, two books in one sequence, and the readout that comes early."""

from __future__ import annotations

import pytest
import torch

from tests.tokenize.test_contract import SIZE, built, pictures
from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.core.visibility import carriers_first
from vistok.parts.tokenizer import load_tokenizer
from vistok.parts.vision import FrozenVision
from vistok.tokenize._holistic import FusionDecoder, HolisticGenerator, Stack
from vistok.tokenize.hita import Hita, claim

SMALL = dict(
    image=SIZE,
    width=8,
    mults=(1, 2, 2),
    blocks=1,
    dim=24,
    depth=1,
    heads=3,
    mlp=48,
    dropout=0.0,
    carriers=5,
    shift=3,
    codes=32,
    carrier_dim=6,
    patch_dim=4,
    vision="",
    restart_after=3,
)
SEEING = {**SMALL, "vision": "test_vit", "vision_size": 32}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@torch.no_grad()
def test_a_carrier_does_not_depend_on_later_ones_but_on_the_whole_picture():
    model, x = built("hita"), pictures(1)
    reading = Stack.forward
    put = torch.randn(1, 21, 24)
    model.reading.forward = lambda tokens: put
    before = model.latents(x)
    put = put.clone()
    put[:, 3] += torch.randn(24)
    changed = (model.latents(x) != before).any(-1)[0]
    assert changed.tolist() == [False] * 3 + [True] * 18
    model.reading.forward = reading.__get__(model.reading)
    other = x.clone()
    other[:, :, -4:, -4:] = 1 - other[:, :, -4:, -4:]  # the last patch
    assert bool((model.latents(other) != model.latents(x)).any(-1)[0, :5].all())


@torch.no_grad()
@pytest.mark.parametrize("shift", [0, 3])
def test_a_patch_changes_the_slots_from_shift_places_behind_it_only(shift):
    decoder = FusionDecoder(5, 4, shift, 24, depth=2, heads=3, mlp=48).eval()
    carriers, patches = torch.randn(1, 5, 24), torch.randn(1, 16, 24)
    before = decoder(carriers, patches)
    assert before.shape == (1, 16, 24)
    for p in (0, 7, 12, 13, 15):
        other = patches.clone()
        other[:, p] += torch.randn(24)
        changed = (decoder(carriers, other) != before).any(-1)[0]
        assert changed.tolist() == [i >= p + shift for i in range(16)]
    if shift == 0:
        x = torch.cat([carriers + decoder.carrier_positions, patches + decoder.positions], 1)
        assert torch.equal(before, decoder.stack(x, causal=True)[:, 5:])


@torch.no_grad()
def test_the_last_patches_are_lost_with_a_shift_and_not_without():
    for shift, same in ((3, True), (0, False)):
        model = built("hita", shift=shift)
        ids = model.encode(pictures(1)).ids
        other = ids.clone()
        other[:, -3:] = (other[:, -3:] + 7) % 32
        assert torch.equal(model.decode_ids(ids), model.decode_ids(other)) == same


@torch.no_grad()
def test_the_vision_model_is_looked_through_and_goes_through_a_folder(tmp_path):
    model = Hita(**SEEING).build()
    model(pictures(4))
    model.eval()
    seen = model.seen(pictures())
    assert seen.shape == (3, 1 + 4, model.vision.dim)
    assert torch.equal(model.latents(pictures()), model.latents(pictures(), seen))
    assert not torch.allclose(model.latents(pictures()), model.latents(pictures(), seen + 1))
    other = load_tokenizer(model.save(tmp_path))
    assert torch.equal(other.encode(pictures()).z, model.encode(pictures()).z)


def test_registers_are_no_patches():
    vision = FrozenVision.of("vit_tiny_patch16_224", prefix=True, img_size=32, depth=1, reg_tokens=3, class_token=True)
    model = Hita(**SMALL).build(vision)
    with torch.no_grad():
        assert torch.equal(model.seen(pictures())[:, 1:], vision(pictures())[:, 4:])


def test_variant_u_gives_the_vision_models_patches_back():
    model = Hita(**SEEING, variant="U").build().train()
    carriers = torch.randn(2, 5, 24)
    assert model.fusion.features(carriers, model.vision.grid).shape == (2, 4, model.vision.dim)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(12):
        loss = model.objective(pictures(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] and model.fusion.mask_token.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.vision.parameters())
    plain = model.objective(pictures(2)) - super(type(model), model).objective(pictures(2))
    assert 0 < float(plain.detach()) < 2


@torch.no_grad()
def test_mask_tokens_see_carriers_and_one_another_and_carriers_do_not_see_them():
    seen = carriers_first(2, 3, "full")
    assert seen.int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1] * 5, [1] * 5, [1] * 5]
    decoder = FusionDecoder(5, 4, 3, 24, 7, depth=1, heads=3, mlp=48).eval()
    carriers = torch.randn(1, 5, 24)
    before = decoder.features(carriers, (3, 3))
    assert before.shape == (1, 9, 7)
    carriers[:, 4] += torch.randn(24)
    assert bool((decoder.features(carriers, (3, 3)) != before).any(-1).all())


@torch.no_grad()
def test_the_generator_reads_either_kind_first_with_tables_of_their_own():
    ids = torch.randint(0, 32, (2, 9))
    first, last = (HolisticGenerator(32, 4, 9, kind, width=24).eval() for kind in ("carriers", "patches"))
    last.load_state_dict({k: v for k, v in first.state_dict().items() if k not in ("order", "offset")}, strict=False)
    assert last.order.tolist() == [4, 5, 6, 7, 8, 0, 1, 2, 3]
    assert last.offset.tolist() == [32] * 5 + [0] * 4 and first.offset.tolist() == [0] * 4 + [32] * 5
    logits = first(ids[:, :-1])
    wanted = -logits.log_softmax(2).gather(2, ids[..., None])[..., 0].sum(1)
    torch.testing.assert_close(first.nats(ids), wanted)
    swapped = torch.cat([ids[:, 4:], ids[:, :4]], 1)
    wanted = -last(swapped[:, :-1]).log_softmax(2).gather(2, swapped[..., None])[..., 0].sum(1)
    torch.testing.assert_close(last.nats(ids), wanted)
    first.embed.weight[:32] += 1  # the tables of the kinds are not one
    assert not torch.equal(first(ids[:, :-1]), logits)


def test_refusals():
    for hyper, message in (
        (dict(image=18), "image: got 18, must be a multiple of 4"),
        (dict(shift=6), "shift: got 6, must be between 0 and the 5 carriers"),
        (dict(variant="W"), "variant: got 'W', must be 'V' or 'U'"),
        (dict(variant="U"), "variant: got 'U', which needs a vision model"),
    ):
        with pytest.raises(ValueError, match=message):
            Hita(**{**SMALL, **hyper}).build()
    with pytest.raises(ValueError, match="vision: must be made with prefix=True"):
        Hita(**SMALL).build(FrozenVision.of("test_vit", img_size=32))


def test_claim():
    outcome = claim(TokenizeTrial(pictures=8), steps=2)
    assert 0 < outcome.baseline and outcome.holds == (outcome.value <= 0.99 * outcome.baseline)
