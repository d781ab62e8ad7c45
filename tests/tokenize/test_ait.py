"""AiT: the VQ-VAE of labels, its averages and holes, soft tokens, and the solver's sequences."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.core.quantize import ema_update
from vistok.tokenize._labels import mask_augment
from vistok.tokenize._solver import nucleus
from vistok.tokenize.ait import AiT, claim, si_log, views, whole

DEPTH = AiT("depth", 16, 8, 4, 8, 6, hole=4, restart_after=3, solver_size=(16, 1, 2), bins=10, classes=4, mask_tokens=4)
MASK = replace(DEPTH, label="mask")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def maps(n=3, seed=0):
    made = torch.rand(n, 1, 16, 16, generator=torch.Generator().manual_seed(seed))
    return made.masked_fill(made < 0.2, 0)


def labels(recipe=DEPTH, steps=2):
    made = recipe.labels()
    for step in range(steps):
        made.objective(maps(seed=step))
    return made.eval()


def solver(recipe=DEPTH):
    return recipe.solver(nn.Conv2d(3, 5, 4, 4), 5).eval()


@pytest.mark.parametrize("recipe", [DEPTH, MASK])
def test_maps_to_ids_and_back(recipe):
    model = labels(recipe)
    codes = model.encode(maps())
    assert codes.ids.shape == (3, 4) and codes.format.grid == (2, 2)
    assert torch.equal(model.decode(codes.ids), model.render(codes.z)) and model.decode(codes.ids).shape == (
        3,
        1,
        16,
        16,
    )
    torch.testing.assert_close(model.encode(maps()[:1]).z, codes.z[:1])


@torch.no_grad()
def test_soft_tokens_of_one_code_are_hard_tokens():
    model, logits = labels(), torch.randn(2, 4, 8)
    model.bottleneck.fill(torch.randn(8, 6))
    torch.testing.assert_close(model.decode_soft(logits, 1e4), model.decode(logits.argmax(-1)))
    assert not torch.allclose(model.decode_soft(logits), model.decode(logits.argmax(-1)), atol=1e-4)
    expected = sum(logits.softmax(-1)[..., [k]] * model.bottleneck.codebook[k] for k in range(8))
    torch.testing.assert_close(model.decode_soft(logits), model.render(expected))


def test_the_softmax_is_differentiable():
    logits = torch.randn(2, 4, 8, requires_grad=True)
    labels().decode_soft(logits).square().sum().backward()
    assert logits.grad.ne(0).all()


def test_holes_are_patches_and_as_many_as_said():
    for ratio in (0.0, 0.3, 0.5, 1.0):
        made = mask_augment(torch.ones(5, 2, 12, 16), ratio, 4)
        patches = made.unflatten(3, (4, 4)).unflatten(2, (3, 4)).mean((1, 3, 5))
        assert set(patches.unique().tolist()) <= {0.0, 1.0}
        assert (patches == 0).sum((1, 2)).tolist() == [math.ceil(ratio * 12)] * 5
    one, two = (mask_augment(torch.ones(5, 1, 16, 16), 0.5, 4, torch.Generator().manual_seed(s)) for s in (1, 2))
    assert not torch.equal(one, two) and len({tuple(x.flatten().tolist()) for x in one}) > 1
    with pytest.raises(ValueError, match="patch: got 5, must divide the sides"):
        mask_augment(maps(), 0.5, 5)


def test_only_training_of_depth_has_holes():
    given = []
    for recipe, training in ((DEPTH, True), (DEPTH, False), (MASK, True)):
        model = labels(recipe).train(training)
        model.encoder.register_forward_pre_hook(lambda _, x: given.append(x[0]))
        model.objective(torch.ones(3, 1, 16, 16))
    assert [int((x == 0).sum()) for x in given] == [3 * 128, 0, 0]


def test_unknown_pixels_count_in_no_loss():
    model, depth, made = labels(), maps(), torch.rand(3, 1, 16, 16)
    other = made.masked_fill(depth == 0, 77)
    assert torch.equal(model.loss_of(made, depth), model.loss_of(other, depth))
    assert torch.equal(si_log(made, depth), si_log(other, depth))
    known = depth > 0
    torch.testing.assert_close(model.loss_of(made, depth), (made - depth)[known].square().mean())
    mask = labels(MASK)
    torch.testing.assert_close(mask.loss_of(made, depth), ((2 * made - 1) - (2 * depth - 1)).square().mean())


def test_si_log_by_hand():
    made, depth = torch.rand(2, 1, 4, 4) - 0.1, maps(2)[..., :4, :4]
    d = (depth[depth > 0].log() - made.clip(min=1e-3)[depth > 0].log()).double()
    torch.testing.assert_close(
        si_log(made, depth).double(), ((d**2).mean() - 0.5 * d.mean() ** 2).sqrt(), rtol=1e-5, atol=0
    )
    assert si_log(2 * depth, depth, 1.0) < 1e-3  # blind to the scale
    same = depth.clone().requires_grad_()
    si_log(same, depth).backward()
    assert torch.isfinite(same.grad).all()


def test_smoothing_keeps_the_sum_of_the_counts_and_the_direction_of_unused_codes():
    count, total = 5 * torch.rand(8), torch.randn(8, 6)
    hits, sums = torch.tensor([3.0, 0, 1, 0, 0, 0, 2, 0]), torch.randn(8, 6)
    sums[hits == 0] = 0
    new, _, table = ema_update(count, total, hits, sums, write_back=True)
    torch.testing.assert_close(new.sum(), (0.99 * count + 0.01 * hits).sum())
    torch.testing.assert_close(nn.functional.cosine_similarity(table, total)[hits == 0], torch.ones(5))


def test_codes_stay_near_and_the_authors_are_thrown_far_away():
    longest = {}
    for parity in ("paper", "authors"):
        model = replace(DEPTH, parity=parity, restart_after=None).labels()
        assert model.bottleneck.write_back and model.bottleneck.restart_after is None
        reach = model.bottleneck.codebook.norm(dim=1).max()
        model.objective(maps())
        model.bottleneck.update()
        longest[parity] = float(model.bottleneck.codebook.norm(dim=1).max() / reach)
    assert longest["paper"] < 3 and longest["authors"] > 100


def test_what_is_looked_up_is_of_the_table_before_the_update():
    model = labels().train()
    codes = model.encode(maps(seed=9))
    before = model.bottleneck.codebook.clone()
    assert torch.equal(codes.z.detach(), before[codes.ids])
    model.bottleneck.update()
    assert not torch.equal(model.bottleneck.codebook, before)


@pytest.mark.parametrize("parallel", [False, True])
@torch.no_grad()
def test_writing_against_a_loop(parallel):
    recipe = replace(DEPTH, parallel=parallel)
    model, images = solver(recipe), torch.rand(2, 3, 16, 16)
    (part,) = recipe.sequence
    assert part == (10 + 4 + 2 + 8, 8, 4, True)
    table = model.words.weight[part.start :]
    for soft in (True, False):
        ids, (logits,) = model.generate(images, recipe.start, recipe.sequence, soft=soft)
        x = model.words.weight[recipe.start].expand(2, 4 if parallel else 1, -1)
        for t in range(4):
            row = model.logits(model.read(images), x)[:, t, part.start : part.start + part.size]
            torch.testing.assert_close(logits[:, t], row)
            assert torch.equal(ids[:, t], row.argmax(-1) + part.start)
            step = row.softmax(-1) @ table if soft else table[row.argmax(-1)]
            x = x if parallel else torch.cat([x, step[:, None]], 1)
    assert recipe.solve(model, labels(), images).shape == (2, 1, 16, 16)


@torch.no_grad()
def test_soft_inputs_that_are_sure_are_hard_inputs():
    model, images = solver(), torch.rand(2, 3, 16, 16)
    model.head.weight.mul_(1e5)
    model.words.weight.mul_(20)
    found = [model.generate(images, DEPTH.start, DEPTH.sequence, soft=soft) for soft in (True, False)]
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


@torch.no_grad()
def test_true_tokens_before_each_and_none_behind():
    model, images = solver(), torch.rand(2, 3, 16, 16)
    ids = torch.randint(24, 32, (2, 4))
    before = model.forced(images, ids, DEPTH.start)
    ids[:, 2] = 24 + (ids[:, 2] - 23) % 8
    changed = (model.forced(images, ids, DEPTH.start) - before).abs().amax((0, 2)) > 1e-7
    assert changed.tolist() == [False, False, False, True]
    greedy, (logits,) = model.generate(images, DEPTH.start, DEPTH.sequence, soft=False)
    torch.testing.assert_close(model.forced(images, greedy, DEPTH.start)[..., 24:], logits)


@torch.no_grad()
def test_an_object_is_a_box_a_class_and_a_mask():
    model, images = solver(DEPTH), torch.rand(2, 3, 16, 16)
    assert MASK.start == DEPTH.start + 1 == 15
    ids, logits = model.generate(
        images, MASK.start, MASK.sequence, top_p=0.4, generator=torch.Generator().manual_seed(0)
    )
    assert ids.shape == (2, 9) and [x.shape[1:] for x in logits] == [(4, 10), (1, 4), (4, 8)]
    assert (ids[:, :4] < 10).all() and ((ids[:, 4] >= 10) & (ids[:, 4] < 14)).all()
    assert ((ids[:, 5:] >= 16) & (ids[:, 5:] < 24)).all()
    assert MASK.solve(model, labels(MASK), images, soft=False).shape == (2, 1, 16, 16)
    with pytest.raises(ValueError, match="inputs: got 10 ids, must be 9 at most"):
        model.forced(images, torch.zeros(2, 10, dtype=torch.int64), 0)


def test_nucleus():
    p = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    for top_p, allowed in ((0.0, {1}), (0.5, {1}), (0.6, {1, 3}), (0.8, {1, 2, 3}), (1.0, {0, 1, 2, 3})):
        assert set(nucleus(p.expand(400, 4), top_p).tolist()) == allowed


def test_lessons():
    model, table, images = solver(), labels(), torch.rand(3, 3, 16, 16)
    ids = table.encode(maps()).ids + 24
    logits = model.forced(images, ids, DEPTH.start)
    by_hand = nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    torch.testing.assert_close(replace(DEPTH, weights=(1.0, 0.0)).lesson(model, table, images, maps()), by_hand)
    both = by_hand + si_log(table.decode_soft(logits[..., 24:32]), maps())
    torch.testing.assert_close(DEPTH.lesson(model, table, images, maps()), both)
    mask, named = labels(MASK), torch.randint(10, (3, 5))
    ids = torch.cat([named, mask.encode(maps()).ids + 16], 1)
    logits = model.forced(images, ids, 15)
    each = -logits.log_softmax(-1).gather(2, ids[..., None])[..., 0]
    by_hand = each[:, :5].mean() + 0.2 * each[:, 5:].mean()
    by_hand = by_hand + 5 * mask.loss_of(mask.decode_soft(logits[:, 5:, 16:24]), maps())
    recipe = replace(MASK, weights=(0.2, 5.0))
    torch.testing.assert_close(recipe.lesson(model, mask, images, maps(), named), by_hand)
    recipe.lesson(model, mask, images, maps(), named).backward()
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_whole_pictures_by_squares():
    images = torch.rand(2, 3, 8, 20)

    def estimate(square):
        return square[:, :1] + torch.arange(8.0)  # not symmetric

    found, total, cover = whole(estimate, images, 5), torch.zeros(2, 1, 8, 20), torch.zeros(20)
    for left in (0, 5, 10, 12):
        square = images[..., left : left + 8]
        total[..., left : left + 8] += (estimate(square) + estimate(square.flip(3)).flip(3)) / 2
        cover[left : left + 8] += 1
    torch.testing.assert_close(found, total / cover)
    assert whole(estimate, images[..., :8], 5).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="images, step: got 8 x 7 and 5"):
        whole(estimate, images[..., :7], 5)


def test_what_cannot_be():
    with pytest.raises(ValueError, match="ratio: got 6, must be a power of 2 that divides image, 16"):
        replace(DEPTH, ratio=6).labels()
    with pytest.raises(ValueError, match=r"maps: got shape \(3, 1, 8, 8\), must be"):
        labels().encode(maps()[..., :8, :8])
    with pytest.raises(ValueError, match="parallel: got True for masks"):
        solver(replace(MASK, parallel=True))
    with pytest.raises(ValueError, match="named: got None, must be given with masks"):
        MASK.lesson(solver(), labels(MASK), torch.rand(3, 3, 16, 16), maps())


def test_views_of_the_world():
    pictures, depths = views(2, "test", 16)
    assert pictures.shape == (2, 3, 16, 16) and depths.shape == (2, 1, 16, 16)
    assert 0 <= pictures.min() and pictures.max() <= 1 and (depths == 0).any() and depths.max() < 2
    assert (pictures.amax(1, keepdim=True) > 0)[depths > 0].all()


def test_the_claim_runs():
    outcome = claim(TokenizeTrial(pictures=4, size=32), first=2, steps=1)
    assert outcome.baseline > 0 and outcome.value > 0 and "true tokens" in outcome.note
