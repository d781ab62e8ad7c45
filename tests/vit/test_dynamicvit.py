"""DynamicViT: predictors, hiding while training, dropping in evaluation, the loss, and the claim."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import vistok
from tests.vit.made_trial import MadeTrial, tiny_vit
from tests.vit.test_contract import case, forward, hooked, same
from tests.vit.towers import DEPTH, KINDS, PATCHES, WIDTH, blocks, built, pixels
from vistok.host import UnsupportedModel
from vistok.host.vit import Stage, TokenState
from vistok.host.vit.joined import Joined
from vistok.vit import dynamicvit
from vistok.vit.dynamicvit import DynamicPruning, DynamicViT, Losses, Predictor, claim, lesson, train

SYSTEM = DynamicViT(keep=0.5, layers=(2, 4))
some = pytest.mark.parametrize("kind", ["timm-vit", "timm-deit-distilled", "timm-dinov3", "vit-classifier", "siglip"])


def made(kind, system=SYSTEM):
    torch.manual_seed(1)
    return system.method(built(kind))


# Predictor ------------------------------------------------------------------------------------------------------------


def test_half_of_a_token_is_its_own_and_half_the_mean_of_those_that_are_seen():
    torch.manual_seed(0)
    predictor, x = Predictor(8), torch.randn(2, 5, 8)
    seen = torch.tensor([[1.0, 0, 1, 1, 0], [1, 1, 1, 1, 1]])
    found = predictor(x, seen)
    for i in range(2):
        z = predictor.in_conv(x[i])
        mean = z[seen[i] > 0, 4:].mean(0)
        by_hand = predictor.out_conv(torch.stack([torch.cat([row[:4], mean]) for row in z]))
        torch.testing.assert_close(found[i], by_hand)
    torch.testing.assert_close(found.exp().sum(2), torch.ones(2, 5))
    assert bool(predictor(x, torch.zeros(2, 5)).isfinite().all())


def test_parameters_bear_the_released_names():
    names = dict(DynamicPruning(16, layers=(3,)).named_parameters())
    assert {name: tuple(p.shape) for name, p in names.items() if "weight" in name} == {
        "score_predictor.0.in_conv.0.weight": (16,),
        "score_predictor.0.in_conv.1.weight": (16, 16),
        "score_predictor.0.out_conv.0.weight": (8, 16),
        "score_predictor.0.out_conv.2.weight": (4, 8),
        "score_predictor.0.out_conv.4.weight": (2, 4),
    }


# Evaluation -----------------------------------------------------------------------------------------------------------


@some
def test_tokens_are_gone_in_evaluation(kind):
    """Before blocks 2 and 4, whose attention runs on what is left; the most probable stay."""
    model, x, method, prefix = built(kind), pixels(3), made(kind), KINDS[kind].prefix
    plan = [64, 32, 32, 16, 16, 16]
    assert method.plan(PATCHES, DEPTH) == plan and not method.training
    before, plain = hooked(model), forward(model, x)
    seen, given = [], []
    watch = [block.register_forward_hook(lambda m, a, out: seen.append(out.shape[1])) for block in blocks(model)]
    watch.append(blocks(model)[2].register_forward_pre_hook(lambda m, a: given.append(a[0])))
    with vistok.apply(model, method) as session:
        batch = forward(model, x)
        seen_then = list(seen)
        turned = forward(model, x[[2, 0, 1]])
    for handle in watch:
        handle.remove()
    assert session.tokens == plan and seen_then == [prefix + count for count in plan]
    for all_, other in zip(batch, turned, strict=True):
        torch.testing.assert_close(other, all_[[2, 0, 1]], rtol=1e-4, atol=1e-4)
    assert hooked(model) == before and same(forward(model, x), plain)


def test_the_most_probable_stay():
    state, evidence = case(layer=1)
    torch.manual_seed(0)
    method = DynamicPruning(8, 0.5, (2, 4)).eval()
    after = method.reduce(state, evidence, 7)
    score = method.score_predictor[0](state.slots, torch.ones(3, 20))[..., 0]
    assert torch.equal(after.anchor, score.topk(7).indices.sort(1).values)
    assert torch.equal(after.slots, state.slots.gather(1, after.anchor[..., None].expand(-1, -1, 8)))
    assert torch.equal(after.x[:, :1], state.x[:, :1]) and after.visible is None


@pytest.mark.parametrize(
    ("keep", "patches", "left"),
    [(0.7, 196, [137, 96, 67]), (0.5, 144, [72, 36, 18]), (1.0, 144, [144] * 3), (0.1, 4, [1] * 3)],
)
def test_counts_are_powers_of_the_rate_rounded_down(keep, patches, left):
    method = DynamicPruning(8, keep)
    assert list(method.stages(12)) == [2, 5, 8]
    now = [patches]
    for layer in (2, 5, 8):
        now.append(method.count(now[-1], Stage(layer, 12, patches)))
    assert now[1:] == left


@pytest.mark.parametrize("train", [False, True])
def test_keeping_all_changes_nothing(train):
    model, x = built("timm-vit"), pixels()
    method = made("timm-vit", DynamicViT(keep=1.0, layers=(2, 4))).train(train)
    with vistok.apply(model, method) as session:
        found = forward(model, x)
    assert same(found, forward(model, x)) and session.tokens == [PATCHES] * DEPTH
    with pytest.raises(RuntimeError, match="decisions: nothing was hidden"):
        method.decisions(session.states)


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


# Training -------------------------------------------------------------------------------------------------------------


@some
def test_hiding_while_training_is_dropping_in_evaluation(kind, monkeypatch):
    """If what is drawn is what evaluation chooses, those that stay come out the same in either mode."""
    model, x, method, prefix = built(kind), pixels(), made(kind), KINDS[kind].prefix
    with torch.no_grad(), vistok.apply(model, method) as session:
        dropped, states = KINDS[kind].dense(model, x), session.states
    steps = [(states[layer].source >= 0).float() for layer in (2, 4)]
    drawn = iter(steps)
    monkeypatch.setattr(dynamicvit, "gumbel_softmax", lambda score, hard: torch.stack([d := next(drawn), 1 - d], 2))
    with torch.no_grad(), vistok.apply(model, method.train()) as session:
        hidden = KINDS[kind].dense(model, x)
    assert session.tokens == [PATCHES] * DEPTH and hidden.shape[1] == prefix + PATCHES
    assert all(map(torch.equal, method.decisions(session.states), steps))
    at = torch.cat([torch.arange(prefix).expand(2, -1), prefix + states[-1].anchor], 1)
    at = at[..., None].expand(-1, -1, WIDTH)
    torch.testing.assert_close(hidden.gather(1, at), dropped, rtol=1e-3, atol=1e-3)


def test_gradient_of_a_choice_is_that_of_masked_attention():
    """Against the paper's softmax, exp times decision over its sum: also for tokens that are hidden."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 6, 4) for _ in range(3))
    weight = torch.randn(2, 3, 6, 4)
    state = TokenState.start(torch.zeros(2, 6, 12), 1, (1, 5))
    ours, theirs = (torch.tensor([[1.0, 0, 1, 0, 1], [0, 1, 1, 1, 0]], requires_grad=True) for _ in range(2))
    state = TokenState(**vars(state) | {"visible": ours})
    bias = state.key_bias(torch.float32)
    assert bias is not None and bias.shape == (2, 1, 1, 6) and bool((bias[..., 0] == 0).all())
    (scaled_dot_product_attention(q, k, v, attn_mask=bias) * weight).sum().backward()
    decision = torch.cat([torch.ones(2, 1), theirs], 1)[:, None, None]
    terms = (q @ k.transpose(2, 3) / 2).exp() * decision
    ((terms / terms.sum(-1, keepdim=True)) @ v * weight).sum().backward()
    assert bool((theirs.grad != 0).all())
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


