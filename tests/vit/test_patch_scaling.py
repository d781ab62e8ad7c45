"""Patchification scaling: what its sheet says must hold, the sweep, the law and the claim."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from vistok.vit.patch_scaling import (
    Adventurer,
    AdventurerBlock,
    CausalMixer,
    PatchSweep,
    PowerLaw,
    claim,
    count_patches,
    fit_power_law,
    flip_patches,
    flip_schedule,
    glimpse,
    resize_patch_embed,
    small_adventurer,
    sweep_glimpses,
)
from vistok.world import derive_seed, make_object


def mixer(dim):
    return CausalMixer(dim, 4, head_dim=8)


def small(size=8, patch=2, **given):
    torch.manual_seed(0)
    return Adventurer(5, size, patch, 16, 2, mixer, **given).eval()


class Sum(nn.Module):
    """The plainest causal mixer: the sum of what came before."""

    def forward(self, x):
        return x.cumsum(1)


# Patches --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "patch", "tokens"), [(224, 1, 50_176), (224, 16, 196), (128, 2, 4096), (64, 64, 1)])
def test_number_of_tokens(size, patch, tokens):
    assert count_patches(size, patch) == tokens


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_patch_embedding_is_unfold_and_a_product(patch):
    """A linear map of each pixel for a patch of 1, one token for a patch of the whole picture."""
    model, x = small(patch=patch), torch.randn(2, 3, 8, 8)
    proj = model.patch_embed.proj
    rows = nn.functional.unfold(x, patch, stride=patch).transpose(1, 2) @ proj.weight.flatten(1).T + proj.bias
    torch.testing.assert_close(model.patch_embed(x), rows)
    assert rows.shape[1] == count_patches(8, patch) and model.forward_features(x).shape == (2, rows.shape[1] + 1, 16)
    if patch == 1:
        pixels = torch.einsum("bchw,dc->bhwd", x, proj.weight[:, :, 0, 0]) + proj.bias
        torch.testing.assert_close(rows, pixels.flatten(1, 2))
    assert model.pos_embed.shape[1] == rows.shape[1] + 1


def test_resizing_a_patch_embedding():
    """Larger: an enlarged picture embeds as it did. Smaller and back is the least-squares best: no weight is nearer."""
    weight, x = torch.randn(5, 3, 4, 4), torch.randn(2, 3, 4, 4)
    large = resize_patch_embed(weight, 8)
    enlarged = interpolate(x, (8, 8), mode="bilinear", antialias=True, align_corners=False)
    torch.testing.assert_close(enlarged.flatten(1) @ large.flatten(1).T, x.flatten(1) @ weight.flatten(1).T)
    assert torch.equal(resize_patch_embed(weight, 4), weight)
    little = resize_patch_embed(weight, 2)
    units = torch.eye(16).view(16, 1, 4, 4)
    shrink = interpolate(units, (2, 2), mode="bilinear", antialias=True, align_corners=False).flatten(1)  # (16, 4)
    best = torch.linalg.lstsq(shrink, weight.flatten(2).flatten(0, 1).T).solution.T.view(5, 3, 2, 2)
    torch.testing.assert_close(little, best, rtol=1e-4, atol=1e-4)
    assert resize_patch_embed(weight, 1).shape == (5, 3, 1, 1)


# The network ----------------------------------------------------------------------------------------------------------


def test_flipping_twice_is_the_identity_and_the_class_token_stays_last():
    x = torch.arange(4.0).view(1, 4, 1)
    assert flip_patches(x).flatten().tolist() == [2, 1, 0, 3]
    assert torch.equal(flip_patches(flip_patches(x)), x)


def test_schedule_of_flips():
    assert [n for n, flip in enumerate(flip_schedule(12)) if flip] == [2, 3, 6, 7, 10, 11]
    assert [n for n, flip in enumerate(flip_schedule(12, "authors")) if flip] == [2, 3]
    torch.manual_seed(0)
    for parity in ("paper", "authors"):
        blocks = Adventurer(2, 4, 4, 8, 8, mixer, parity=parity).blocks
        assert [block.flip for block in blocks] == flip_schedule(8, parity)


@pytest.mark.parametrize("flip", [False, True])
def test_block_written_out(flip):
    torch.manual_seed(0)
    block, x = AdventurerBlock(8, Sum(), flip), torch.randn(2, 5, 8)
    u = block.norm(x)
    order = [3, 2, 1, 0, 4] if flip else [0, 1, 2, 3, 4]
    expected = torch.zeros_like(x)
    for at, token in enumerate(order):
        expected[:, token] = u.mean(1) + u[:, order[: at + 1]].sum(1)
    after = x + expected
    v = block.norm_mlp(after)
    m = block.mlp
    after = after + m.fc2(nn.functional.silu(m.fc1_g(v)) * m.fc1_x(v))
    torch.testing.assert_close(block(x), after)
    assert m.fc1_g.out_features == 20


@pytest.mark.parametrize("make", [mixer, lambda dim: Sum()])
def test_mixer_is_causal(make):
    torch.manual_seed(0)
    mix, x = make(8), torch.randn(1, 9, 8)
    other = x.clone()
    other[:, 5] += 1
    before, after = mix(x), mix(other)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(2).all()


def test_a_patch_sees_those_before_it_and_the_mean_the_class_token_all():
    """With the mean in front kept as it was, nothing flows back."""
    torch.manual_seed(0)
    block, x = AdventurerBlock(8, mixer(8)), torch.randn(1, 7, 8)
    mean, given = block.norm(x).mean(1, keepdim=True), []

    class Held(nn.Module):
        def forward(self, u):
            given.append(u)
            return inner(torch.cat([mean, u[:, 1:]], 1))

    inner, free = block.mixer, block(x)
    for t in range(6):
        other = x.clone()
        other[:, t] += torch.randn(8)
        assert (block(other)[:, 6] != free[:, 6]).any()
        block.mixer = Held()
        held, still = block(other), block(x)
        torch.testing.assert_close(held[:, :t], still[:, :t])
        assert (held[:, t:] != still[:, t:]).any(2).all()
        block.mixer = inner
        assert (block(other)[:, 0] != free[:, 0]).any()  # the mean tells all of all
    torch.testing.assert_close(given[0][:, 0], given[0][:, 1:].mean(1))


def test_network_trains_and_pictures_do_not_see_one_another():
    model, x = small(), torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-5)
    assert torch.equal(model(x), model.forward_head(model.forward_features(x)))
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert small(drop_path=0.5).train().blocks[1].drop_path.drop_prob == 0.5


# The sweep ------------------------------------------------------------------------------------------------------------


def test_sweep_gives_every_model_the_same():
    made, fitted = [], []

    def model_fn(size, patch):
        made.append((size, patch, torch.rand(1).item()))
        return small(size, patch)

    def fit(model, seed):
        fitted.append((model.pos_embed.shape[1] - 1, seed))

    points = list(PatchSweep(model_fn, (4, 2), 8).run(fit, lambda model: (1.5, 0.25), (0, 1)))
    assert fitted == [(4, 0), (16, 0), (4, 1), (16, 1)] and [p.tokens for p in points] == [4, 16, 4, 16]
    assert made[0][2] == made[1][2] != made[2][2] == made[3][2]
    assert points[0].flops < points[1].flops and (points[0].loss, points[0].error, points[0].patch) == (1.5, 0.25, 4)


def test_both_backbones():
    for name, kind in (("adventurer", "Adventurer"), ("vit", "VisionTransformer")):
        model = PatchSweep(name, (16,), 32).build(16)
        assert type(model).__name__ == kind and model(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
    assert Adventurer(size=16, patch=8).embed_dim == 256


@pytest.mark.parametrize(("a", "b", "c"), [(2.0, 0.5, 0.1), (0.7, 0.05, 0.0), (30.0, 1.3, 1.0), (0.5, 3.0, 0.2)])
def test_law_is_found_again(a, b, c):
    tokens = [4, 16, 64, 256, 1024]
    law = fit_power_law(tokens, [PowerLaw(a, b, c)(n) for n in tokens])
    assert (law.a, law.b, law.c) == (pytest.approx(a, rel=1e-2), pytest.approx(b, rel=1e-2), pytest.approx(c, abs=1e-2))


def test_law_is_the_best_of_many():
    rng = torch.Generator().manual_seed(0)
    tokens = [4, 16, 64, 256]
    for loss in torch.rand(5, 4, generator=rng).tolist():
        law = fit_power_law(tokens, loss)
        assert law.a >= 0 and law.c >= 0 and 0 < law.b <= 4
        ours = sum((law(n) - y) ** 2 for n, y in zip(tokens, loss, strict=True))
        for a, b, c in (torch.rand(2000, 3, generator=rng) * torch.tensor([3.0, 3.0, 1.0])).tolist():
            assert ours <= sum((PowerLaw(a, b, c)(n) - y) ** 2 for n, y in zip(tokens, loss, strict=True)) + 1e-9


def test_glimpse_is_the_object():
    """A white square on black: it fills four fifths of the glimpse, wherever it is."""
    images, mask = torch.zeros(2, 40, 40, 3, dtype=torch.uint8), torch.zeros(2, 40, 40, dtype=torch.uint8)
    for i, (top, left) in enumerate([(12, 6), (0, 30)]):
        images[i, top : top + 10, left : left + 10] = 255
        mask[i, top : top + 10, left : left + 10] = 1
    seen, share = glimpse(images, mask, 20)
    assert seen.shape == (2, 3, 20, 20) and seen.min() >= -1 and seen.max() <= 1
    assert (seen[0, :, 3:17, 3:17] > 0.99).all() and (seen[0, :, 0] < -0.99).all() and (seen[0, :, :, -1] < -0.99).all()
    assert (seen[1, :, :17, 3:] > 0.99).all()  # at the corner of the picture its border goes on
    torch.testing.assert_close(2 * share[:, None].expand_as(seen) - 1, seen)


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_pixels_stand_where_their_patch_does(patch):
    """A patch whose weights alone are changed changes its own pixels alone."""
    torch.manual_seed(0)
    model, x = small_adventurer(8, patch), torch.randn(1, 3, 8, 8)
    rows = model.backbone.forward_features(x)[:, 1:]
    expected = torch.zeros(8, 8)
    for n in range((8 // patch) ** 2):
        top, left = n // (8 // patch) * patch, n % (8 // patch) * patch
        expected[top : top + patch, left : left + patch] = model.head(rows[0, n]).view(patch, patch)
    torch.testing.assert_close(model(x)[0], expected)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="patch: got 5, must be 1 or more and divide the picture's side, 16"):
        PatchSweep("vit", (8, 5), 16)
    with pytest.raises(ValueError, match="model_fn: got 'x'"):
        PatchSweep("x")
    with pytest.raises(ValueError, match="parity: got 'x'"):
        small(parity="x")
    with pytest.raises(ValueError, match="head_dim: got 12, must divide the 32"):
        CausalMixer(16, 4, head_dim=12)
    with pytest.raises(ValueError, match=r"tokens: got \[4, 16, 16\]"):
        fit_power_law([4, 16, 16], [1, 2, 3])
    with pytest.raises(ValueError, match="patch: got 0"):
        resize_patch_embed(torch.zeros(1, 3, 2, 2), 0)


class MadeTrial:
    """Trains a step on two of the world's objects; then the models are wrong in so many of the held-out pictures."""

    seed = 3

    def __init__(self, *wrong):
        self.wrong, self.fitted = list(wrong), []

    def fit(self, model, steps, *, loss, peak_lr, seed):
        images, masks = drawn([0, 1])
        value, share = loss(model, SimpleNamespace(images=images, truth=masks))
        value.backward()
        self.fitted.append((model.backbone.pos_embed.shape[1] - 1, steps, seed))
        assert 0 <= share <= 1 and all(p.grad is not None for p in model.parameters())
        _, truth = glimpse(*drawn([derive_seed(1, number, "test") for number in range(8)]), 8 * 2)
        wrong = torch.arange(8)[:, None, None] < self.wrong.pop(0)
        model.forward = lambda x: torch.where((truth > 0.5) != wrong, 50.0, -50.0)


def drawn(seeds):
    pictures = [make_object(seed) for seed in seeds]
    images = torch.stack([torch.tensor(one.image) for one in pictures])
    return images, torch.stack([torch.tensor(one.things[0].mask) for one in pictures])


def test_claim():
    trial = MadeTrial(6, 4, 2)
    outcome = claim(trial, steps=7, pictures=8)
    assert (outcome.baseline, outcome.value, outcome.holds) == (0.75, 0.25, True)
    assert trial.fitted == [(4, 7, 3), (16, 7, 3), (64, 7, 3)] and "64 tokens" in outcome.note
    assert not claim(MadeTrial(4, 6, 2), steps=1, pictures=8).holds


def test_sweep_of_glimpses_judges_all():
    points = list(sweep_glimpses(MadeTrial(0, 8), PatchSweep(small_adventurer, (8, 4), 16), 1, [0], 8))
    assert [point.error for point in points] == [0, 1] and points[0].loss < points[1].loss
    assert all(a.flops < b.flops for a, b in pairwise(points))
