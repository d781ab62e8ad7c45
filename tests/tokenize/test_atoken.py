"""AToken: places on four axes, sets of any sizes together, and what is kept of frames that were filled up."""

from __future__ import annotations

import pytest
import torch
from timm.layers import apply_rot_embed_cat

from tests.tokenize.test_contract import SIZE, built, pictures
from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.core.losses import gram
from vistok.parts.tokenizer import load_tokenizer
from vistok.tokenize._sparse import Voxels, patches, places, restored, rotary, sparse, unpatched, voxels
from vistok.tokenize.atoken import AToken, agreement, claim
from vistok.world.solids import make_solid

SMALL = dict(
    image=SIZE, patch=(2, 4, 4), width=48, depth=1, heads=3, mlp=96, table=4, channels=6, chunk=4, semantic=False
)
PATCH = (2, 4, 4)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def turned(x, where):
    return apply_rot_embed_cat(x, rotary(where, x.shape[-1]))


def test_products_depend_on_differences_of_places_only():
    q, k = torch.randn(5, 16), torch.randn(5, 16)
    one, two, move = torch.randint(0, 9, (5, 4)), torch.randint(0, 9, (5, 4)), torch.tensor([3, 1, 4, 2])
    here = (turned(q, one) * turned(k, two)).sum(1)
    torch.testing.assert_close((turned(q, one + move) * turned(k, two + move)).sum(1), here)
    torch.testing.assert_close((turned(q, one) * turned(k, one)).sum(1), (q * k).sum(1))
    assert not torch.allclose((turned(q, one) * turned(k, two + move)).sum(1), here)
    assert torch.equal(turned(q, torch.zeros(5, 4)), q)


def test_without_time_and_depth_it_is_the_rotary_of_a_map():
    x, where = torch.randn(6, 16), torch.randint(1, 9, (6, 4))
    where[:, [0, 3]] = 0
    found = turned(x, where)
    assert torch.equal(found[:, :4], x[:, :4]) and torch.equal(found[:, 12:], x[:, 12:])
    for axis, start in ((1, 4), (2, 8)):
        for i in range(2):
            angle = where[:, axis] * 10000.0 ** (-i / 16)
            a, b = x[:, start + 2 * i], x[:, start + 2 * i + 1]
            torch.testing.assert_close(found[:, start + 2 * i], a * angle.cos() - b * angle.sin())
            torch.testing.assert_close(found[:, start + 2 * i + 1], a * angle.sin() + b * angle.cos())


def test_patches_and_back():
    clip = torch.rand(4, 3, 8, 12)
    found = patches(clip, PATCH)
    assert found.shape == (2 * 2 * 3, 2 * 4 * 4 * 3)
    token = clip[2:4, :, 4:8, 8:12].permute(0, 2, 3, 1).flatten()  # the last: time 1, row 1, column 2
    assert torch.equal(found[-1], token) and places(2, 2, 3)[-1].tolist() == [1, 1, 2, 0]
    assert torch.equal(unpatched(found, 2, 3, PATCH), clip)


def test_things_come_back_as_they_were():
    things = [torch.rand(3, 8, 12), torch.rand(6, 3, 4, 8), torch.rand(1, 3, 8, 8), voxels(make_solid(1), 4, 4)]
    x = sparse(things, PATCH, chunk=4)
    assert [tuple(s) for s in x.shapes] == [(0, 0, 2, 3), (1, 4, 1, 2), (1, 2, 1, 2), (2, 1, 2, 2), (3, -1, 4, 4)]
    back = restored(x.features, x, PATCH)
    for one, two in zip(things[:3], back[:3], strict=True):
        torch.testing.assert_close(one, two)
    torch.testing.assert_close(back[3].features, things[3].features)
    assert torch.equal(back[3].places, things[3].places) and back[3].side == 4
    assert not x.features[0, :6, 48:].any()  # mid-grey behind the one frame
    assert x.where[2, :2].tolist() == [[0, 0, 0, 0], [0, 0, 1, 0]]  # a chunk has a time of its own


