"""TCPA: what its sheet says must hold, attention against the whole map, VPT-deep, the training, the claim."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn.functional import cross_entropy

from tests.vit.made_trial import tiny_vit
from vistok.core.tensors import unit
from vistok.vit.tcpa import (
    TCPA,
    PromptedViT,
    PromptPool,
    attend_with_prompts,
    claim,
    role_mask,
    transfer,
    vpt_deep,
)
from vistok.zoo.vit_tasks import TASKS

SMALL = TCPA(size=6, length=2, topk=2, dropout=0)


def pictures(batch=2, seed=0):
    return torch.randn(batch, 3, 24, 24, generator=torch.Generator().manual_seed(seed))


def whole_map(attn, x, prompts, mask, renormalise):
    """The released code's way: the softmax over all, then the mask, then the values."""
    joined = torch.cat([x, prompts.expand(len(x), -1, -1)], 1)
    q, k, v = attn.qkv(joined).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)
    weights = (q[:, :, : x.shape[1]] @ k.transpose(2, 3) * attn.scale).softmax(3)
    if mask is not None:
        ones = torch.ones(*mask.shape[:2], x.shape[1])
        weights = weights * torch.cat([ones, mask.float()], 2)[:, None]
    if renormalise:
        weights = weights / weights.sum(3, keepdim=True)
    return attn.proj((weights @ v).transpose(1, 2).flatten(2)), weights


def chosen(prefix=1, patches=9, size=6, topk=2):
    rows = torch.rand(2, prefix + patches, size, generator=torch.Generator().manual_seed(3)).topk(topk).indices
    return rows[:, :prefix], rows[:, prefix:]


@pytest.mark.parametrize(("prefix", "topk", "length"), list(product((1, 3), (1, 2, 6), (1, 2))))
def test_mask_opens_so_many_prompts_of_the_right_pool(prefix, topk, length):
    of_class, of_patches = chosen(prefix, topk=topk)
    mask = role_mask(of_class, of_patches, 6, length)
    assert mask.shape == (2, prefix + 9, 12 * length) and (mask.sum(2) == topk * length).all()
    for b, t in product(range(2), range(prefix + 9)):
        groups = of_class[b, t].tolist() if t < prefix else [6 + i for i in of_patches[b, t - prefix].tolist()]
        wanted = {length * group + i for group in groups for i in range(length)}
        assert set(mask[b, t].nonzero()[:, 0].tolist()) == wanted
    if topk == 6:  # only the roles are left
        assert mask[:, :prefix, : 6 * length].all() and not mask[:, prefix:, : 6 * length].any()


@pytest.mark.parametrize(("given", "renormalise"), list(product(({}, {"qk_norm": True}), (False, True))))
def test_attention_is_that_of_the_whole_map(given, renormalise):
    attn = tiny_vit(**given).blocks[1].attn
    torch.manual_seed(1)
    x, prompts = torch.randn(2, 10, 16) * 3, torch.randn(1, 12, 16) * 3
    mask = role_mask(*chosen(), 6, 1)
    wanted, weights = whole_map(attn, x, prompts, mask, renormalise)
    found = attend_with_prompts(attn, x, prompts, mask, renormalise)
    torch.testing.assert_close(found, wanted)
    _, open_to_all = whole_map(attn, x, prompts, None, False)
    lost = (open_to_all[..., 10:] * ~mask[:, None]).sum(3)
    torch.testing.assert_close(weights.sum(3), torch.ones_like(lost) if renormalise else 1 - lost)
    assert bool((lost > 0.01).any())


def test_a_mask_of_ones_is_a_plain_block_on_more_tokens():
    attn = tiny_vit().blocks[0].attn
    x, prompts = torch.randn(2, 10, 16), torch.randn(2, 12, 16)
    plain = attn(torch.cat([x, prompts], 1))[:, :10]
    ones = torch.ones(2, 10, 12, dtype=torch.bool)
    for mask, renormalise in product((None, ones), (False, True)):
        torch.testing.assert_close(attend_with_prompts(attn, x, prompts, mask, renormalise), plain)


def test_a_mask_of_zeros_renormalised_is_the_block_without_prompts():
    attn = tiny_vit().blocks[0].attn
    x, none = torch.randn(2, 10, 16), torch.zeros(2, 10, 12, dtype=torch.bool)
    torch.testing.assert_close(attend_with_prompts(attn, x, torch.randn(1, 12, 16), none), attn(x))


def test_gradients_are_those_of_the_whole_map():
    attn, mask = tiny_vit().blocks[0].attn, role_mask(*chosen(), 6, 1)
    for renormalise in (False, True):
        given = [torch.randn(2, 10, 16, requires_grad=True), torch.randn(1, 12, 16, requires_grad=True)]
        found = torch.autograd.grad(attend_with_prompts(attn, *given, mask, renormalise).square().sum(), given)
        wanted = torch.autograd.grad(whole_map(attn, *given, mask, renormalise)[0].square().sum(), given)
        torch.testing.assert_close(found, wanted)


