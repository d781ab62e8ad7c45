"""What every method inside a vision transformer promises: each that the catalogue finds, in each kind of model."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import vistok
from tests.vit.towers import DEPTH, GRID, KINDS, PATCHES, blocks, built, half, outputs, pixels
from vistok.catalogue import Outcome, claim_of, methods
from vistok.host.vit import Stage, TokenState, ViTEvidence, ViTReducer

NAMES = [card.slug for card in methods("vit") if isinstance(vistok.create(card.slug), ViTReducer)]
"""Those that ``vistok.apply`` takes; the others are models, or parts of models, that are trained as such."""
every = pytest.mark.parametrize("name", NAMES)
anywhere = pytest.mark.parametrize("kind", KINDS)


def forward(model, x):
    with torch.no_grad():
        return outputs(model(x))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def hooked(model):
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


# In a model -----------------------------------------------------------------------------------------------------------


@every
@anywhere
def test_keeping_all_changes_nothing(name, kind):
    model, x = built(kind), pixels()
    plain = forward(model, x)
    with vistok.apply(model, half(name, keep=1.0)) as session:
        assert same(forward(model, x), plain)
    assert session.tokens == [PATCHES] * DEPTH


@every
@anywhere
def test_tokens_are_gone_and_the_model_is_as_before_after_it(name, kind):
    """Every block works on as many tokens as planned, on fused attention; prefix tokens are all there."""
    model, x, prefix = built(kind), pixels(3), KINDS[kind].prefix
    before, plain = hooked(model), forward(model, x)
    method = half(name)
    plan = method.plan(PATCHES, DEPTH)
    assert plan[-1] <= PATCHES // 2 + method.extra
    seen, fused = [], []
    watch = [block.register_forward_hook(lambda m, a, out: seen.append(out.shape[1])) for block in blocks(model)]
    with pytest.MonkeyPatch.context() as patch, vistok.apply(model, method) as session:
        attend = F.scaled_dot_product_attention
        patch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: fused.append(a[0].shape[2]) or attend(*a, **k))
        forward(model, x)
        for handle in watch:
            handle.remove()
        tokens = KINDS[kind].dense(model, x)
    assert session.tokens == plan and seen == [prefix + count for count in plan]
    assert fused[:DEPTH] == [prefix + count for count in (PATCHES, *plan[:-1])]
    assert tokens.shape[:2] == (3, prefix + plan[-1])
    assert [p.tokens_kept for p in session.pictures] == [plan[-1]] * 3
    assert hooked(model) == before and same(forward(model, x), plain)


@every
@anywhere
def test_the_map_adds_up(name, kind):
    """Each slot's size is the number of patches that ended in it, and its anchor is one of them."""
    model = built(kind)
    with vistok.apply(model, half(name)) as session:
        forward(model, pixels(3))
    for state in session.states:
        k = state.num_slots
        at = torch.where(state.source < 0, k, state.source)
        count = torch.zeros(3, k + 1).scatter_add(1, at, torch.ones(3, PATCHES))
        assert state.grid == GRID and state.source.shape == (3, PATCHES) and state.size.shape == (3, k)
        assert torch.equal(count[:, :k], state.size)
        assert torch.equal(state.source.gather(1, state.anchor), torch.arange(k).expand(3, k))
    dense = session.restore(torch.arange(3 * k * 2.0).view(3, k, 2), "nearest")
    assert dense.shape == (3, PATCHES, 2)


@every
@anywhere
def test_pictures_do_not_see_each_other(name, kind):
    model, x = built(kind), pixels(3)
    with vistok.apply(model, half(name)) as session:
        batch = forward(model, x)
        source = session.states[-1].source
        turned = forward(model, x[[2, 0, 1]])
        assert torch.equal(session.states[-1].source, source[[2, 0, 1]])
        for all_, other in zip(batch, turned, strict=True):
            torch.testing.assert_close(other, all_[[2, 0, 1]], rtol=1e-4, atol=1e-4)
        alone = forward(model, x[1:2])
        assert torch.equal(session.states[-1].source, source[1:2])
        for all_, other in zip(batch, alone, strict=True):
            torch.testing.assert_close(other, all_[1:2], rtol=1e-4, atol=1e-4)


