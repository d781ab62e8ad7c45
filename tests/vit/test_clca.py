"""CLCA: what its sheet says must hold, the vectors made with the authors' code, and the claim."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import vistok
from tests.vit.made_trial import MadeTrial, tiny_vit
from tests.vit.towers import KINDS, built, pixels
from vistok.host.vit import ViTReducer
from vistok.vit.clca import CLCA, CrossLayerCache, CrossLayerHead, claim, operations
from vistok.vit.evit import EViT
from vistok.vit.random_drop import RandomDrop
from vistok.vit.tome import ToMe
from vistok.vit.topk import TopK

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "vit"
HALF = EViT(keep=0.5, layers=(1, 3))


def run(vit, method, x):
    with torch.no_grad(), vistok.apply(vit, method) as session:
        found = vit(x)
    return found, session


# What must hold -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [HALF, TopK(keep=1.0)], ids=repr)
def test_cache_off_and_head_off_is_the_base_model(inner):
    vit, x = built("timm-vit"), pixels()
    expected, alone = run(vit, inner, x)
    off = CLCA(inner, gap=False, num_clr=0, head=False)
    found, session = run(vit, off.method(vit), x)
    assert torch.equal(found, expected) and session.tokens == alone.tokens and session.flops == alone.flops
    with torch.no_grad():
        assert torch.equal(off.build(vit)(x), expected)
        if inner.keep == 1.0:
            assert torch.equal(expected, vit(x))


def lengths(inner, n, depth, gap, num_clr, recover_last):
    """Slots that leave each block, carriers counted: the sheet in a loop of counters."""
    reductions = list(inner.stages(depth))
    recoveries = reductions + ([depth - 2] if recover_last else [])
    free, cached, out = n, 0, []
    for layer in range(depth):
        if layer in reductions:
            free = -(-int(10 * inner.keep) * free // 10) + inner.extra
        if layer in recoveries:
            free, cached = free + cached, 0
        if layer < recoveries[-1]:
            cached += gap + num_clr
        out.append(free + num_clr)
    return out


@pytest.mark.parametrize("kind", ["timm-eva02", "siglip"])
@pytest.mark.parametrize("inner", [HALF, TopK(keep=0.3, layers=(2,)), RandomDrop(keep=0.5, layers=(0, 4))], ids=repr)
@pytest.mark.parametrize(("gap", "num_clr", "last"), [(True, 1, True), (True, 0, False), (False, 2, True)])
def test_lengths(kind, inner, gap, num_clr, last):
    vit = built(kind)
    method = CLCA(inner, gap=gap, num_clr=num_clr, recover_last=last).method(vit)
    _, session = run(vit, method, pixels(1))
    expected = lengths(inner, 64, 6, gap, num_clr, last)
    assert session.tokens == expected == method.plan(64, 6)


def by_hand(vit, method, x):
    """Sequences that leave each block of a timm ViT with EViT, cache and carriers, written as one loop over lists."""
    cache, carriers = method.cache, method.clr.shape[1]
    b = len(x)
    patches = vit._pos_embed(vit.patch_embed(x))
    free, held = patches[:, 1:], method.clr.expand(b, -1, -1)
    cls, back, fresh, out, classes = patches[:, :1], [], 0, [], []
    for layer, block in enumerate(vit.blocks):
        seq = torch.cat([cls, free, held], 1)
        q, k, v = block.attn.qkv(block.norm1(seq)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) * 8**-0.5).softmax(-1)
        seq = seq + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        n = free.shape[1]
        cls, free, held = seq[:, :1], seq[:, 1 : 1 + n], seq[:, 1 + n :]
        if layer in cache.reductions:
            score = weights.mean(1)[:, 0, 1 : 1 + n]
            count = -(-n // 2)
            kept = [sorted(row.topk(count).indices.tolist()) for row in score]
            gone = [[i for i in range(n) if i not in row] for row in kept]
            fused = [sum(score[i, j] * free[i, j] for j in gone[i])[None] for i in range(b)]
            free = torch.stack([torch.cat([free[i, kept[i]], fused[i]]) for i in range(b)])
            fresh = 0
        seq = torch.cat([cls, free, held], 1)
        seq = seq + block.mlp(block.norm2(seq))
        n = free.shape[1]
        cls, free, held = seq[:, :1], seq[:, 1 : 1 + n], seq[:, 1 + n :]
        if layer in cache.recoveries:
            fresh = 0
        mean = free[:, : n - fresh].mean(1, keepdim=True)
        if layer in cache.recoveries and back:
            fresh = sum(t.shape[1] for t in back)
            free, back = torch.cat([free, *back], 1), []
        if layer < cache.recoveries[-1]:
            back += [mean, held] if carriers else [mean]
        if layer in cache.reductions or layer == 5:
            classes.append(cls[:, 0])
        out.append(torch.cat([cls, free, held], 1))
    return out, torch.stack(classes, 2)


@pytest.mark.parametrize("num_clr", [0, 2])
def test_is_as_a_model_written_for_it(num_clr):
    """The mean covers neither class token nor carriers nor what has just come back; carriers are never ranked."""
    vit, x = built("timm-vit"), pixels()
    method, outs = CLCA(HALF, num_clr=num_clr).method(vit), []
    handles = [block.register_forward_hook(lambda m, a, out: outs.append(out)) for block in vit.blocks]
    _, session = run(vit, method, x)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        expected, classes = by_hand(vit, method, x)
    for a, b in zip(outs, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    last = session.states[-1]
    torch.testing.assert_close(last.aside["class"].transpose(1, 2), classes, rtol=1e-4, atol=1e-4)
    assert "cache" not in last.aside and last.held == num_clr


@pytest.mark.parametrize("inner", ["evit", "topk", "random-drop", "tome", ToMe(r=5)], ids=str)
@pytest.mark.parametrize("kind", ["timm-dinov3", "vit", "clip"])
def test_around_any_reducer(inner, kind):
    vit, x = built(kind), pixels(3)
    method = CLCA(inner).method(vit)
    _, session = run(vit, method, x)
    assert session.tokens == method.plan(64, 6)
    state = session.states[-1]
    assert state.held == 1 and state.size.sum() <= 3 * 64
    assert torch.equal(state.anchor < 0, state.size == 0)  # what patches have joined has a place
    alone = run(vit, method, x[1:2])[1].states[-1]
    assert torch.equal(alone.source, state.source[1:2])


def test_around_every_reducer_of_the_family():
    vit = built("timm-vit")
    names = [c.slug for c in vistok.systems("vit")]
    reducers = [made for made in map(vistok.create, names) if isinstance(made, ViTReducer)]
    assert len(reducers) >= 4
    for inner in reducers:
        if isinstance(inner, nn.Module):
            continue
        method = CLCA(inner).method(vit)
        assert run(vit, method, pixels(1))[1].tokens == method.plan(64, 6)


def test_gradient_reaches_early_layers_directly():
    """With the class token's way through later blocks cut, the head's first inputs and the cache are what is left."""
    vit = copy.deepcopy(built("timm-vit"))
    for block in vit.blocks[2:]:
        block.register_forward_hook(lambda m, a, out: torch.cat([out[:, :1].detach(), out[:, 1:]], 1))
    reached = {}
    for head in (False, True):
        torch.manual_seed(0)
        model = CLCA(HALF, head=head).build(vit, 5)
        cross_entropy(model(pixels(4)), torch.arange(4)).backward()
        grad = model.vit.blocks[0].attn.qkv.weight.grad
        reached[head] = grad is not None and bool(grad.abs().sum() > 0)
    assert reached == {False: False, True: True}


def test_gradients_reach_carriers_and_head():
    model = CLCA(HALF, num_clr=2).build(built("timm-vit"), 5).train()
    cross_entropy(model(pixels(4)), torch.arange(4)).backward()
    assert model.method.clr.grad.abs().sum(2).gt(0).all()
    assert all(p.grad.isfinite().all() for p in model.head.parameters())


def test_not_reentrant_checkpointing_changes_no_gradient():
    """The backward pass is inside the ``with``, as for every method."""
    vit, grads = built("timm-vit"), []
    for switch in (False, True):
        torch.manual_seed(0)
        model = CLCA(HALF).build(vit, 5).train()
        model.vit.set_grad_checkpointing(switch)
        with vistok.apply(model.vit, model.method) as session:
            model.vit(pixels(4))
            logits = model.head(session.states[-1].aside["class"].transpose(1, 2))
            cross_entropy(logits, torch.arange(4)).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_compiles_to_one_graph():
    from torch._dynamo.testing import CompileCounter

    vit, counter = built("timm-vit"), CompileCounter()
    method = CLCA(HALF).method(vit)
    expected, plain = run(vit, method, pixels(seed=1))
    compiled = torch.compile(vit, backend=counter, fullgraph=True)
    with torch.no_grad(), vistok.apply(vit, method) as session:
        compiled(pixels())
        torch.testing.assert_close(compiled(pixels(seed=1)), expected)
        assert counter.frame_count == 1 and session.tokens == plain.tokens
        torch.testing.assert_close(session.states[-1].aside["class"], plain.states[-1].aside["class"])
    torch.compiler.reset()


# The head -------------------------------------------------------------------------------------------------------------


def test_head_mixes_the_layers_of_each_channel():
    torch.manual_seed(0)
    head, x = CrossLayerHead(3, 2, 4, mult=2).eval(), torch.randn(5, 3, 2)
    norm, conv, again, _, linear = head.layers
    for layer in (norm, again):
        nn.init.uniform_(layer.running_mean)
        nn.init.uniform_(layer.running_var, 0.5, 2)
    y = (x - norm.running_mean[:, None]) / (norm.running_var[:, None] + norm.eps).sqrt()
    mixed = torch.stack([(y[:, c // 2] * conv.weight[c, 0]).sum(1) + conv.bias[c] for c in range(6)], 1)
    mixed = torch.nn.functional.gelu((mixed - again.running_mean) / (again.running_var + again.eps).sqrt())
    torch.testing.assert_close(head(x), mixed @ linear.weight[:, :, 0].T + linear.bias)


def test_without_reductions_the_head_sees_one_class_token():
    class Nothing(ViTReducer):
        def stages(self, depth):
            return ()

    vit = built("timm-vit")
    model = CLCA(Nothing(), gap=False, num_clr=0).build(vit, 7).eval()
    seen = []
    model.head.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        assert model(pixels()).shape == (2, 7)
        features = vit.norm_pre(vit._pos_embed(vit.patch_embed(pixels())))
        for block in vit.blocks:
            features = block(features)
    assert torch.equal(seen[0], features[:, :1].transpose(1, 2))


def test_one_picture_trains_no_head():
    model = CLCA(HALF).build(built("timm-vit"), 5).train()
    with pytest.raises(ValueError, match=r"^pictures: got 1 in training, must be 2 or more"):
        model(pixels(1))
    assert model.eval()(pixels(1)).shape == (1, 5)


# The released code ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clca-cache-a", "clca-cache-nohead"])
def test_golden(name):
    from safetensors import safe_open
    from timm.models.vision_transformer import VisionTransformer

    path = GOLDEN / f"{name}.safetensors"
    if not path.exists():
        pytest.skip("the vectors are not in this checkout")
    with safe_open(path, "pt") as file:
        given = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        hyper = json.loads(file.metadata()["hyper"])
    weights = {key[9:]: value for key, value in given.items() if key.startswith("in.param.")}
    side, m = hyper["grid"], hyper["num_clr"]
    vit = VisionTransformer(
        img_size=side,
        patch_size=1,
        in_chans=1,
        embed_dim=hyper["dim"],
        depth=hyper["depth"],
        num_heads=hyper["num_heads"],
        mlp_ratio=2,
        num_classes=hyper["classes"],
    ).eval()
    vit.load_state_dict({k: v for k, v in weights.items() if not k.startswith("ifa_head")}, strict=False)
    x = given["in.x"]
    vit.blocks[0].register_forward_pre_hook(lambda module, args: (x[:, :-m],))
    inner = EViT(keep=hyper["keep_rate"], layers=tuple(hyper["reduction_loc"]), order="author")
    made = {"gap": hyper["gap"], "num_clr": m, "recover_last": hyper["recover_last"], "parity": "authors"}
    method = CrossLayerCache(inner, hyper["dim"], hyper["depth"], **made)
    method.clr = nn.Parameter(x[:, -m:])  # in the vectors each picture has its own
    outs = []
    for block in vit.blocks:
        block.register_forward_hook(lambda module, args, out: outs.append(out))
    logits, session = run(vit, method, torch.zeros(len(x), 1, side, side))
    if hyper["head"]:
        head = CrossLayerHead(hyper["dim"], len(hyper["reduction_loc"]) + 1, hyper["classes"]).eval()
        parts = {k.replace("ifa_head.0", "layers"): v for k, v in weights.items() if k.startswith("ifa_head")}
        assert head.load_state_dict(parts, strict=False).unexpected_keys == []
        with torch.no_grad():
            logits = head(session.states[-1].aside["class"].transpose(1, 2))
    assert [out.shape[1] for out in outs] == given["out.length"].tolist()
    assert [1 + n for n in method.plan(side**2, hyper["depth"])] == given["out.length"].tolist()
    torch.testing.assert_close(logits, given["out.logits"], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(outs[-1], given["out.last"], rtol=1e-4, atol=1e-4)
    for layer in hyper["record"]:
        torch.testing.assert_close(outs[layer], given[f"out.state.{layer}"], rtol=1e-4, atol=1e-4)


def test_released_carriers_compete_and_are_whatever_stands_last():
    """A carrier that the reducer drops: as released, later means and caches do not know; by default it stays."""
    vit, x = built("timm-vit"), pixels()
    kept = {}
    for parity in ("paper", "authors"):
        method = CLCA(TopK(keep=2, layers=(1,)), gap=False, recover_last=False, parity=parity).method(vit)
        with torch.no_grad():
            method.clr.zero_()
        _, session = run(vit, method, x)
        kept[parity] = (session.states[2].num_slots, session.states[2].held)
    # paper: 2 slots, the one that came back, the carrier; as released the carrier is one of 65 that are ranked
    assert kept == {"paper": (4, 1), "authors": (3, 0)}


# Around it ------------------------------------------------------------------------------------------------------------


def test_carriers_begin_near_the_class_token():
    vit = built("timm-vit")
    torch.manual_seed(0)
    clr = CLCA(num_clr=3).method(vit).clr
    off = (clr - vit.cls_token).detach()
    assert clr.shape == (1, 3, 32) and 0 < off.abs().mean() < 0.05 and not torch.equal(off[:, 0], off[:, 1])
    assert CLCA().method(built("clip")).clr.shape == (1, 1, 32)
    assert CLCA().method(built("siglip")).clr.abs().max() < 0.2


def test_operations_count_what_comes_back():
    vit = built("timm-vit")
    alone, cached = (
        operations(system.build(vit, 5).eval(), 32) for system in (CLCA(HALF, gap=False, num_clr=0), CLCA(HALF))
    )
    assert alone < cached < operations(CLCA(TopK(keep=1.0), gap=False, num_clr=0).build(vit, 5).eval(), 32)


def test_wrong_arguments_are_named():
    vit = built("timm-vit")
    for given, message in (
        (dict(num_clr=-1), r"^num_clr, mult: got -1 and 2"),
        (dict(parity="released"), r"^parity: got 'released'"),
        (dict(inner=HALF, keep=0.5), r"^keep, layers: are for a reducer given by name"),
    ):
        with pytest.raises(ValueError, match=message):
            CLCA(**given)
    with pytest.raises(ValueError, match=r"^inner: got 'sit', must be a system"):
        CLCA("sit").method(vit)
    with pytest.raises(ValueError, match=r"^head: got True, but SiglipVisionModel has no class token"):
        CLCA().build(built("siglip"), 5)
    with pytest.raises(ValueError, match=r"^classes: got None"):
        CLCA().build(built("vit"))
    assert CLCA().build(KINDS["timm-vit"].build()).head.layers[4].out_channels == 5


def test_another_method_may_not_add_tokens_before_the_carriers():
    from vistok.host.vit.reducer import AddTokens

    class More(ViTReducer):
        steps = (AddTokens(torch.zeros(1, 2, 32)),)

    vit = built("timm-vit")
    with pytest.raises(ValueError, match=r"^method: clca found 3 added tokens at the first block and has 1"):
        run(vit, [More(), CLCA(HALF).method(vit)], pixels())


@pytest.mark.parametrize(("figures", "holds"), [((0.5, 0.6), True), ((0.6, 0.6), False)])
def test_claim(figures, holds):
    class Trial(MadeTrial):
        def fresh(self):
            return copy.deepcopy(self.classifier)

    trial = Trial(*figures)
    trial.classifier = tiny_vit(depth=6)
    outcome = claim(trial, steps=2)
    assert (outcome.baseline, outcome.value, outcome.holds) == (*figures, holds)
    assert all(len(losses) == 2 for _, losses in trial.trained) and len(trial.trained) == 2
    assert trial.trained[0][0].head is None and trial.trained[1][0].head is not None
    assert "2 steps each" in outcome.note and "0.900" in outcome.note


def test_training_brings_the_loss_down():
    torch.manual_seed(0)
    model = CLCA(HALF).build(KINDS["timm-vit"].build(depth=4), 5).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = cross_entropy(model(pixels(8)), torch.arange(8) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and sum(b < a for a, b in pairwise(losses)) > 4