def test_fused_attention_stays_on_and_no_map_is_written(monkeypatch):
    import vistok.vit.tcpa as module

    seen, attend = [], module.scaled_dot_product_attention
    monkeypatch.setattr(
        module,
        "scaled_dot_product_attention",
        lambda *a, **k: seen.append((a[0].shape[2], a[1].shape[2])) or attend(*a, **k),
    )
    SMALL.build(tiny_vit(), 3)(pictures())
    assert seen == [(37, 37 + 24)] * 4


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision(half):
    attn = tiny_vit().blocks[0].attn.to(half)
    x, prompts, mask = (
        torch.randn(2, 10, 16, dtype=half),
        torch.randn(1, 12, 16, dtype=half),
        role_mask(*chosen(), 6, 1),
    )
    wanted, _ = whole_map(attn.float(), x.float(), prompts.float(), mask, True)
    found = attend_with_prompts(attn.to(half), x, prompts, mask)
    assert found.dtype == half
    torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.03)


def test_nearest_keys_by_cosine():
    torch.manual_seed(0)
    pool, x = PromptPool(3, 7, 2, 16, 4), torch.randn(2, 5, 16)
    index, distance = pool.match(x, 1)
    near = torch.einsum("btd,pd->btp", unit(x), unit(pool.keys[1])).detach()
    for b, t in product(range(2), range(5)):
        assert index[b, t].tolist() == sorted(range(7), key=lambda j: -float(near[b, t, j]))[:4]
    torch.testing.assert_close(distance, (1 - near.gather(2, index)).mean())
    assert torch.equal(pool.match(3 * x, 1)[0], index)
    assert bool((pool.keys.abs() <= 1).all() and (pool.prompts.abs() <= 1).all() and (pool.prompts.abs() > 0.9).any())


def test_random_choice_reaches_all_prompts_and_names_none_twice():
    pool = PromptPool(1, 7, 1, 16, 4)
    index, distance = pool.match(torch.randn(4, 50, 16), 0, random=True)
    assert set(index.unique().tolist()) == set(range(7)) and distance > pool.match(torch.randn(4, 50, 16), 0)[1]
    assert all(len(set(row)) == 4 for row in index.flatten(0, 1).tolist())


def by_hand(model, x):
    """VPT-deep with timm's own blocks: prompts beside the tokens, dropped after each block."""
    vit, attns = model.vit, [block.attn for block in model.vit.blocks]
    rows = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
    for layer, block in enumerate(vit.blocks):
        block.attn = attns[layer].attn
        rows = block(torch.cat([rows, model.prompts(layer, len(x)).expand(len(x), -1, -1)], 1))[:, : rows.shape[1]]
        block.attn = attns[layer]
    return model.head(vit.norm(rows)[:, 0])


def test_without_coordination_it_is_vpt_deep():
    model = TCPA(size=6, length=2, coordinated=False, dropout=0).build(tiny_vit(init_values=0.1), 3)
    torch.testing.assert_close(model(pictures()), by_hand(model, pictures()))
    assert model.for_class.keys is None and float(model.learn(pictures())[1]) == 0


def test_vpt_deep_has_as_many_parameters():
    def trained(system):
        return sum(p.numel() for p in system.build(tiny_vit(), 3).parameters() if p.requires_grad)

    assert trained(vpt_deep(SMALL)) == trained(SMALL) == 4 * 2 * 6 * (2 + 1) * 16 + 16 * 3 + 3


def test_prompts_are_chosen_for_each_token_as_it_enters_the_block():
    """With all of the mechanism written out for one block."""
    model = SMALL.build(tiny_vit(depth=1), 3)
    vit, x = model.vit, pictures()
    rows = vit._pos_embed(vit.patch_embed(x))
    index = model.for_class.match(rows[:, :1], 0)[0], model.for_patches.match(rows[:, 1:], 0)[0]
    block = vit.blocks[0]
    attn, prompts = block.attn.attn, block.norm1(model.prompts(0, 2))
    mixed, _ = whole_map(attn, block.norm1(rows), prompts, role_mask(*index, 6, 2), True)
    rows = rows + mixed
    rows = rows + block.mlp(block.norm2(rows))
    torch.testing.assert_close(model(x), model.head(vit.norm(rows)[:, 0]))


def test_released_mask_and_fourier_change_the_result():
    torch.manual_seed(0)
    models = [
        TCPA(6, 2, 2, dropout=0, **flag).build(tiny_vit(), 3)
        for flag in ({}, {"renormalise": False}, {"fourier": True})
    ]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    plain, released, fourier = (model(pictures()) for model in models)
    assert not torch.allclose(plain, released) and not torch.allclose(plain, fourier)
    rows = models[0].prompts(1, 1)
    torch.testing.assert_close(models[2].prompts(1, 1)[0], torch.fft.fft(torch.fft.fft(rows[0], dim=1), dim=0).real)