def test_what_is_no_whole_token_is_cut():
    x = sparse([torch.rand(5, 3, 10, 9)], PATCH)
    assert [tuple(s) for s in x.shapes] == [(0, 4, 2, 2)]
    clip = torch.rand(5, 3, 10, 9)
    (back,) = restored(*(lambda y: (y.features, y))(sparse([clip], PATCH)), PATCH)
    torch.testing.assert_close(back, clip[:4, :, 1:9, :8])


def test_filled_frames_and_tokens_do_not_count():
    things = [torch.rand(3, 8, 8), torch.rand(2, 3, 4, 4), Voxels(torch.rand(3, 48), torch.tensor([[0, 1, 2]] * 3), 4)]
    x = sparse(things, PATCH)
    valid = x.valid(PATCH)
    assert valid[0].any(0).tolist() == [True] * 48 + [False] * 48 and valid[0, :4].any(1).all()
    assert valid[1, 0].all() and not valid[1, 1:].any() and valid[2].sum() == 3 * 48
    model = built("atoken")
    with torch.no_grad():
        made = model.drawn(model.bottleneck(model.down(model.seen(x)), x.mask).z, x.where, x.mask)
        away = ((made - x.features) / 2)[valid]
        kl = model.bottleneck(model.down(model.seen(x)), x.mask).loss
        torch.testing.assert_close(model.learn(x), away.abs().mean() + away.square().mean() + kl)


