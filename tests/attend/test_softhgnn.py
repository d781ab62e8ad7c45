"""softhgnn: what its sheet says must hold, the module in a timm ViT, and the claim."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn.functional import cross_entropy, gelu, linear

from vistok.attend.softhgnn import HyperedgeGenerator, SoftHGNN, SoftHypergraph, balances, claim
from vistok.bench.attend_trial import AttendTrial


def module(edges=4, dim=12, heads=3, **how):
    torch.manual_seed(0)
    net = SoftHypergraph(dim, edges, heads, **how).double().eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return net


def tokens(b=3, n=10, dim=12):
    return torch.randn(b, n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_hand(net, x, fixed, topk):
    """One picture after the other, all hyperedges under a mask, as the paper writes it. Output and weights."""
    gen = net.edge_generator
    outs, all_weights = [], []
    for picture in x:
        dim = picture.shape[1]
        context = torch.cat([picture.mean(0), picture.max(0).values])
        shift = linear(context, gen.context_net.weight, gen.context_net.bias)
        prototypes = gen.prototype_base + shift.view(-1, dim)
        z = linear(picture, gen.pre_head_proj.weight, gen.pre_head_proj.bias)
        width = dim // gen.heads
        logits = sum(
            z[:, h * width : (h + 1) * width] @ prototypes[:, h * width : (h + 1) * width].T / width**0.5
            for h in range(gen.heads)
        )
        logits = logits / gen.heads
        keep = torch.zeros(len(prototypes), dtype=torch.bool)
        keep[:fixed] = True
        keep[fixed + logits[:, fixed:].sum(0).topk(topk).indices] = True
        weights = logits.softmax(0) * keep
        edges = gelu(linear(weights.T @ picture, net.edge_proj[0].weight, net.edge_proj[0].bias))
        edges = edges * keep[:, None]
        outs.append(picture + gelu(linear(weights @ edges, net.node_proj[0].weight, net.node_proj[0].bias)))
        all_weights.append(weights)
    return torch.stack(outs), torch.stack(all_weights)


@pytest.mark.parametrize(("dynamic", "topk"), [(0, 0), (6, 2), (6, 0), (6, 6)])
def test_gathered_equal_to_masked_by_hand(dynamic, topk):
    net, x = module(dynamic=dynamic, topk=topk), tokens()
    out, weights = by_hand(net, x, 4, topk)
    torch.testing.assert_close(net(x), out)
    edges = net.edge_generator(x)
    torch.testing.assert_close(edges.dense(4 + dynamic), weights)
    assert edges.index.shape == (3, 4 + topk) and bool((edges.index[:, :4] == torch.arange(4)).all())


def test_columns_sum_to_one_and_the_others_are_zero():
    edges = module(dynamic=5, topk=2).edge_generator(tokens())
    torch.testing.assert_close(edges.incidence.sum(1), torch.ones(3, 6, dtype=torch.float64))
    dense = edges.dense(9)
    assert bool(((dense != 0).any(1).sum(1) == 6).all())


def test_all_dynamic_are_the_dense_module():
    sparse, x = module(4, dynamic=3, topk=3), tokens()
    dense = module(7)
    dense.load_state_dict(sparse.state_dict())
    torch.testing.assert_close(sparse(x), dense(x))


def test_equivariant_to_the_order_of_tokens():
    net, x = module(dynamic=5, topk=2), tokens()
    order = torch.randperm(10)
    torch.testing.assert_close(net(x[:, order]), net(x)[:, order])


def test_padding_takes_part_in_nothing():
    net, x = module(dynamic=5, topk=2), tokens()
    padded = torch.cat([x, 100 * torch.ones_like(x[:, :3])], 1)
    mask = (torch.arange(13) < 10).expand(3, 13)
    torch.testing.assert_close(net(padded, mask)[:, :10], net(x))
    assert bool(net(padded, mask).isfinite().all())


def scored(scores, topk, parity="paper"):
    """The loss of balance of these scores (B, dynamic)."""
    gen = HyperedgeGenerator(4, 1, 1, scores.shape[1], topk, parity=parity)
    return gen._choose(scores)


def test_balance_of_even_use_and_of_collapse():
    even = torch.eye(6).repeat(2, 1) + torch.eye(6).roll(1, 0).repeat(2, 1)
    assert scored(even, 2)[1].item() == pytest.approx(0, abs=1e-12)
    collapsed = torch.zeros(5, 6)
    collapsed[:, :2] = 1
    r = 2 / 6
    assert scored(collapsed, 2)[1].item() == pytest.approx((2 * (1 - r) ** 2 + 4 * r**2) / 6)


def test_balance_has_a_gradient_that_evens_use_and_as_released_none():
    scores = torch.zeros(5, 6, requires_grad=True)
    loss = scored(scores, 2)[1]  # ties: all pictures use the first two
    (grad,) = torch.autograd.grad(loss, scores)
    assert bool((grad[:, :2] > 0).all()) and bool((grad[:, 2:] < 0).all())
    released = scored(scores, 2, "authors")[1]
    assert not released.requires_grad and released.item() == pytest.approx(loss.item())


def test_balance_can_be_trained():
    """From a start where nearly all pictures use the same hyperedges."""
    torch.manual_seed(0)
    gen = HyperedgeGenerator(12, 0, 3, 8, 2, rate=0.0)
    with torch.no_grad():
        gen.prototype_base[:2] += gen.pre_head_proj.bias * 8
    x = torch.randn(64, 10, 12)
    optimizer = torch.optim.Adam(gen.parameters(), 3e-3)
    losses = []
    for _ in range(100):
        loss = gen(x).balance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_no_tensor_is_of_tokens_by_tokens_or_of_all_hyperedges():
    net, sizes = module(2, dynamic=40, topk=1), []
    x = tokens(1, 2000)

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Seen(), torch.no_grad():
        net(x)
    assert max(sizes) == 2000 * 12


def test_dropout_in_training_alone():
    net, x = module(rate=0.5), tokens()
    assert torch.equal(net(x), net(x))
    net.train()
    assert not torch.equal(net(x), net(x))


def test_after_a_vit_and_its_loss():
    torch.manual_seed(0)
    vit = VisionTransformer(8, 2, 1, 10, "avg", 24, 2, 3, class_token=False)
    system = SoftHGNN(edges=2, dynamic=6, topk=2, balance_weight=0.5)
    net = system.after(vit).eval()
    x, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    assert len(vit.blocks) == 2 and len(net.blocks) == 3
    with balances(net) as found:
        logits = net(x)
    assert len(found) == 1 and not net.blocks[2].edge_generator._forward_hooks
    torch.testing.assert_close(system.loss(net, x, labels), cross_entropy(logits, labels) + 0.5 * found[0])
    system.loss(net.train(), x, labels).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.blocks[2].parameters())
    torch.testing.assert_close(system.loss(vit.eval(), x, labels), cross_entropy(vit(x), labels))


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="heads: got 5"):
        SoftHGNN(heads=5).build(12)
    with pytest.raises(ValueError, match="topk: got 3"):
        SoftHGNN(dynamic=2, topk=3).build(12)
    with pytest.raises(ValueError, match="topk: got 0"):
        SoftHGNN(edges=0).build(12)
    with pytest.raises(ValueError, match="parity: got 'x'"):
        SoftHGNN(parity="x").build(12)


@pytest.mark.parametrize("better", [True, False])
def test_the_claim_can_hold_and_can_fail(better):
    class Trial(AttendTrial):
        def accuracy(self, model, change=None):
            return 0.8 if isinstance(model.blocks[-1], SoftHypergraph) == better else 0.6

    outcome = claim(Trial(), steps=2, seeds=1)
    assert outcome.holds is better and "2 steps" in outcome.note
