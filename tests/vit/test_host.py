"""Methods in vision transformers: against oracles that know nothing of the hooks, and used in all the wrong ways."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from PIL import Image
from torch import nn

import vistok
from tests.vit.test_contract import forward, hooked, same
from tests.vit.towers import DEPTH, KINDS, PATCHES, blocks, built, half, outputs, pixels
from vistok.host import UnsupportedModel
from vistok.host.vit import Stage, TokenState, ViTEvidence, ViTReducer
from vistok.host.vit.reducer import AddTokens, TokenStep
from vistok.vit.evit import EViT
from vistok.vit.random_drop import RandomDrop
from vistok.vit.tome import ToMe
from vistok.vit.topk import TopK

anywhere = pytest.mark.parametrize("kind", KINDS)


# Oracles --------------------------------------------------------------------------------------------------------------


@anywhere
def test_dropping_is_hiding_from_later_blocks(kind):
    """The plain model, whose later blocks may not look at the dropped tokens, leaves the same at those that are left:
    positions, rotary angles and scales are all as they were."""
    model, x, prefix = built(kind), pixels(), KINDS[kind].prefix
    with torch.no_grad(), vistok.apply(model, TopK(keep=0.5, layers=(1, 3))) as session:
        found = KINDS[kind].dense(model, x)
    states = session.states
    timm = kind.startswith("timm")

    def hide(layer):
        def hook(module, args, kwargs):
            gone = torch.cat([torch.zeros(2, prefix, dtype=torch.bool), states[layer].source < 0], 1)
            mask = torch.zeros(2, 1, 1, prefix + PATCHES).masked_fill(gone[:, None, None], -torch.inf)
            if len(args) > 1:
                return (args[0], mask, *args[2:]), kwargs
            return args, kwargs | {"attn_mask" if timm else "attention_mask": mask}

        return hook

    model = copy.deepcopy(model)
    for layer, block in enumerate(blocks(model)):
        block.register_forward_pre_hook(hide(layer), with_kwargs=True)
    with torch.no_grad():
        whole = KINDS[kind].dense(model, x)
    at = torch.cat([torch.arange(prefix).expand(2, -1), prefix + states[-1].anchor], 1)
    torch.testing.assert_close(found, whole.gather(1, at[..., None].expand(-1, -1, 32)), rtol=1e-4, atol=1e-4)


def by_hand(model: nn.Module, method: ViTReducer, x: torch.Tensor) -> torch.Tensor:
    """What a timm ViT with ``method`` computes, attention written out."""
    x = model._pos_embed(model.patch_embed(x))
    state = TokenState.start(x, 1, (8, 8))
    for layer, block in enumerate(model.blocks):
        x = state.x
        size = torch.cat([torch.ones(len(x), 1), state.size], 1)
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(2, 3) * 8**-0.5
        if method.proportional:
            logits = logits + size.log()[:, None, None]
        weights = logits.softmax(-1)
        x = x + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        state = replace(state, x=x)
        stage = Stage(layer, DEPTH, 64)
        count = method.count(state.num_slots, stage) if layer in method.stages(DEPTH) else state.num_slots
        if count < state.num_slots:
            bias = size.log()[:, None, None] if method.proportional else None
            state = method.reduce(state, ViTEvidence(q, k, 8**-0.5, 1, True, stage, bias), count)
        state = replace(state, x=state.x + block.mlp(block.norm2(state.x)))
    return model.norm(state.x)


@pytest.mark.parametrize("method", [EViT(keep=0.5, layers=(1, 3)), ToMe(r=9), ToMe(r=9, proportional=False)], ids=repr)
def test_merging_is_as_a_model_written_for_it(method):
    model, x = built("timm-vit"), pixels()
    with torch.no_grad():
        expected = by_hand(model, method, x)
        with vistok.apply(model, method):
            torch.testing.assert_close(model.forward_features(x), expected, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_a_model_written_for_it():
    method, x = EViT(keep=0.5, layers=(1, 3)), pixels()
    model = copy.deepcopy(built("timm-vit"))
    by_hand(model, method, x).square().mean().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with vistok.apply(model, method):
        model.forward_features(x).square().mean().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["timm-vit", "timm-eva", "timm-eva02", "vit", "dinov2-registers", "clip"])
def test_operations_are_those_that_torch_counts(kind):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = copy.deepcopy(built(kind))
    model.head = model.pooler = None  # what comes after the blocks is not counted
    for method in (RandomDrop(keep=0.5, layers=(1, 3)), RandomDrop(keep=1.0, layers=(1,)), After()):
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), vistok.apply(model, method) as session, sdpa_kernel(SDPBackend.MATH), counter:
            KINDS[kind].dense(model, pixels(3))
        own = 2 * (3 * 2 * 64 * 10 * 32) if isinstance(method, After) else 0
        assert session.flops == counter.get_total_flops() - own
    with torch.no_grad(), vistok.apply(model, RandomDrop(keep=0.5, layers=(1,))) as less:
        KINDS[kind].dense(model, pixels(3))
    with torch.no_grad(), vistok.apply(model, RandomDrop(keep=1.0, layers=(1,))) as whole:
        KINDS[kind].dense(model, pixels(3))
    assert less.plain_flops == whole.flops > less.flops


# Methods that the first systems are not -------------------------------------------------------------------------------


@dataclass(frozen=True)
class After(ViTReducer):
    """A soft mixture after block 2, with one more token that stands for no patch."""

    place = "after"
    extra = 1

    def stages(self, depth):
        return (2,)

    def count(self, tokens, stage):
        return 10

    def reduce(self, state, evidence, count):
        mixing = (state.slots @ state.slots[:, :count].transpose(1, 2)).softmax(1).transpose(1, 2)
        values = torch.cat([mixing @ state.slots, state.x.mean(1, keepdim=True)], 1)
        best = mixing.argmax(2)
        return state.regroup(values, mixing.argmax(1), torch.cat([best, best.new_full((len(best), 1), -1)], 1))


@pytest.mark.parametrize("kind", ["timm-vit", "timm-eva", "timm-rope-mixed", "dinov3", "siglip"])
def test_soft_mixtures_and_added_tokens_after_a_block(kind):
    model = built(kind)
    with vistok.apply(model, After()) as session:
        found = forward(model, pixels())
    assert session.tokens == [64, 64, 11, 11, 11, 11] and all(bool(t.isfinite().all()) for t in found)
    last = session.states[-1]
    assert last.anchor[:, -1].tolist() == [-1, -1] and last.size[:, -1].tolist() == [0, 0]
    assert session.restore(torch.ones(2, 11, 3)).shape == (2, 64, 3)
    assert len(session.pictures[0].keep) == 10


def test_several_methods_at_different_blocks():
    model = built("timm-vit")
    with vistok.apply(model, [RandomDrop(keep=0.5, layers=(0,)), EViT(keep=0.5, layers=(2, 4))]) as session:
        forward(model, pixels())
    assert session.tokens == [32, 32, 17, 17, 10, 10]
    with vistok.apply(model, ["random-drop", "tome"][:1], keep=[0.25], layers=(1,)) as session:
        forward(model, pixels())
    assert session.tokens[-1] == 16
    with pytest.raises(ValueError, match=r"TopK and ToMe both act at block 1"):
        vistok.apply(model, [TopK(layers=(1,)), ToMe()])


# Added tokens ---------------------------------------------------------------------------------------------------------


class Parts(ViTReducer):
    """A method made of steps."""

    def __init__(self, *steps):
        self.parts = steps

    @property
    def steps(self):
        return self.parts


def rows(m=3, seed=7):
    return torch.randn(1, m, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "method", [None, EViT(keep=0.5, layers=(1, 3)), TopK(keep=0.3, layers=(2,)), ToMe(r=9)], ids=repr
)
@pytest.mark.parametrize("kind", ["timm-registers", "timm-dinov3", "dinov3"])
def test_held_tokens_are_what_registers_are(kind, method):
    """A model with registers, against the same without them, given them as added tokens: no reducer ranks, merges or
    drops them, and rotary positions do not turn them."""
    with_, x = built(kind), pixels()
    change = {"timm-registers": "reg_tokens", "timm-dinov3": "num_reg_tokens", "dinov3": "num_register_tokens"}[kind]
    without = KINDS[kind].build(**{change: 0})
    weights = with_.state_dict()
    name = next(key for key in weights if key.endswith(("reg_token", "register_tokens")))
    tokens = weights.pop(name)
    if kind == "timm-registers":
        place = weights["pos_embed"]
        tokens, weights["pos_embed"] = tokens + place[:, 1:5], torch.cat([place[:, :1], place[:, 5:]], 1)
    without.load_state_dict(weights, strict=False)
    methods = [] if method is None else [method]
    with torch.no_grad():
        if method is None:
            expected, source = KINDS[kind].dense(with_, x), torch.arange(64).expand(2, -1)
        else:
            with vistok.apply(with_, method) as session:
                expected = KINDS[kind].dense(with_, x)
            source = session.states[-1].source
        with vistok.apply(without, [Parts(AddTokens(tokens)), *methods]) as session:
            found = KINDS[kind].dense(without, x)
    torch.testing.assert_close(
        torch.cat([found[:, :1], found[:, -4:], found[:, 1:-4]], 1), expected, rtol=1e-4, atol=1e-4
    )
    state = session.states[-1]
    assert torch.equal(state.source, source) and (state.held, state.added) == (4, 4)
    assert state.anchor[:, -4:].eq(-1).all() and state.size[:, -4:].eq(0).all()


@anywhere
def test_tokens_come_in_at_any_block_and_stay(kind):
    model, x, prefix = built(kind), pixels(3), KINDS[kind].prefix
    tokens = rows().requires_grad_()
    methods = [Parts(AddTokens(tokens, layer=2)), TopK(keep=0.25, layers=(1, 3))]
    seen = []
    handles = [b.register_forward_hook(lambda m, a, out: seen.append(out.shape[1] - prefix)) for b in blocks(model)]
    with vistok.apply(model, methods) as session:
        found = KINDS[kind].dense(model, x)
        found[:, -3:].square().mean().backward()
    for handle in handles:
        handle.remove()
    assert session.tokens == seen == [64, 16, 19, 7, 7, 7]
    assert session.tokens == Parts(*methods[0].steps, *methods[1].steps).plan(64, DEPTH)
    assert tokens.grad.isfinite().all() and tokens.grad.abs().sum(2).gt(0).all()
    assert len(session.pictures[0].keep) == 4 and session.pictures[0].layers == {1: 16, 2: 19, 3: 7}
    assert session.restore(torch.ones(3, 7, 2), "nearest").shape == (3, 64, 2)
    model.zero_grad()


def test_free_tokens_are_ranked_as_patches_are():
    model, x = built("timm-vit"), pixels()
    method = TopK(keep=30, layers=(1,))
    for values in (rows() * 0, rows() * 9):
        add = AddTokens(values, hold=False)
        with torch.no_grad(), vistok.apply(model, [Parts(add), method]) as session:
            model(x)
        assert session.tokens == [67] + [30] * 5
        y = torch.cat([model._pos_embed(model.patch_embed(x)), values.expand(2, -1, -1)], 1)
        with torch.no_grad():
            y = model.blocks[0](y)
            q, k, _ = model.blocks[1].attn.qkv(model.blocks[1].norm1(y)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            score = (q[:, :, :1] @ k.transpose(2, 3) * 8**-0.5).softmax(-1)[:, :, 0, 1:].mean(1)
        kept = score.topk(30).indices.sort(1).values
        expected = [[i if i < 64 else -1 for i in row] for row in kept.tolist()]
        assert session.states[-1].anchor.tolist() == expected
        assert session.states[-1].held == 0


class Echo(TokenStep):
    """Puts the mean of the slots aside after each block, and adds all that lie aside after block 3."""

    def stages(self, depth):
        return range(4)

    def adds(self, stage):
        return 3 * (stage.layer == 3)

    def act(self, state, stage):
        if stage.layer == 3:
            return replace(state.add(state.aside["mean"]), aside={})
        mean = state.slots.mean(1, keepdim=True)
        return replace(state, aside={"mean": torch.cat([state.aside["mean"], mean], 1) if state.aside else mean})


@pytest.mark.parametrize("kind", ["timm-vit", "timm-eva02", "vit"])
def test_values_put_aside_come_back(kind):
    model, x = built(kind), pixels()
    outs = []
    handles = [block.register_forward_hook(lambda m, a, out: outs.append(out)) for block in blocks(model)]
    with torch.no_grad(), vistok.apply(model, [Parts(Echo()), TopK(keep=0.5, layers=(1, 3))]) as session:
        model(x)
    for handle in handles:
        handle.remove()
    assert session.tokens == [64, 32, 32, 19, 19, 19] and session.states[-1].aside == {}
    means = torch.stack([out[:, KINDS[kind].prefix :].mean(1) for out in outs[:3]], 1)
    torch.testing.assert_close(outs[3][:, -3:], means)


@pytest.mark.parametrize("kind", ["timm-vit", "timm-eva02", "dinov2-registers"])
def test_operations_with_added_tokens_are_those_that_torch_counts(kind):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = copy.deepcopy(built(kind))
    model.head = model.pooler = None
    methods = [Parts(AddTokens(rows(), layer=1), Echo()), RandomDrop(keep=0.5, layers=(1, 3))]
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), vistok.apply(model, methods) as session, sdpa_kernel(SDPBackend.MATH), counter:
        KINDS[kind].dense(model, pixels(3))
    assert session.flops == counter.get_total_flops()


@pytest.mark.parametrize("kind", ["timm-dinov3", "vit"])
def test_added_tokens_compile_to_one_graph(kind):
    from torch._dynamo.testing import CompileCounter

    model, counter = built(kind), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with vistok.apply(model, [Parts(AddTokens(rows(), layer=1), Echo()), EViT(keep=0.5, layers=(1, 3))]) as session:
        eager, tokens = forward(model, pixels(seed=1)), session.tokens
        for seed in (0, 1):
            found = forward(compiled, pixels(seed=seed))
        assert counter.frame_count == 1 and session.tokens == tokens
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(eager, found, strict=True))
    torch.compiler.reset()


def test_withholding_is_undone():
    g = torch.Generator().manual_seed(0)
    state = TokenState.start(torch.randn(2, 14, 5, generator=g), 2, (3, 4))
    state = state.add(torch.randn(2, 2, 5, generator=g), held=True).add(torch.randn(2, 3, 5, generator=g))
    assert (state.num_slots, state.held, state.added, state.untouched) == (17, 2, 5, False)
    hidden = state.withheld
    assert hidden.prefix == 4 and hidden.num_slots == 15 and hidden.held == 0
    assert torch.equal(hidden.x[:, 2:4], state.x[:, -2:]) and torch.equal(hidden.slots, state.slots[:, :15])
    again = hidden.given_back(2)
    for name in ("x", "size", "source", "anchor"):
        assert torch.equal(getattr(again, name), getattr(state, name))
    assert (again.prefix, again.held, again.added) == (2, 2, 5)
    less = hidden.keep(torch.tensor([[14, 3], [0, 12]])).given_back(2)
    assert less.anchor.tolist() == [[3, -1, -1, -1], [0, -1, -1, -1]] and torch.equal(less.x[:, -2:], state.x[:, -2:])


def test_patches_that_join_an_added_slot_give_it_a_place():
    state = TokenState.start(torch.randn(1, 5, 3), 1, (2, 2)).add(torch.randn(1, 2, 3))
    into, anchor = torch.tensor([[0, -1, 1, 1, 1, 2]]), torch.tensor([[0, 4, 5]])
    after = state.regroup(torch.zeros(1, 3, 3), into, anchor)
    assert after.anchor.tolist() == [[0, 2, -1]] and after.size.tolist() == [[1, 2, 0]]
    assert after.source.tolist() == [[0, -1, 1, 1]]


def test_tokens_for_a_block_that_is_not_there():
    with pytest.raises(ValueError, match=r"^layer: got 6, but the model has the blocks 0..5"):
        vistok.apply(built("timm-vit"), Parts(AddTokens(rows(), layer=6)))


# Dense outputs --------------------------------------------------------------------------------------------------------


@anywhere
@pytest.mark.parametrize("fill", ["zeros", "nearest"])
def test_dense_heads_get_their_map_back(kind, fill):
    model, x, prefix = built(kind), pixels(), KINDS[kind].prefix
    method = TopK(keep=0.5, layers=(1,))
    with torch.no_grad(), vistok.apply(model, method) as session:
        short = KINDS[kind].dense(model, x)
        by_session = session.restore(short, fill)
    with torch.no_grad(), vistok.apply(model, method, restore=fill) as session:
        whole = KINDS[kind].dense(model, x)
        assert whole.shape == (2, prefix + PATCHES, 32) and torch.equal(whole, by_session)
        assert all(bool(t.isfinite().all()) for t in outputs(model(x)))
    state = session.states[-1]
    rows = whole[:, prefix:]
    kept = state.source >= 0
    assert torch.equal(rows[kept], short[:, prefix:].flatten(0, 1))
    if fill == "zeros":
        assert not bool(rows[~kept].any())
        return
    for i in range(2):
        for patch in (~kept[i]).nonzero()[:, 0].tolist():
            far = [(a // 8 - patch // 8) ** 2 + (a % 8 - patch % 8) ** 2 for a in state.anchor[i].tolist()]
            assert torch.equal(rows[i, patch], short[i, prefix + far.index(min(far))])


@pytest.mark.parametrize("kind", ["timm-registers", "timm-dinov3"])
@pytest.mark.parametrize("method", [TopK(keep=0.5, layers=(1, 3)), ToMe(r=9)])
def test_intermediate_maps_are_whole_when_restored(kind, method):
    model, x, prefix = built(kind), pixels(), KINDS[kind].prefix
    asked = [dict(indices=None), dict(indices=2), dict(indices=[-1, 0, 3])]
    with torch.no_grad(), vistok.apply(model, method) as session:
        short = model.forward_intermediates(x, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True)
        normed = model.forward_intermediates(x, output_fmt="NLC", norm=True, intermediates_only=True)
        states = session.states[1:]
        assert [y.shape[1] for y, _ in short] == session.tokens
    with torch.no_grad(), vistok.apply(model, method, restore="nearest"):
        for ask, layers in zip(asked, (range(6), (4, 5), (0, 3, 5)), strict=True):
            final, maps = model.forward_intermediates(x, **ask)
            assert final.shape[1] == prefix + PATCHES and len(maps) == len(layers)
            for layer, found in zip(layers, maps, strict=True):
                whole = states[layer].unmerge(short[layer][0], "nearest")
                assert torch.equal(found, whole.transpose(1, 2).reshape(2, 32, 8, 8))
        maps = model.forward_intermediates(x, [1, 4], norm=True, stop_early=True, intermediates_only=True)
        for layer, found in zip((1, 4), maps, strict=True):
            whole = states[layer].unmerge(normed[layer], "nearest")
            assert torch.equal(found, whole.transpose(1, 2).reshape(2, 32, 8, 8))
        rows, firsts = zip(*model.forward_intermediates(x, 2, True, False, False, "NLC", True), strict=True)
        assert [y.shape[1] for y in rows] == [PATCHES] * 2 and torch.equal(firsts[1], short[5][1])


def test_intermediate_maps_of_fewer_tokens_are_refused():
    model, x = built("timm-vit"), pixels()
    with torch.no_grad():
        plain = model.forward_intermediates(x, [0, 1])[1]
        with vistok.apply(model, TopK(keep=0.25, layers=(1,))):
            assert torch.equal(model.forward_intermediates(x, [0], intermediates_only=True)[0], plain[0])
            with pytest.raises(ValueError, match=r"^output_fmt: got 'NCHW', but 16 tokens are left of 64 patches"):
                model.forward_intermediates(x, [0, 1])
        found = model.forward_intermediates(x, [0, 1], output_dict=True)["image_intermediates"]
        assert all(map(torch.equal, found, plain)) and "forward_intermediates" not in vars(model)


def test_averages_weigh_merged_tokens_by_size_when_restored():
    model, x = built("timm-average"), pixels()
    with torch.no_grad(), vistok.apply(model, ToMe(r=8), restore="zeros") as session:
        found = model(x)
        state = session.states[-1]
    with torch.no_grad(), vistok.apply(model, ToMe(r=8)):
        tokens = model.forward_features(x)[:, 1:]
        mean = (tokens * state.size[..., None]).sum(1, keepdim=True) / 64
        torch.testing.assert_close(model.head(model.fc_norm(mean[:, 0])), found)
        assert not torch.allclose(model(x), found)


def test_hidden_states_are_those_that_go_on():
    model = built("vit")
    forward_ = lambda: model(pixels(), output_hidden_states=True).hidden_states  # noqa: E731
    with torch.no_grad():
        forward_()  # transformers puts its own hooks in first
        with vistok.apply(model, TopK(keep=0.5, layers=(1, 3))):
            found = forward_()
            torch.testing.assert_close(model.layernorm(found[-1]), model(pixels()).last_hidden_state)
    assert [t.shape[1] - 1 for t in found] == [64, 64, 32, 32, 16, 16, 16]


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["timm-vit", "timm-eva", "vit", "siglip"])
@pytest.mark.parametrize("name", ["evit", "tome"])
def test_gradient_checkpointing_changes_no_gradient(kind, name):
    model = copy.deepcopy(built(kind)).train()
    grads = []
    for switch in (False, True):
        if switch:
            getattr(model, "gradient_checkpointing_enable", getattr(model, "set_grad_checkpointing", None))()
        model.zero_grad()
        torch.manual_seed(0)
        with vistok.apply(model, half(name)) as session:
            KINDS[kind].dense(model, pixels()).square().mean().backward()
        assert session.tokens == half(name).plan(PATCHES, DEPTH)
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_distributed_data_parallel(tmp_path):
    """One process: the same gradients, and no parameter that the reducer of gradients waits for in vain."""
    from torch.nn.parallel import DistributedDataParallel

    model, method = copy.deepcopy(built("timm-vit")).train(), EViT(keep=0.5, layers=(1, 3))
    with vistok.apply(model, method):
        model(pixels()).square().mean().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model)
        for _ in range(2):
            parallel.zero_grad()
            with vistok.apply(model, method):
                parallel(pixels()).square().mean().backward()
            for p, grad in zip(model.parameters(), expected, strict=True):
                torch.testing.assert_close(p.grad, grad)
    finally:
        torch.distributed.destroy_process_group()


def test_drop_path_drops_the_whole_branch_of_a_picture():
    """In the reduced block a picture whose MLP is dropped leaves it as attention left it."""
    model = KINDS["timm-registers"].build(drop_path_rate=0.9).train()
    mlps, seen = [], []
    block = model.blocks[-1]
    with vistok.apply(model, TopK(keep=0.5, layers=(DEPTH - 1,))):
        handles = [
            block.norm2.register_forward_pre_hook(lambda m, a: mlps.append(a[0])),
            block.register_forward_hook(lambda m, a, out: seen.append(out)),
        ]
        for seed in range(8):
            torch.manual_seed(seed)
            model(pixels())
        for handle in handles:
            handle.remove()
    same_ = [torch.equal(a[i], b[i]) for a, b in zip(mlps, seen, strict=True) for i in range(2)]
    assert any(same_) and not all(same_)


# Going in and out -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["timm-vit", "dinov2"])
def test_an_error_inside_leaves_the_model_clean(kind):
    model, x = built(kind), pixels()
    before, plain = hooked(model), forward(model, x)
    with pytest.raises(RuntimeError, match="boom"), vistok.apply(model, "tome", r=4):
        handle = blocks(model)[3].register_forward_pre_hook(lambda m, a: (_ for _ in ()).throw(RuntimeError("boom")))
        try:
            model(x)
        finally:
            handle.remove()
    assert hooked(model) == before and same(forward(model, x), plain)
    with vistok.apply(model, "evit", layers=(1,)) as session:
        forward(model, x)
    assert session.tokens[0] == 64 and session.tokens[-1] == 46
    assert same(forward(model, x), plain)


def test_one_session_at_a_time():
    model = built("vit-classifier")
    with vistok.apply(model, "tome"):
        for part in (model, model.vit):
            with pytest.raises(RuntimeError, match="already has a method in it"), vistok.apply(part, "tome"):
                pass
    with vistok.apply(model.vit, "tome") as session:
        forward(model, pixels())
    assert session.tokens[-1] < PATCHES


@pytest.mark.parametrize("when", ["before", "blocks"])
def test_compiled_code_follows_the_hooks(when):
    """Compiled before the session, or block by block: in it the method is there, and outside it is not."""
    model, x = built("timm-vit"), pixels()
    plain = forward(model, x)
    method = TopK(keep=0.5, layers=(1, 3))
    with vistok.apply(model, method) as session:
        expected = forward(model, x)
    whole = nn.Sequential(*model.blocks)
    if when == "before":
        run = torch.compile(model, backend="eager")
        assert same(forward(run, x), plain)
    else:
        run = model
        for block in whole:
            block.compile(backend="eager")
    try:
        for _ in range(2):
            with vistok.apply(run, method) as session:
                for a, b in zip(forward(run, x), expected, strict=True):
                    torch.testing.assert_close(a, b)
                assert session.tokens == [64, 32, 32, 16, 16, 16]
            for a, b in zip(forward(run, x), plain, strict=True):
                torch.testing.assert_close(a, b)
    finally:
        for block in whole:
            block._compiled_call_impl = None
        torch.compiler.reset()


def test_what_a_session_tells():
    model = built("timm-vit")
    session = vistok.apply(model, "evit", keep=0.5, layers=[2])
    assert session.pictures == [] and session.flops == 0
    with session, pytest.raises(RuntimeError, match="no picture has gone through"):
        _ = session.tokens
    with session:
        forward(model, pixels(2))
    assert (session.tokens_in, session.tokens_kept) == (128, 66)
    picture = session.pictures[1]
    assert picture.layers == {2: 33} and picture.grid == (8, 8) and picture.row == 1
    times = session.milliseconds
    assert 0 < times["select"] < times["total"]
    report = session.report()
    assert report["model"] == "VisionTransformer"
    assert report["methods"] == ["EViT(keep=0.5, layers=(2,), fuse=True, order='raster')"]
    assert report["flops_by_stage"]["patches"] == 2 * 2 * 64 * 3 * 16 * 32
    photograph = Image.new("RGB", (64, 48), (200, 200, 200))
    drawn = session.overlay(photograph, 1)
    assert drawn.size == (64, 48) and len(set(drawn.get_flattened_data())) >= 2
    with pytest.raises(ValueError, match=r"^tokens: got shape \(2, 5, 3\), must be \(B, 33, C\)"):
        session.restore(torch.zeros(2, 5, 3))


def test_pictures_of_another_size():
    model = KINDS["timm-vit"].build(dynamic_img_size=True)
    with torch.no_grad(), vistok.apply(model, TopK(keep=0.5, layers=(1,))) as session:
        model(torch.randn(2, 3, 32, 48))
    assert session.states[-1].grid == (8, 12) and session.tokens[-1] == 48
    model = built("clip")
    with torch.no_grad(), vistok.apply(model, TopK(keep=0.5, layers=(1,))) as session:
        model(torch.randn(2, 3, 48, 32), interpolate_pos_encoding=True)
    assert session.states[-1].grid == (12, 8)


# Wrong arguments ------------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_named():
    model = built("timm-vit")
    for given, message in (
        (dict(method="fastervlm"), r"^method: got 'fastervlm', must be the name of a system of the vit family"),
        (dict(method="topk", rate=0.5), r"^rate: not a hyper-parameter of topk"),
        (dict(method="topk", restore="mean"), r"^restore: got 'mean', must be False, 'zeros' or 'nearest'"),
        (dict(method="topk", position="keep"), r"^position, budget, reselect: are for language models"),
        (dict(method=["topk", "tome"], keep=0.5), r"^keep: got 0.5 for 2 methods, must be a list"),
        (dict(method=["topk", "tome"], keep=[0.5]), r"^keep: got 1 values for 2 methods"),
        (dict(method=TopK(), keep=0.5), r"^keep: got 0.5, but TopK\("),
        (dict(method=TopK(), layers=(1,)), r"^layers: hyper-parameters go with one method given by name"),
    ):
        with pytest.raises(ValueError, match=message):
            vistok.apply(model, **given)


def test_models_that_are_not_supported_are_named():
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.vision_transformer import ParallelScalingBlock

    swin = SwinTransformer(img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(1,), num_heads=(2,))
    with pytest.raises(UnsupportedModel, match=r"^SwinTransformer: not a vision transformer that.*SiglipVisionModel"):
        vistok.apply(swin, "tome")
    parallel = KINDS["timm-vit"].build(block_fn=ParallelScalingBlock)
    with pytest.raises(UnsupportedModel, match=r"ParallelScalingBlock.*only pre-norm blocks"):
        vistok.apply(parallel, "tome")
    hybrid = copy.deepcopy(built("timm-vit"))
    hybrid.patch_embed = nn.Identity()
    with pytest.raises(UnsupportedModel, match=r"with patches of Identity"):
        vistok.apply(hybrid, "tome")
    model = copy.deepcopy(built("vit"))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModel, match=r"flash_attention_2: attention in proportion to size needs"):
        vistok.apply(model, "tome")
    vistok.apply(model, "tome", proportional=False)


def test_masks_and_patch_dropout_of_the_callers():
    model, x = built("timm-vit"), pixels()
    with vistok.apply(model, "topk", keep=0.5, layers=(1,)), pytest.raises(ValueError, match=r"^attn_mask: a mask"):
        model(x, attn_mask=torch.zeros(2, 1, 65, 65))
    dropping = KINDS["timm-vit"].build(patch_drop_rate=0.5).train()
    with vistok.apply(dropping, "tome"), pytest.raises(ValueError, match="patch dropout must be off"):
        dropping(x)
    with vistok.apply(model, "tome"), pytest.raises(RuntimeError, match="call the model on pixels"):
        model.blocks(torch.zeros(1, 65, 32))