def test_gradients_reach_every_predictor_and_hidden_stay_hidden():
    model = copy.deepcopy(built("timm-vit")).train()
    method = SYSTEM.method(model)
    assert method.training
    with vistok.apply(model, method) as session:
        logits = model(pixels(4))
        first, second = method.decisions(session.states)
    assert first.shape == second.shape == (4, PATCHES)
    for one in (first, second):
        torch.testing.assert_close(one, one.round(), atol=1e-6, rtol=0)
    assert 0 < second.sum() < first.sum() < first.numel() and bool((second <= first + 1e-6).all())
    cross_entropy(logits, torch.arange(4)).backward()
    grads = {name: p.grad for name, p in method.named_parameters()}
    assert all(g is not None and bool(g.isfinite().all()) and bool((g != 0).any()) for g in grads.values())
    assert all(p.grad is not None for p in model.parameters())


def test_a_kernel_without_masks_is_named():
    vit = copy.deepcopy(built("vit"))
    method = SYSTEM.method(vit).train()
    vit.config._attn_implementation = "flash_attention_2"
    session = vistok.apply(vit, method)
    vit.config._attn_implementation = "sdpa"  # for the blocks before
    with pytest.raises(UnsupportedModel, match="hiding tokens needs an additive mask"), session:
        vit(pixels())
    assert not hooked(vit)


