"""dependencyvit: what its sheet says must hold, trees, the network and the claim."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from vistok.attend.dependencyvit import (
    DependencyBlock,
    DependencyNet,
    DependencyViT,
    ReversedAttention,
    claim,
    dependency_map,
    dependency_tree,
    reversed_attention,
)
from vistok.bench.attend_trial import AttendTrial


def made(n=7, b=2, heads=3, d=4, seed=0):
    rng = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, b, heads, n, d, dtype=torch.float64, generator=rng).unbind()
    selector = torch.randn(b, n, heads, dtype=torch.float64, generator=rng).softmax(2)
    return q, k, v, selector, torch.rand(b, n, dtype=torch.float64, generator=rng)


def test_equal_to_a_loop():
    q, k, v, selector, message = made()
    b, heads, n, d = q.shape
    out, dependency = torch.zeros_like(v), torch.zeros(b, n, n, dtype=torch.float64)
    for p, h, i in itertools.product(range(b), range(heads), range(n)):
        sends = (k[p, h] @ q[p, h, i] * d**-0.5).softmax(0)
        for j in range(n):
            weight = sends[j] * selector[p, i, h] * message[p, i]
            out[p, h, j] += weight * v[p, h, i]
            dependency[p, j, i] += weight
    torch.testing.assert_close(reversed_attention(q, k, v, selector, message), out)
    torch.testing.assert_close(dependency_map(q, k, selector, message), dependency)


def test_without_gates_it_is_the_transposed_map():
    q, k, v, *_ = made()
    weights = (q @ k.transpose(2, 3) / 2).softmax(3)
    torch.testing.assert_close(reversed_attention(q, k, v), weights.transpose(2, 3) @ v)


def test_a_token_sends_what_its_gate_lets():
    q, k, v, selector, message = made()
    dependency = dependency_map(q, k, selector, message)
    torch.testing.assert_close(dependency.sum(1), message)
    torch.testing.assert_close(dependency.sum(), message.sum())
    received = reversed_attention(q, k, torch.ones_like(v), selector, message)[..., 0].sum(1)
    torch.testing.assert_close(received, dependency.sum(2))


def test_gradients():
    given = tuple(x.requires_grad_() for x in made(4, 1, 2, 3))
    assert torch.autograd.gradcheck(reversed_attention, given, fast_mode=True)


def test_large_logits():
    """One token that all send to: its log-sum-exp is log N, and nothing overflows."""
    q, k, v, selector, message = (x.float() for x in made(50))
    out = reversed_attention(q * 100, k * 100, v, selector, message)
    exact = reversed_attention(*(x.double() for x in (q * 100, k * 100, v, selector, message)))
    assert bool(out.isfinite().all())
    torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-3)


def test_a_token_whose_gate_is_shut_changes_no_other():
    q, k, v, selector, message = made()
    message[:, 3] = 0
    out = reversed_attention(q, k, v, selector, message)
    q, v, selector = q.clone(), v.clone(), selector.clone()
    q[:, :, 3], v[:, :, 3], selector[:, 3] = 9, 9, 1 / 3
    torch.testing.assert_close(reversed_attention(q, k, v, selector, message), out, rtol=0, atol=1e-12)


def test_messages_only_fall_and_selectors_sum_to_one():
    net = DependencyNet(8, 2, 12, 3, 3, {}, channels=1)
    x = net.patch_embed(torch.randn(2, 1, 8, 8)).flatten(2).transpose(1, 2)
    message = x.new_ones(2, 16)
    for block in net.blocks:
        *_, selector, after = block.attn.parts(block.norm1(x), message)
        torch.testing.assert_close(selector.sum(2), torch.ones(2, 16))
        x, following, _ = block(x, message)
        assert bool((following < message).all()) and bool((following > 0).all())
        torch.testing.assert_close(after, following)
        message = following


@pytest.mark.parametrize("score", ["message", "received"])
def test_pruning(score):
    torch.manual_seed(0)
    block, x, message = DependencyBlock(12, 3, 2, 0.5, score), torch.randn(2, 7, 12), torch.rand(2, 7)
    out, after, keep = block(x, message)
    q, k, _, selector, sent = block.attn.parts(block.norm1(x), message)
    value = sent if score == "message" else dependency_map(q, k, selector, sent).sum(2)
    assert keep.tolist() == value.topk(3).indices.sort(1).values.tolist()
    block.keep = 1.0
    whole, messages, everything = block(x, message)
    assert everything.tolist() == [[*range(7)]] * 2
    torch.testing.assert_close(out, whole.gather(1, keep[..., None].expand(-1, -1, 12)))
    torch.testing.assert_close(after, messages.gather(1, keep))


def test_share_of_each_block():
    keeps = DependencyViT(prune=0.16).keeps()
    assert list(keeps) == [1, 4, 7, 10]
    assert [round(k, 2) for k in keeps.values()] == [0.84, 0.81, 0.76, 0.69]
    assert math.prod(keeps.values()) == pytest.approx(0.36)
    assert DependencyViT().keeps() == {}
    counts, n = [], 100
    for keep in keeps.values():
        block = DependencyBlock(12, 3, 2, keep)
        n = block(torch.randn(1, n, 12), torch.rand(1, n))[2].shape[1]
        counts.append(n)
    assert counts[0] == 84 and counts == [84, 68, 52, 36]


def best_by_trial(edges):
    """The best tree under the root that receives most, of all there are."""
    n = len(edges)
    root = int((edges - torch.diag(edges.diag())).sum(1).argmax())
    best, found = -1.0, None
    for parents in itertools.product(range(n), repeat=n):
        tree = [-1 if i == root else p for i, p in enumerate(parents)]
        if any(p == i for i, p in enumerate(tree)):
            continue
        for i in range(n):
            steps, node = 0, i
            while node != root and steps <= n:
                node, steps = tree[node], steps + 1
            if node != root:
                break
        else:
            value = sum(float(edges[p, i]) for i, p in enumerate(tree) if p >= 0)
            if value > best:
                best, found = value, tree
    return found


def test_trees_are_the_best_ones():
    edges = torch.rand(12, 5, 5, generator=torch.Generator().manual_seed(0)).double()
    for one, tree in zip(edges, dependency_tree(edges).tolist(), strict=True):
        assert tree == best_by_trial(one)
    # Cycles within cycles: 1 and 2, then with 3.
    nested = torch.tensor([[0, 2, 1, 1], [0, 0, 9, 6], [0, 9, 0, 8], [0, 1, 7, 0]]).double()
    nested[0] += 20 * (torch.tensor([0, 1, 0, 0]) > 0)
    assert dependency_tree(nested[None])[0].tolist() == best_by_trial(nested)
    assert dependency_tree(torch.zeros(1, 1, 1)).tolist() == [[-1]]


@pytest.mark.parametrize("n", [30, 60])
def test_trees_reach_every_token(n):
    for tree in dependency_tree(torch.rand(3, n, n, generator=torch.Generator().manual_seed(n))).tolist():
        assert tree.count(-1) == 1
        for node in range(n):
            for _ in range(n):
                node = tree[node] if node >= 0 else node
            assert node == -1


def test_network():
    torch.manual_seed(0)
    net = DependencyNet(16, 4, 12, 4, 3, DependencyViT(prune=0.2, prune_at=(0, 2)).keeps(), num_classes=5)
    x = torch.randn(2, 3, 16, 16)
    logits = net(x)
    logits.square().sum().backward()
    assert logits.shape == (2, 5)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    tokens, message, places = net.forward_features(x)
    assert tokens.shape == (2, 9, 12) and message.shape == (2, 9) and bool((places[:, 1:] > places[:, :-1]).all())
    torch.testing.assert_close(net(x)[:1], net(x[:1]))
    (last,) = DependencyNet(16, 4, 12, 1, 3, {}, features_only=True)(x)
    assert last.shape == (2, 12, 4, 4)


@pytest.mark.parametrize(("size", "width"), [("tiny", 192), ("small", 384)])
def test_sizes(size, width):
    with torch.device("meta"):
        net = DependencyViT(size, prune=0.16).build()
    assert net.head.in_features == width and len(net.blocks) == 12 and net.blocks[0].attn.heads == 12
    assert [i for i, block in enumerate(net.blocks) if block.keep < 1] == [1, 4, 7, 10]


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="heads: got 5"):
        ReversedAttention(12, 5)
    with pytest.raises(ValueError, match="score: got 'best'"):
        DependencyBlock(12, 3, keep=0.5, score="best")(torch.randn(1, 4, 12), torch.rand(1, 4))
    with pytest.raises(ValueError, match="size: got 'huge'"):
        DependencyViT("huge").build()
    with pytest.raises(ValueError, match="prune: got"):
        DependencyViT(prune=0.3).build()
    with pytest.raises(ValueError, match="patch: got 3"):
        DependencyNet(8, 3, 12, 1, 3, {})
    with pytest.raises(ValueError, match="features_only: got True"):
        DependencyViT(prune=0.1).build(features_only=True)


@pytest.mark.parametrize(("message", "holds"), [(0.7, True), (0.55, False), (0.3, False)])
def test_the_claim_can_hold_and_can_fail(message, holds):
    class Trial(AttendTrial):
        drawn = iter((0.4, 0.6))

        def accuracy(self, model, change=None):
            first = model.blocks[0]
            return 0.9 if first.keep == 1 else message if first.score == "message" else next(self.drawn)

    outcome = claim(Trial(), steps=1, draws=2)
    assert outcome.holds is holds and (outcome.baseline, outcome.value) == (0.5, message)
    assert "5 of 16 tokens left" in outcome.note and "with all 90.0%" in outcome.note
    assert "the best of 2 draws 60.0%" in outcome.note
