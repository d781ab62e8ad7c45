"""PatchMerger: soft merging by a learned matrix, in real networks, and the claim."""

from __future__ import annotations

import copy

import pytest
import torch

import vistok
from tests.vit.made_trial import MadeTrial, tiny_vit
from tests.vit.test_contract import case, forward, hooked, same
from tests.vit.towers import DEPTH, KINDS, PATCHES, WIDTH, blocks, built, outputs, pixels
from vistok.host.vit import Stage
from vistok.host.vit.joined import Joined
from vistok.vit.patchmerger import Merging, PatchMerger, _share, claim

some = pytest.mark.parametrize("kind", ["timm-vit", "timm-deit-distilled", "timm-dinov3", "vit-classifier", "siglip"])


def made(kind, **hyper):
    torch.manual_seed(1)
    return PatchMerger(**({"keep": 5} | hyper)).method(built(kind))


def test_each_token_is_a_softmax_mean_of_all():
    state, evidence = case(prefix=2)
    torch.manual_seed(0)
    method = Merging(8, keep=4)
    after = method.reduce(state, evidence, 4)
    for i in range(3):
        for slot in range(4):
            weights = torch.stack([(method.queries[slot] * row).sum() for row in state.slots[i]]).softmax(0)
            torch.testing.assert_close(after.slots[i, slot], (weights[:, None] * state.slots[i]).sum(0))
    assert torch.equal(after.x[:, :2], state.x[:, :2]) and after.x.shape == (3, 6, 8)


def test_order_of_the_patches_does_not_matter():
    torch.manual_seed(0)
    method, x, turn = Merging(8, keep=4), torch.randn(2, 20, 8), torch.randperm(20)
    torch.testing.assert_close(method.weights(x)[:, :, turn], method.weights(x[:, turn]))
    torch.testing.assert_close(method.weights(x).sum(2), torch.ones(2, 4))


def test_a_patch_counts_to_the_token_with_the_largest_share_of_it():
    """Sizes add up, a token stands at the patch of its own that it has most of, and a token of no patch nowhere."""
    state, evidence = case()
    torch.manual_seed(0)
    method = Merging(8, keep=6)
    with torch.no_grad():
        method.queries[5] = method.queries[4]  # never above it
    after, weights = method.reduce(state, evidence, 6), method.weights(state.slots)
    for i in range(3):
        owner = [max(range(6), key=lambda slot: weights[i, slot, j]) for j in range(20)]
        assert after.source[i].tolist() == owner
        for slot in range(6):
            mine = [j for j in range(20) if owner[j] == slot]
            assert after.size[i, slot] == len(mine)
            best = max(mine, key=lambda j: weights[i, slot, j]) if mine else -1
            assert after.anchor[i, slot] == best
    assert bool((after.anchor[:, 5] == -1).all())


@some
def test_tokens_are_gone(kind):
    model, x, method, prefix = built(kind), pixels(3), made(kind), KINDS[kind].prefix
    plan = [64, 64, 5, 5, 5, 5]
    assert method.plan(PATCHES, DEPTH) == plan
    before, plain = hooked(model), forward(model, x)
    seen = []
    watch = [block.register_forward_hook(lambda m, a, out: seen.append(out.shape[1])) for block in blocks(model)]
    with vistok.apply(model, method) as session:
        batch = forward(model, x)
        seen_then = list(seen)
        turned = forward(model, x[[2, 0, 1]])
        dense = session.restore(torch.zeros(3, 5, 2))
    for handle in watch:
        handle.remove()
    assert session.tokens == plan and seen_then == [prefix + count for count in plan] and dense.shape == (3, 64, 2)
    for all_, other in zip(batch, turned, strict=True):
        torch.testing.assert_close(other, all_[[2, 0, 1]], rtol=1e-4, atol=1e-4)
    assert hooked(model) == before and same(forward(model, x), plain)


@some
def test_no_fewer_tokens_than_there_are_change_nothing(kind):
    model, x = built(kind), pixels()
    with vistok.apply(model, made(kind, keep=PATCHES)):
        found = forward(model, x)
    assert same(found, forward(model, x))


@pytest.mark.parametrize("kind", ["timm-vit", "vit"])
def test_trains_with_the_network(kind):
    model = copy.deepcopy(built(kind)).train()
    method = PatchMerger(keep=5).method(model)
    with vistok.apply(model, method):
        sum(t.square().mean() for t in outputs(model(pixels()))).backward()
    assert method.training and bool((method.queries.grad != 0).all())
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_compiles_to_one_graph_once():
    from torch._dynamo.testing import CompileCounter

    model, method, counter = built("timm-vit"), made("timm-vit"), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with vistok.apply(model, method):
        eager = forward(model, pixels())
        for seed in (0, 1, 0):
            found = forward(compiled, pixels(seed=seed))
    assert counter.frame_count == 1 and torch.allclose(eager[0], found[0], atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize(("depth", "block"), [(12, 5), (24, 11), (3, 1), (2, 0), (1, 0)])
def test_it_follows_the_first_half_of_the_blocks(depth, block):
    method = Merging(8)
    assert method.stages(depth) == [block]
    assert [method.count(n, Stage(block, depth, 144)) for n in (144, 9, 8, 3)] == [8, 8, 8, 3]
    assert Merging(8, after=0).stages(depth) == [0]


def test_half_precision():
    vit = tiny_vit().bfloat16()
    method = PatchMerger(keep=3).method(vit)
    assert method.queries.dtype == torch.bfloat16 and not method.training
    with torch.no_grad(), vistok.apply(vit, method):
        assert vit(torch.zeros(2, 3, 24, 24).bfloat16()).dtype == torch.bfloat16


def test_errors_name_the_argument():
    for keep in (0, 0.5, True):
        with pytest.raises(ValueError, match=r"^keep: got"):
            PatchMerger(keep=keep)
    for after in (-1, 1.5):
        with pytest.raises(ValueError, match=r"^after: got"):
            PatchMerger(after=after)
    with pytest.raises(ValueError, match=r"after: got 6, but the model has the blocks 0..5"):
        vistok.apply(built("timm-vit"), Merging(WIDTH, after=6))


def test_claim():
    trial = MadeTrial(0.9, 0.895)
    outcome = claim(trial, steps=1)
    assert (outcome.baseline, outcome.value, outcome.holds) == (0.9, 0.895, True)
    (plain, _), (model, _) = trial.trained
    assert isinstance(model, Joined) and not torch.equal(plain.head.weight, trial.classifier.head.weight)
    share = _share(model)
    assert 0.5 < share < 0.7 and f"{share:.0%} of the operations" in outcome.note
    assert not claim(MadeTrial(0.9, 0.88), steps=1).holds