def test_the_share_that_is_drawn_is_the_probability():
    state, evidence = case(b=50, layer=1)
    torch.manual_seed(0)
    method = DynamicPruning(8, 0.5, (2, 4))
    expected = method.score_predictor[0](state.slots, torch.ones(50, 20))[..., 0].exp().detach()
    drawn = torch.stack([method.reduce(state, evidence, 10).visible for _ in range(100)]).detach()
    assert (drawn.mean(0) - expected).abs().max() < 0.3 and abs(float(drawn.mean() - expected.mean())) < 0.01


def test_other_methods_carry_what_is_hidden():
    visible = torch.tensor([[1.0, 0, 1, 1, 0]])
    state = TokenState(**vars(TokenState.start(torch.zeros(1, 6, 2), 1, (1, 5))) | {"visible": visible})
    kept = state.keep(torch.tensor([[4, 0, 1]]))
    assert kept.visible.tolist() == [[1, 0, 0]] and kept.bare.visible is kept.visible
    into, anchor = torch.tensor([[0, 0, 1, 1, 2]]), torch.tensor([[1, 2, -1]])
    merged = state.regroup(torch.zeros(1, 3, 2), into, anchor)
    assert merged.visible.tolist() == [[0, 1, 1]]
    bias = merged.key_bias(torch.float32)[0, 0, 0].exp()
    torch.testing.assert_close(bias, torch.tensor([1, 2e-6, 2, 1]))
    torch.testing.assert_close(
        merged.key_bias(torch.float32, False)[0, 0, 0].exp(), torch.tensor([1, 1e-6, 1, 1]), atol=1e-9, rtol=1e-5
    )


# Loss -----------------------------------------------------------------------------------------------------------------


def test_loss_by_hand_and_no_gradient_for_the_teacher():
    torch.manual_seed(0)
    logits, theirs = (torch.randn(2, 5, requires_grad=True) for _ in range(2))
    tokens, rows = (torch.randn(2, 4, 3, requires_grad=True) for _ in range(2))
    labels = torch.tensor([3, 0])
    chosen = [torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0]]), torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]])]
    for one in chosen:
        one.requires_grad_()
    parts = DynamicViT(0.5, (1, 2), lambda_distill=3.0, lambda_ratio=5.0).loss(
        logits, labels, tokens, chosen, theirs, rows
    )
    p, q = theirs.softmax(1), logits.softmax(1)
    kept = (tokens[0, 0] - rows[0, 0]).square().mean() + (tokens[1, 1] - rows[1, 1]).square().mean()
    torch.testing.assert_close(parts.labels, cross_entropy(logits, labels))
    torch.testing.assert_close(parts.logits, 3 * (p * (p / q).log()).sum() / 2)
    torch.testing.assert_close(parts.tokens, 3 * kept / 2)
    torch.testing.assert_close(parts.ratio, torch.tensor(5 * (0.25**2 / 2 + 0) / 2))
    torch.testing.assert_close(parts.total, parts.labels + parts.logits + parts.tokens + parts.ratio)
    parts.total.backward()
    assert theirs.grad is None and rows.grad is None and logits.grad is not None
    assert bool((tokens.grad[0, 1:] == 0).all()) and bool((tokens.grad[0, 0] != 0).all())
    assert bool((chosen[0].grad[0] > 0).all()) and bool((chosen[0].grad[1] == 0).all())


def test_nothing_kept_at_all_is_no_error():
    chosen = [torch.zeros(2, 4)]
    zeros = torch.zeros(2, 5)
    parts = DynamicViT(0.5, (1,)).loss(
        zeros, torch.tensor([0, 1]), torch.ones(2, 4, 3), chosen, zeros, torch.zeros(2, 4, 3)
    )
    assert isinstance(parts, Losses) and parts.tokens == 0 and parts.ratio == 0.5