@every
@anywhere
def test_trains(name, kind):
    """Gradients reach every parameter that they reach without it; nothing is added to the model or taken from it."""
    model = copy.deepcopy(built(kind)).train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = {name_: set(m.__dict__) for name_, m in model.named_modules()}
    sum(t.float().square().mean() for t in outputs(model(pixels()))).backward()
    reached = {name_ for name_, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with vistok.apply(model, half(name)):
        sum(t.float().square().mean() for t in outputs(model(pixels()))).backward()
        now = {name_: p.grad for name_, p in model.named_parameters() if p.grad is not None}
        assert set(now) == reached and all(bool(g.isfinite().all()) for g in now.values())
        shadowed = {"forward_intermediates"}  # timm's, which no hook reaches
        assert {n: set(m.__dict__) - shadowed for n, m in model.named_modules()} == attributes
        assert set(model.state_dict()) == set(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@every
@pytest.mark.parametrize("kind", ["timm-dinov3", "vit"])
def test_compiles_to_one_graph_once(name, kind):
    from torch._dynamo.testing import CompileCounter

    model, x = built(kind), pixels()
    plain, counter = forward(model, x), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with vistok.apply(model, half(name)) as session:
        eager, tokens = forward(model, x), session.tokens
        for seed in (0, 1, 0):
            found = forward(compiled, pixels(seed=seed))
        assert counter.frame_count == 1 and session.tokens == tokens
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(eager, found, strict=True))
    assert same(forward(compiled, x), plain)
    torch.compiler.reset()


@every
@pytest.mark.parametrize("kind", ["timm-vit", "vit", "siglip"])
def test_half_precision(name, kind):
    model = copy.deepcopy(built(kind)).bfloat16()
    with vistok.apply(model, half(name)) as session:
        found = forward(model, pixels().bfloat16())
    assert all(t.dtype == torch.bfloat16 and bool(t.isfinite().all()) for t in found)
    assert session.tokens == half(name).plan(PATCHES, DEPTH)


@every
@pytest.mark.parametrize("kind", ["timm-dinov3", "vit"])
def test_autocast(name, kind):
    model = built(kind)
    with torch.autocast("cpu", torch.bfloat16), vistok.apply(model, half(name)) as session:
        found = forward(model, pixels())
    assert all(bool(t.isfinite().all()) for t in found)
    assert session.tokens == half(name).plan(PATCHES, DEPTH)


# By itself ------------------------------------------------------------------------------------------------------------


def case(prefix=1, b=3, n=20, c=8, heads=2, d=4, grid=(4, 5), same_tokens=False, layer=1, dtype=torch.float32):
    """A state after some merging, and the evidence of a block."""
    g = torch.Generator().manual_seed(0)
    x, q, k, v = (torch.randn(b, *shape, generator=g) for shape in ((prefix + n, c), *3 * ((heads, prefix + n, d),)))
    if same_tokens:
        x, (q, k, v) = x[:, :1].expand_as(x), (t[:, :, :1].expand_as(t) for t in (q, k, v))
    x, q, k, v = (t.to(dtype) for t in (x, q, k, v))
    stage = Stage(layer, DEPTH, n)
    evidence = ViTEvidence(q, k, d**-0.5, prefix, prefix > 0, stage, read_values=lambda: v)
    return TokenState.start(x, prefix, grid), evidence


@every
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("alike", [False, True])
def test_counts_and_prefix(name, prefix, alike):
    method = vistok.create(name)
    state, evidence = case(prefix, same_tokens=alike)
    for count in (10, 13, 19):
        after = method.reduce(state, evidence, count)
        assert after.num_slots == count + method.extra and after.x.shape == (3, prefix + count + method.extra, 8)
        assert torch.equal(after.x[:, :prefix], state.x[:, :prefix])
        assert torch.equal(after.source.gather(1, after.anchor), torch.arange(after.num_slots).expand(3, -1))
        again = method.reduce(state, evidence, count)
        assert torch.equal(again.x, after.x) and torch.equal(again.source, after.source)


@every
def test_counts_fit_any_number_of_tokens(name):
    method = vistok.create(name)
    layer = method.stages(12)[0]
    for tokens in (1, 2, 3, 7, 49, 196, 1369):
        assert 1 <= method.count(tokens, Stage(layer, 12, tokens)) <= tokens
    assert all(1 <= n <= 197 for n in method.plan(196, 12))


@every
def test_is_a_method_of_the_family(name):
    method = vistok.create(name)
    assert isinstance(method, ViTReducer)
    assert method == vistok.create(name) and hash(method) == hash(vistok.create(name))
    assert "keep" in vistok.card(name).hyper


@every
def test_claim_can_hold_and_can_fail(name):
    """On made-up figures, the same for whatever has a method in it."""

    def judged(figure):
        trial = SimpleNamespace(
            accuracy=lambda method=None, keep=None: 0.9 if method is None else 0.5 if keep else figure,
            mask_score=lambda method: SimpleNamespace(precision=figure, chance=0.5),
        )
        outcome = claim_of(name)(trial)
        assert isinstance(outcome, Outcome) and outcome.value == pytest.approx(figure) and outcome.metric
        return outcome.holds

    assert {judged(figure) for figure in (0.1, 0.5, 0.898, 0.95)} == {True, False}
