"""LaVIT: masks with a gradient and their eps, causality, ragged codes, the choice, and the stages."""

from __future__ import annotations

import pytest
import torch

from tests.tokenize.test_contract import SIZE, built, pictures
from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.parts.vision import FrozenVision
from vistok.tokenize._merger import MergerBlock, RaggedQuantizer, masked_softmax
from vistok.tokenize.lavit import LaVIT, claim

VISION = dict(img_size=SIZE, patch_size=4, embed_dim=24, depth=1, num_heads=3)
SMALL = dict(
    image=SIZE,
    vision="vit_tiny_patch16_224",
    vision_arguments=VISION,
    depth=2,
    heads=3,
    codes=32,
    dim=6,
    patch=4,
    drawn=(24, 1, 3),
    steps=3,
    restart_after=3,
    text=100,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def mixed():
    """A tokenizer whose selector keeps some of the places and drops others."""
    model = built("lavit")
    last = model.selector.out[-1]
    with torch.no_grad():
        last.weight.mul_(100)
        log = model.selector(model.vision(pictures()))
        last.bias[0] -= (log[..., 0] - log[..., 1]).median()
    return model


def choice(n=16, b=3, seed=0):
    return (torch.rand(b, n, generator=torch.Generator().manual_seed(seed)) < 0.5).float()


@pytest.mark.parametrize("over_all", [False, True])
def test_masked_softmax_by_hand(over_all):
    scores, allowed = torch.randn(2, 3, 5, 5).double(), (torch.rand(2, 1, 5, 5) < 0.5).float()
    allowed[0, 0, 1] = 0
    found = masked_softmax(scores, allowed, over_all)
    for b in range(2):
        for h in range(3):
            for q in range(5):
                row, kept = scores[b, h, q].tolist(), allowed[b, 0, q].tolist()
                of = [s for s, k in zip(row, kept, strict=True) if k or over_all] or [0.0]
                p = [2.718281828 ** (s - max(of)) if k else 0.0 for s, k in zip(row, kept, strict=True)]
                expected = torch.tensor([(x + 1e-6 / 5) / (sum(p) + 1e-6) for x in p])
                torch.testing.assert_close(found[b, h, q], expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found[0, :, 1], torch.full((3, 5), 0.2))


def test_a_forbidden_key_of_a_large_score_hides_the_others_only_as_released():
    scores, allowed = torch.tensor([1.0, 2.0, 300.0]), torch.tensor([1.0, 1.0, 0.0])
    right, released = masked_softmax(scores, allowed), masked_softmax(scores, allowed, True)
    torch.testing.assert_close(right[:2], scores[:2].softmax(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(released, torch.full((3,), 1 / 3))


def test_the_mask_has_a_gradient_also_where_it_forbids():
    allowed = torch.tensor([1.0, 0.0, 1.0], requires_grad=True)
    for scores in (torch.tensor([0.1, 0.2, -0.3]), torch.tensor([0.1, 500.0, -0.3])):
        scores.requires_grad_()
        grads = torch.autograd.grad(
            (masked_softmax(scores, allowed) * torch.tensor([1.0, 2, 3])).sum(), (allowed, scores)
        )
        assert all(torch.isfinite(g).all() for g in grads) and grads[0].ne(0).all()


@torch.no_grad()
def test_all_kept_reads_the_mean_of_the_features_and_loses_none():
    model = built("lavit")
    block, x = model.blocks[0], torch.randn(2, 16, 24)
    keep = torch.ones(2, 16)
    values = block.cross.key_value(block.norm_features(x))[..., 24:]
    expected = block.cross.out(values.mean(1, keepdim=True)).expand(2, 16, 24)
    found = block.cross(block.norm_cross(x), block.norm_features(x), 1 - keep[:, None, None])
    torch.testing.assert_close(found, expected)
    assert model.packed(x, keep).ne(0).any(-1).all()
    assert torch.equal(model.packed(x, keep), model.down(model.merge(x, keep)))


@torch.no_grad()
def test_a_kept_place_changes_later_places_alone():
    block, keep = MergerBlock(24, 3, False, 4.0), choice(12, 1)
    x = torch.randn(1, 12, 24)
    before = block(x, x, keep)
    for place in range(12):
        other = x.clone()
        other[0, place] += torch.randn(24)
        changed = (block(other, other, keep) - before)[0].abs().amax(1) > 1e-4
        if keep[0, place]:
            assert changed.tolist() == [i >= place for i in range(12)]
        else:  # a dropped one is read by all, and as a query sees itself
            assert changed.all()


def test_the_choice_is_of_0_and_1_and_has_a_gradient():
    model = built("lavit").train()
    log = torch.randn(3, 16, 2).log_softmax(-1).requires_grad_()
    keep = model.choose(log)
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    (grad,) = torch.autograd.grad(keep.sum(), log)
    assert grad.ne(0).all()
    often = torch.stack([model.choose(log) for _ in range(600)]).mean(0)
    torch.testing.assert_close(often, log.exp()[..., 0], atol=0.1, rtol=0)


@torch.no_grad()
def test_the_choice_in_inference_is_the_likelier_and_as_released_drawn():
    log = torch.randn(3, 16, 2).log_softmax(-1)
    model, released = built("lavit"), built("lavit", parity="authors")
    assert torch.equal(model.choose(log), (log[..., 0] >= log[..., 1]).float())
    assert not torch.equal(released.choose(log), released.choose(log))
    log[1, :, 0], log[1, 5, 0] = -20, -15
    log[1, :, 1] = 0
    for each in (model, released, model.train()):
        assert each.choose(log)[1].tolist() == [float(i == 5) for i in range(16)]
    model.set_stage(2)
    assert torch.equal(model.train().choose(log), model.choose(log))


def test_the_selector_learns_through_both_masks_and_the_rate():
    model = built("lavit").train()
    x, keep = torch.randn(2, 16, 24), choice(16, 2).requires_grad_()
    for part in ("own", "cross"):
        for block in model.blocks:  # silence the other one
            for name in ("own", "cross"):
                torch.nn.init.normal_(getattr(block, name).out.weight, std=0.3 if name == part else 0.0)
        assert torch.autograd.grad(model.merge(x, keep).square().sum(), keep)[0].abs().sum() > 0
    loss, _ = model.lesson(x)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.selector.parameters())


def test_the_rate_is_that_of_the_batch():
    model = built("lavit", rate=0.5)
    keep = torch.zeros(2, 16)
    keep[0, :12], keep[1, :4] = 1, 1  # 3 quarters and 1 quarter: half in the mean
    model.choose = lambda log: keep
    model.set_stage(1)
    x = torch.randn(2, 16, 24)
    found, _ = model.lesson(x)
    model.recipe = LaVIT(**{**SMALL, "rate": 0.25, "rate_weight": 2.0})
    torch.testing.assert_close(model.lesson(x)[0] - found, torch.tensor(2 * 0.25**2))


@torch.no_grad()
def test_codes_are_the_kept_places_in_their_order():
    model = mixed()
    features = model.vision(pictures())
    keep = model.choose(model.selector(features))
    z = model.down(model.merge(features, keep))
    assert 0 < keep.sum() < keep.numel()
    codes = model.encode(pictures())
    assert codes.mask.sum(1).tolist() == keep.sum(1).tolist() and codes.bits.tolist() == (5 * keep.sum(1)).tolist()
    table = model.bottleneck.codebook
    for b in range(3):
        there = z[b][keep[b] > 0]
        unit = there / there.norm(dim=1, keepdim=True)
        nearest = torch.cdist(unit, table).argmin(1)  # of the table as it is held, not normalised
        assert codes.ids[b].tolist() == nearest.tolist() + [-1] * (16 - len(there))
        torch.testing.assert_close(model.continuous(pictures())[b], model.merge(features, keep)[b][keep[b] > 0])
        assert model.recipe.words(codes.ids)[b].tolist() == [100, *(nearest + 102).tolist(), 101]


@torch.no_grad()
def test_ragged_codes_make_the_round_trip():
    model = mixed()
    codes = model.encode(pictures())
    whole = model.decode(codes)
    assert len(set(codes.mask.sum(1).tolist())) > 1
    assert torch.equal(model.decode_ids(codes.ids), whole)
    for i, count in enumerate(codes.mask.sum(1).tolist()):
        alone = model.encode(pictures()[i : i + 1])
        assert torch.equal(alone.ids[0], codes.ids[i])
        torch.testing.assert_close(model.decode_ids(alone.ids[:, :count])[0], whole[i], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_untrained_one_keeps_all():
    assert built("lavit").encode(pictures()).mask.all()


@torch.no_grad()
def test_padding_does_not_change_what_is_decoded():
    model = built("lavit")
    z = torch.randn(2, 5, 6)
    alone = model.features(z)
    for length in (6, 16):
        longer = torch.randn(2, length, 6)
        longer[:, :5] = z
        mask = (torch.arange(length) < 5).expand(2, -1)
        torch.testing.assert_close(model.features(longer, mask), alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model.features(z.flip(1)), alone, atol=1e-4)


def test_zeros_are_no_tokens():
    table = RaggedQuantizer(8, 6, norm="input").eval()
    z = torch.randn(2, 5, 6)
    z[0, 3:] = 0
    codes = table(z)
    assert codes.mask.tolist() == [[True] * 3 + [False] * 2, [True] * 5] and (codes.ids[0, 3:] == -1).all()
    mask = torch.tensor([[True, False, True, True, True]] * 2)
    assert table(z, mask).mask.tolist() == [[True, False, True, False, False], mask[1].tolist()]


def test_the_stages():
    model = built("lavit").train()
    model.set_stage(1)
    before = model.bottleneck.counts.clone()
    loss, made = model.lesson(torch.randn(3, 16, 24))
    assert torch.equal(model.bottleneck.counts, before) and made.shape == (3, 16, 24)
    loss.backward()
    assert model.selector.out[0].weight.grad is not None
    model.set_stage(2)
    model.zero_grad()
    model.lesson(torch.randn(3, 16, 24))[0].backward()
    assert model.selector.out[0].weight.grad is None and model.bottleneck.counts.sum() > before.sum()
    model.set_stage(None)
    assert model.quantised and model.selector.out[0].weight.requires_grad


def test_pixels_teach_the_small_flow_model_alone():
    model = built("lavit").eval()
    x = pictures(4)
    (one,) = torch.autograd.grad(model.objective(x), model.up.weight)
    (two,) = torch.autograd.grad(model.lesson(model.vision(x))[0], model.up.weight)
    torch.testing.assert_close(one, two)


def test_what_cannot_be():
    with pytest.raises(ValueError, match="stage: got 3, must be 1, 2 or None"):
        built("lavit").set_stage(3)
    vision = FrozenVision.of("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=3)
    with pytest.raises(ValueError, match="vision: has 24 channels, must be a multiple of 4 and of heads, 5"):
        LaVIT(**{**SMALL, "heads": 5}).build(vision)


def test_the_claim_runs():
    outcome = claim(TokenizeTrial(pictures=8), steps=1)
    assert -1 <= outcome.baseline <= 1 and -1 <= outcome.value <= 1 and "kept of 144" in outcome.note