def test_a_training_step_learns_the_rate():
    """Predictors alone learn to keep as many as they should, on a network that stays as it is."""
    vit = tiny_vit(depth=3).train().requires_grad_(False)
    system = DynamicViT(0.5, (1, 2), lambda_distill=0.0, lambda_ratio=20.0)
    torch.manual_seed(0)
    method = system.method(vit)
    for predictor in method.score_predictor:
        predictor.out_conv[4].bias.data = torch.tensor([2.0, -2.0])
    model, step = Joined(vit, method).train(), lesson(system, tiny_vit(depth=3))
    optimizer = torch.optim.Adam(method.parameters(), 1e-2)
    images = torch.randint(0, 256, (16, 24, 24, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batch = SimpleNamespace(pixels=images.permute(0, 3, 1, 2) / 127.5 - 1, label=torch.arange(16) % 5)
    losses = []
    for _ in range(25):
        loss, right = step(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert 0 <= right <= 1
    assert losses[-1] < losses[0] - 2


# As a module ----------------------------------------------------------------------------------------------------------


def test_joined_is_one_module():
    vit = copy.deepcopy(built("vit-classifier"))
    method = SYSTEM.method(vit)
    model = Joined(vit, method)
    x = pixels()
    with torch.no_grad(), vistok.apply(vit, method):
        expected = vit(x).logits
    assert torch.equal(model(x).logits, expected) and not hooked(vit)
    assert {"method." + name for name in method.state_dict()} < set(model.state_dict())
    assert model.train().method.training and not model.eval().method.training
    again = Joined(copy.deepcopy(vit), SYSTEM.method(vit))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x).logits, expected)
    built_ = SYSTEM.build(vit)
    assert built_.vit is not vit and built_(x).logits.shape == expected.shape
    with pytest.raises(ValueError, match="method: got TopK"):
        Joined(vit, vistok.create("topk"))


def test_built_as_the_model_is():
    vit = tiny_vit(depth=12).bfloat16().train()
    method = vistok.create("dynamicvit").method(vit)
    assert method.training and all(p.dtype == torch.bfloat16 for p in method.parameters())
    with vistok.apply(vit, method):
        assert vit(torch.zeros(2, 3, 24, 24).bfloat16()).dtype == torch.bfloat16
    assert method.layers == (3, 6, 9) and DynamicViT().method(tiny_vit()).layers == (1, 2, 3)
    assert len(method.score_predictor) == 3 and method.score_predictor[0].in_conv[1].weight.shape == (16, 16)


def test_errors_name_the_argument():
    for keep in (0, 1.5, True, "half"):
        with pytest.raises(ValueError, match=r"^keep: got"):
            DynamicViT(keep=keep)
    for layers in ((), (0, 2), (2, 2), (4, 2), (1.5,)):
        with pytest.raises(ValueError, match=r"^layers: got"):
            DynamicViT(layers=layers)
    with pytest.raises(ValueError, match=r"layers: got \[0, 1, 2\], must be block numbers from 1"):
        DynamicViT().method(tiny_vit(depth=3))
    with pytest.raises(ValueError, match=r"layers: got 9, but the model has the blocks 0..5"):
        vistok.apply(built("timm-vit"), DynamicPruning(WIDTH))


def test_predictors_are_trained_first_and_then_all():
    moved = []

    class Trial(MadeTrial):
        def fit(self, model, steps, **given):
            before = {name: p.clone() for name, p in model.named_parameters()}
            super().fit(model, steps, **given)
            changed = (name for name, p in model.named_parameters() if not torch.equal(p, before[name]))
            moved.append({name.split(".")[0] for name in changed})

    trial = Trial()
    system = DynamicViT(keep=0.5)
    model = system.build(trial.classifier)
    train(trial, system, model, 4)
    assert moved == [{"method"}, {"method", "vit"}] and all(p.requires_grad for p in model.parameters())
    assert not any(p.grad is not None for p in trial.classifier.parameters())


def test_claim():
    def judged(plain, pruned):
        trial = MadeTrial(plain, pruned)
        outcome = claim(trial, steps=3)
        assert (outcome.baseline, outcome.value) == (plain, pruned) and "12 of 36 tokens" in outcome.note
        (_, losses), (model, alone), (again, others) = trial.trained
        assert isinstance(model, Joined) and again is model and losses[0] != others[0]
        assert [len(one) for one in (losses, alone, others)] == [3, 1, 2]
        return outcome.holds

    assert judged(0.9, 0.9) and not judged(0.9, 0.85)