def test_keys_learn_from_the_distance_alone_and_the_backbone_not_at_all():
    vit = tiny_vit(init_values=0.5)
    model, labels = SMALL.build(vit, 3).train(), torch.tensor([0, 2])
    logits, distance = model.learn(pictures())
    cross_entropy(logits, labels).backward(retain_graph=True)
    pools = (model.for_class, model.for_patches)
    assert all(pool.keys.grad is None and bool(pool.prompts.grad.any()) for pool in pools)
    assert model.head.weight.grad is not None
    distance.backward()
    assert all(bool(pool.keys.grad.any()) for pool in pools)
    assert all(p.grad is None for p in model.vit.parameters()) and all(p.grad is None for p in vit.parameters())
    assert not {id(p) for p in model.parameters()} & {id(p) for p in vit.parameters()}


def test_modes_and_dropout():
    model = TCPA(6, 2, 2, dropout=0.5).build(tiny_vit(pos_drop_rate=0.5, proj_drop_rate=0.5), 3)
    assert model.train() is model and model.training and not model.vit.training
    rows = model.prompts(0, 4)
    assert rows.shape == (4, 24, 16) and 0.3 < float((rows == 0).float().mean()) < 0.7
    assert model.eval() is model and model.prompts(0, 4).shape == (1, 24, 16)
    assert torch.equal(model(pictures()), model(pictures()))
    alone = torch.cat([model(pictures()[:1]), model(pictures()[1:])])
    torch.testing.assert_close(model(pictures()), alone)


def test_registers_and_average_pooling():
    model = SMALL.build(tiny_vit(reg_tokens=3, global_pool="avg", class_token=True), 3)
    assert model.prefix == 4 and model(pictures()).shape == (2, 3)


class Batch:
    def __init__(self, rng):
        self.images = torch.randint(0, 256, (4, 24, 24, 3), generator=rng, dtype=torch.uint8)
        self.pixels = self.images.permute(0, 3, 1, 2) / 127.5 - 1
        self.label = torch.randint(3, (4,), generator=rng)


def test_first_steps_choose_at_random_and_the_loss_falls():
    torch.manual_seed(0)
    model, drawn = TCPA(6, 1, 2, match_weight=0.5, warm=0.25).build(tiny_vit(), 3), []
    learn = model.learn
    model.learn = lambda x, random=False: drawn.append(random) or learn(x, random)
    loss, batch, steps = model.system.loss(20), Batch(torch.Generator().manual_seed(0)), []
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-2)
    for _ in range(20):
        value, right = loss(model, batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        steps.append(value.item())
        assert 0 <= right <= 1
    assert drawn == [True] * 5 + [False] * 15 and steps[-1] < 0.7 * steps[0]


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="topk: got 7 of 6 x 1"):
        PromptPool(1, 6, 1, 4, 7)
    with pytest.raises(ValueError, match="topk: got 0"):
        PromptPool(1, 6, 1, 4, 0).match(torch.zeros(1, 2, 4), 0)
    with pytest.raises(ValueError, match="vit: got attention Attention and no class token"):
        SMALL.build(tiny_vit(class_token=False, global_pool="avg"), 3)
    model = SMALL.build(tiny_vit(), 3)
    with pytest.raises(RuntimeError, match="prompts: a block was called by itself"):
        model.vit.blocks[0](torch.zeros(1, 37, 16))
    with pytest.raises(ValueError, match="attn_mask, is_causal: got one"):
        model.vit.blocks[0](torch.zeros(1, 37, 16), attn_mask=torch.zeros(37, 37))


class MadeTrial:
    """Trains nothing; the models then say what colour the corner has, every ``wrong``-th time another."""

    seed, size, pictures = 3, 64, 6

    def __init__(self, *shares):
        self.classifier = VisionTransformer(64, 16, embed_dim=16, depth=1, num_heads=2, num_classes=5)
        self.shares, self.fitted = list(shares), []

    def fit(self, model, steps, *, task, loss, batch_size, peak_lr, seed):
        task = TASKS[task]
        batch = task.draw(0, batch_size, size=self.size)
        value, _ = loss(model, batch)
        value.backward()
        self.fitted.append((model, steps, seed, float(value.detach())))
        test = task.draw(0, self.pictures, seed=1, split="test", size=self.size)
        right = round(self.shares.pop(0) * self.pictures)
        told = torch.where(torch.arange(self.pictures) < right, test.label, (test.label + 1) % 8)
        model.forward = lambda x: torch.eye(8)[told]

    def score(self, task, model):
        return TASKS[task].score(model, self.pictures, seed=1, size=self.size)


def test_claim():
    trial = MadeTrial(0.5, 4 / 6)
    outcome = claim(trial, steps=7)
    assert (outcome.baseline, outcome.value, outcome.holds) == (0.5, pytest.approx(4 / 6), True)
    (vpt, steps, seed, _), (ours, *same) = trial.fitted
    assert isinstance(vpt, PromptedViT) and not vpt.system.coordinated and ours.system == TCPA()
    assert (steps, seed) == (7, 3) == tuple(same[:2]) and "7 steps" in outcome.note
    assert not claim(MadeTrial(0.5, 0.5), steps=1).holds
    assert transfer(MadeTrial(1.0), TCPA().build(trial.classifier, 8), TCPA().loss(1), 1, 0) == 1.0