@torch.no_grad()
def test_together_and_alone_are_the_same():
    model = built("atoken")
    things = [torch.rand(3, 8, 12), torch.rand(4, 3, 8, 8), voxels(make_solid(1), 4, 4), torch.rand(3, 16, 16)]
    codes, like = model.encode_all(things)
    assert codes.mask is not None
    back = model.decode_all(codes, like)
    for i, thing in enumerate(things):
        alone, shape = model.encode_all([thing])
        assert alone.mask is None
        torch.testing.assert_close(codes.z[i][: alone.z.shape[1]], alone.z[0], atol=1e-5, rtol=1e-4)
        (one,) = model.decode_all(alone, shape)
        if isinstance(thing, Voxels):
            torch.testing.assert_close(back[i].features, one.features, atol=1e-5, rtol=1e-4)
        else:
            torch.testing.assert_close(back[i], one, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_picture_is_a_set_like_any_other():
    model, x = built("atoken"), pictures(2)
    codes, like = model.encode_all(list(x))
    assert model.stills(x).shapes == like.shapes
    torch.testing.assert_close(torch.stack(restored(model.stills(x).features, model.stills(x), PATCH)), x)
    torch.testing.assert_close(codes.z, model.encode(x).z)
    torch.testing.assert_close(torch.stack(model.decode_all(codes, like)).clamp(0, 1), model.decode(model.encode(x)))


@torch.no_grad()
def test_chunks_do_not_see_one_another():
    model = built("atoken")
    clip = torch.rand(8, 3, 8, 8)
    codes, like = model.encode_all([clip])
    torch.testing.assert_close(codes.z[1:], model.encode_all([clip[4:]])[0].z, atol=1e-5, rtol=1e-4)
    assert model.decode_all(codes, like)[0].shape == clip.shape


@torch.no_grad()
def test_learned_positions_are_stretched_over_a_picture():
    model = built("atoken")
    model.encoder, model.norm = torch.nn.ModuleList(), torch.nn.Identity()
    model.embed.weight.zero_()
    model.embed.bias.zero_()
    entries = model.table[0].flatten(1).t()
    torch.testing.assert_close(model.seen(model.stills(pictures(1)))[0], entries)
    small = model.seen(sparse([torch.rand(3, 8, 8)], PATCH))[0]
    torch.testing.assert_close(small[0], model.table[0, :, :2, :2].mean((1, 2)))


@torch.no_grad()
def test_rounded_in_groups(tmp_path):
    model = built("atoken", levels=4, channels=12)
    codes = model.encode(pictures())
    assert codes.ids.shape == (3, 16, 2) and codes.format.bits == 24  # 12 an id; 8 ids and 96 bits in the paper
    assert torch.equal(model.decode_ids(codes.ids), model.decode(codes))
    assert set(codes.z.unique().tolist()) <= {-1, -0.5, 0, 0.5}
    other = load_tokenizer(model.save(tmp_path))
    assert torch.equal(other.encode(pictures()).ids, codes.ids)
    things = [torch.rand(3, 8, 12), torch.rand(4, 3, 8, 8)]
    codes, like = model.encode_all(things)
    ids = type(codes)(codes.ids, None, codes.format, codes.mask)
    assert torch.equal(model.decode_all(ids, like)[1], model.decode_all(codes, like)[1])


def test_losses_of_frozen_networks():
    maps = torch.nn.Conv2d(3, 5, 3).requires_grad_(False)
    recipe = AToken(**{**SMALL, "semantic": True})
    model = recipe.build(lambda images: images.mean((2, 3)).repeat(1, 16), lambda images: [maps(images)]).train()
    model.objective(pictures(4)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert not any("frozen" in key for key in model.state_dict())
    torch.manual_seed(1)
    whole = model.objective(pictures(4))
    model.frozen = (None, None)
    torch.manual_seed(1)
    assert float((whole - model.objective(pictures(4))).detach()) > 0
    with torch.no_grad():
        seen = model.eval().seen(model.stills(pictures()))
        feature = model.pooled(seen)
        mask = torch.ones(3, 16, dtype=torch.bool)
        torch.testing.assert_close(model.pooled(torch.cat([seen, seen], 1), torch.cat([mask, ~mask], 1)), feature)
        assert feature.shape == (3, 48)


def test_gram_is_blind_to_the_order_of_places():
    x, order = torch.randn(2, 5, 9), torch.randperm(9)
    assert float(gram(x, x, lambda f: [f])) == 0
    assert float(gram(x, x[..., order], lambda f: [f])) < 1e-6 < float(gram(x, 2 * x, lambda f: [f]))


def test_agreement():
    found = agreement(torch.tensor([[2.0, 0]]), torch.tensor([[1.0, 0], [0, 3]]))
    wanted = (torch.tensor([[4.8438]]).exp() * torch.tensor([[1.0, 0]]) - 15.5625).sigmoid()
    torch.testing.assert_close(found, wanted)


def test_voxels_are_what_the_views_show():
    solid, n, pixels = make_solid(4), 8, 4
    found = voxels(solid, n, pixels)
    near = abs(solid.distance((found.places.double().numpy() + 0.5) / n * 2 - 1))
    assert (near < 2 / n).mean() > 0.97 and len(found.places.unique(dim=0)) == len(found.places)
    x, y, z = max(found.places.tolist(), key=lambda p: p[2])  # nothing hides the highest from above
    square = solid.view("+z", n * pixels)[0]
    square = square[(n - 1 - y) * pixels : (n - y) * pixels, x * pixels : (x + 1) * pixels].reshape(-1)
    alone = Voxels(found.features, found.places, n)
    seen = alone.features[(alone.places == torch.tensor([x, y, z])).all(1)][0].numpy()
    views = [k * seen - square for k in range(1, 7)]  # the mean of 1 to 6 views, of which this one is one
    assert square.max() > 0 and any((rest > -1e-5).all() for rest in views)


def test_refusals():
    for hyper, message in (
        (dict(heads=4), "heads: got heads of 12 channels, must be a multiple of 8"),
        (dict(patch=(2, 5, 4)), r"patch: got \(2, 5, 4\), must divide image, 16, and chunk, 4 frames"),
        (dict(levels=4, channels=8), "channels: got 8, must be a multiple of 6"),
    ):
        with pytest.raises(ValueError, match=message):
            AToken(**{**SMALL, **hyper}).build()
    with pytest.raises(ValueError, match=r"things: got shape \(3, 3, 8\), must be \(3, H, W\) or \(T, 3, H, W\)"):
        sparse([torch.rand(3, 3, 8)], PATCH)
    with pytest.raises(ValueError, match="semantic: got False, must be True"):
        built("atoken").pooled(torch.zeros(1, 2, 48))


def test_claim():
    outcome = claim(TokenizeTrial(pictures=8), steps=1)
    assert 0 < outcome.baseline < 40 and outcome.holds == (outcome.value >= outcome.baseline)
    assert "solids" in outcome.note
