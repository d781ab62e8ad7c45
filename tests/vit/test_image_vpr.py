"""ImAge: what its sheet says must hold, the vectors made with the authors' code, the loss by pairs, and the claim."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from tests.vit.made_trial import tiny_vit
from tests.vit.towers import KINDS, built, pixels
from vistok.vit.image_vpr import (
    ImAge,
    ImplicitAggregator,
    PooledDescriptor,
    claim,
    dense,
    init_tokens,
    multi_similarity,
    sample_features,
    scale_centres,
)
from vistok.zoo.vit import describe
from vistok.zoo.vit_tasks import TASKS, Places

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "vit"
TOWERS = ["timm-vit", "timm-registers", "timm-no-class", "timm-dinov3", "dinov2-registers", "siglip"]
small = ImAge(n_tokens=3, insert_at=3)


@pytest.mark.parametrize("kind", TOWERS)
def test_length_and_width(kind):
    model = small.build(built(kind))
    with torch.no_grad():
        found = model(pixels(3))
    assert found.shape == (3, 3 * 32)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("kind", TOWERS)
def test_without_tokens_the_patches_are_as_in_the_backbone(kind):
    model = ImplicitAggregator(built(kind), 0, 3)
    with torch.no_grad():
        assert torch.equal(model.features(pixels()), KINDS[kind].dense(built(kind), pixels()))
        assert model(pixels()).shape == (2, 0)


@pytest.mark.parametrize("kind", ["timm-vit", "dinov2-registers"])
def test_blocks_before_the_tokens_are_as_in_the_backbone(kind):
    from tests.vit.towers import blocks

    outs = []
    model, plain = small.build(built(kind)), copy.deepcopy(built(kind))
    for net in (model.backbone, plain):
        for block in blocks(net):
            block.register_forward_hook(lambda m, a, out: outs.append(out))
    with torch.no_grad():
        model(pixels())
        KINDS[kind].dense(plain, pixels())
    for layer in range(6):
        ours, theirs = outs[layer], outs[6 + layer]
        if layer < 3:
            assert torch.equal(ours, theirs)
        else:
            assert ours.shape[1] == theirs.shape[1] + 3 and not torch.allclose(ours[:, :-3], theirs)


def test_in_front_or_behind_is_the_same():
    """The released order, written as a loop: tokens first, and the first of the output are taken."""
    vit, x = built("timm-vit"), pixels()
    model = small.build(vit)
    with torch.no_grad():
        y = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
        for block in vit.blocks[:3]:
            y = block(y)
        y = torch.cat([model.tokens.expand(2, -1, -1), y], 1)
        for block in vit.blocks[3:]:
            y = block(y)
        torch.testing.assert_close(model(x), normalize(vit.norm(y)[:, :3].flatten(1)))


def test_only_tokens_and_later_blocks_get_gradients():
    vit = built("timm-vit")
    model = small.build(vit).train()
    multi_similarity(model(pixels(4)), torch.tensor([0, 0, 1, 1])).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {name for name, p in model.named_parameters() if p.requires_grad}
    expected = {f"backbone.blocks.{i}.{n}" for i in (3, 4, 5) for n, _ in vit.blocks[i].named_parameters()}
    assert reached == {"tokens", *expected} and all(p.requires_grad and p.grad is None for p in vit.parameters())


def test_order_of_the_tokens_is_that_of_the_chunks():
    model, x = small.build(built("timm-vit")), pixels(4)
    with torch.no_grad():
        before = model(x)
        model.tokens.copy_(model.tokens[:, [2, 0, 1]].clone())
        after = model(x)
    torch.testing.assert_close(after.unflatten(1, (3, 32)), before.unflatten(1, (3, 32))[:, [2, 0, 1]])
    torch.testing.assert_close(after @ after.T, before @ before.T)


# Where the tokens begin -----------------------------------------------------------------------------------------------


def test_alpha_of_two_centres():
    """cosines 1 and 0 for the one feature, 0.6 and 0.8 for the other: the lead is 1, then 0.2; the mean 0.6."""
    centres = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
    found = scale_centres(centres, torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
    torch.testing.assert_close(found, torch.eye(2) * -math.log(0.01) / 0.6)
    alone = scale_centres(centres[:1], torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
    torch.testing.assert_close(alone, torch.tensor([[-math.log(0.01) / 0.8, 0.0]]))


@pytest.mark.parametrize("name", ["image-vpr-init-a", "image-vpr-init-two"])
def test_golden(name):
    from safetensors.torch import load_file

    path = GOLDEN / f"{name}.safetensors"
    if not path.exists():
        pytest.skip("the vectors are not in this checkout")
    given = load_file(path)
    found = scale_centres(given["in.centroids"], given["in.descriptors"])
    torch.testing.assert_close(found, given["out.tokens"], rtol=1e-4, atol=1e-5)


def test_tokens_begin_at_the_clusters_of_the_features():
    g = torch.Generator().manual_seed(0)
    middles = normalize(torch.randn(3, 32, generator=g), dim=1)
    features = normalize(middles.repeat(40, 1) + 0.02 * torch.randn(120, 32, generator=g), dim=1)
    tokens = init_tokens(features, 3)
    cosine = normalize(tokens, dim=1) @ middles.T
    assert sorted(cosine.argmax(1).tolist()) == [0, 1, 2] and bool((cosine.amax(1) > 0.99).all())
    torch.testing.assert_close(tokens.norm(dim=1), tokens.norm(dim=1).mean().expand(3))
    model = small.build(built("timm-vit"), features)
    assert torch.equal(model.tokens[0], tokens) and model.tokens.requires_grad


def test_without_features_the_tokens_differ():
    torch.manual_seed(0)
    tokens = small.build(built("timm-vit")).tokens[0]
    assert tokens.std() > 0.01 and not torch.allclose(tokens[0], tokens[1], atol=1e-3)


@pytest.mark.parametrize("kind", ["timm-registers", "siglip"])
def test_features_are_drawn_from_the_patches(kind):
    model, prefix = built(kind), KINDS[kind].prefix
    found = sample_features(model, pixels(2), per_image=10)
    with torch.no_grad():
        patches = normalize(dense(model, pixels(2))[:, prefix:], dim=2)
    for i in range(2):
        rows = found.unflatten(0, (2, 10))[i]
        at = (rows[:, None] - patches[i]).abs().amax(2).argmin(1)
        torch.testing.assert_close(rows, patches[i, at])
        assert len({*at.tolist()}) == 10
    assert torch.equal(found, sample_features(model, pixels(2), per_image=10))
    assert sample_features(model, pixels(2)).shape == (128, 32)


# The loss -------------------------------------------------------------------------------------------------------------


def by_pairs(found, label, alpha, beta, base, epsilon):
    total = 0.0
    for i in range(len(found)):
        alike = [float(found[i] @ found[j]) for j in range(len(found)) if j != i and label[j] == label[i]]
        other = [float(found[i] @ found[j]) for j in range(len(found)) if label[j] != label[i]]
        if epsilon is not None:
            alike, other = (
                [s for s in alike if other and s - epsilon < max(other)],
                [s for s in other if alike and s + epsilon > min(alike)],
            )
        total += math.log(1 + sum(math.exp(-alpha * (s - base)) for s in alike)) / alpha
        total += math.log(1 + sum(math.exp(beta * (s - base)) for s in other)) / beta
    return total / len(found)


@pytest.mark.parametrize("epsilon", [None, 0.0, 0.1, 2.0])
@pytest.mark.parametrize(("alpha", "beta", "base"), [(1.0, 50.0, 0.0), (2.0, 5.0, 0.4)])
@pytest.mark.parametrize("label", [[0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 2, 2], [0, 1, 2, 3, 4, 5], [0] * 6])
def test_loss_is_as_its_pairs_say(label, alpha, beta, base, epsilon):
    found = normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(2)), dim=1).requires_grad_()
    expected = by_pairs(found.detach(), label, alpha, beta, base, epsilon)
    loss = multi_similarity(found, torch.tensor(label), alpha, beta, base, epsilon)
    torch.testing.assert_close(loss.item(), expected, rtol=1e-4, atol=1e-5)
    loss.backward()
    assert found.grad.isfinite().all()


def test_loss_is_exact_under_autocast():
    found = normalize(torch.randn(6, 4), dim=1)
    label = torch.arange(6) // 2
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(multi_similarity(found, label), multi_similarity(found, label))
        assert multi_similarity(found, label).dtype == torch.float32
        inside = multi_similarity(found, label)
    assert torch.equal(inside, multi_similarity(found, label))


# Around it ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["gem", "mean"])
def test_pooled_descriptors_are_the_zoos(pooling):
    vit = built("timm-vit")
    model = PooledDescriptor(vit, 3, pooling)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels()), describe(vit, pixels(), pooling))
        torch.testing.assert_close(describe(model, pixels(), "mean"), describe(vit, pixels(), pooling))
    assert {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"3", "4", "5"}


def test_the_task_of_places_judges_it():
    model = ImAge(n_tokens=2, insert_at=2).build(tiny_vit(img_size=96, patch_size=16, num_classes=0))
    found = Places(pooling="mean", change=0.0).score(model, 8)
    assert 0 <= found["recall@1"] <= found["recall@5"] <= 1


def test_wrong_arguments_are_named():
    vit = built("timm-vit")
    with pytest.raises(ValueError, match=r"^insert_at: got 6, but the model has the blocks 0..5"):
        ImAge(insert_at=6).build(vit)
    with pytest.raises(ValueError, match=r"^n_tokens: got -1"):
        ImplicitAggregator(vit, -1, 3)
    with pytest.raises(ValueError, match=r"^pooling: got 'max'"):
        PooledDescriptor(vit, 3, "max")


@pytest.mark.parametrize(("figures", "holds"), [([0.5, 0.6], True), ([0.6, 0.6], False)])
def test_claim(figures, holds):
    """A made-up trial that trains for a few steps on real views of places."""

    class Trial:
        seed, size, trained = 0, 96, []

        def fresh(self, task):
            assert task == "places"
            return tiny_vit(img_size=96, patch_size=16, num_classes=0, depth=12)

        def draw(self, task, n):
            return TASKS[task].draw(0, n, size=96)

        def fit(self, model, steps, *, task, loss):
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
            for step in range(steps):
                value, right = loss(model.train(), TASKS[task].draw(4 * step, 4, size=96).to("cpu"))
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                assert 0 <= right <= 1
            self.trained.append(type(model))

        def recall(self, *, model, pooling, change):
            assert (pooling, change) == ("mean", 1.0)
            return given.pop(0)

    given, trial = list(figures), Trial()
    trial.trained = []
    outcome = claim(trial, steps=2)
    assert (outcome.baseline, outcome.value, outcome.holds) == (*figures, holds)
    assert trial.trained == [PooledDescriptor, ImplicitAggregator]
    assert outcome.note == "2 steps each; 16 and 128 values a descriptor"
