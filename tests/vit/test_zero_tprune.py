"""Zero-TPrune, line by line of its sheet."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vistok
from tests.vit.test_contract import case
from tests.vit.towers import DEPTH, PATCHES, built, pixels
from vistok.core.score import pagerank
from vistok.host.vit import Stage
from vistok.vit.zero_tprune import ZeroTPrune, importance, search, similarity_prune

ALL = (0.0, float("inf"))


def maps(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=g, dtype=torch.float64)).softmax(-1)


# Importance -----------------------------------------------------------------------------------------------------------


def test_walk_keeps_its_mass_and_ends_in_the_left_eigenvector():
    graph = maps(2, 3, 9, 9)
    for steps in range(8):
        torch.testing.assert_close(pagerank(graph, steps).sum(-1), torch.ones(2, 3).double())
    values, vectors = torch.linalg.eig(graph.transpose(-1, -2))
    left = vectors.gather(-1, values.real.argmax(-1)[..., None, None].expand(2, 3, 9, 1))[..., 0].real
    torch.testing.assert_close(pagerank(graph, 200), left / left.sum(-1, keepdim=True))


def test_even_map_star_and_one_step():
    even = torch.full((1, 2, 6, 6), 1 / 6)
    assert torch.allclose(importance(even, 1, 5, ALL), torch.full((1, 5), 1 / 6))
    star = torch.full((1, 1, 6, 6), 0.02)
    star[..., 4] = 0.9
    assert int(importance(star, 0, 3, ALL).argmax()) == 4
    graph = maps(2, 1, 7, 7)
    torch.testing.assert_close(importance(graph, 2, 1, ALL), graph.mean(2)[:, 0, 2:])


@pytest.mark.parametrize("damping", [1.0, 0.85])
def test_walk_among_some_is_the_walk_on_their_own_map(damping):
    graph, mask = maps(2, 3, 8, 8), torch.tensor([[1, 0, 1, 1, 0, 1, 1, 0], [0, 1, 1, 1, 1, 1, 0, 0]]).bool()
    found = pagerank(graph, 4, damping, mask=mask[:, None])
    for i in range(2):
        own = graph[i][:, mask[i]][:, :, mask[i]]
        own = own / own.sum(-1, keepdim=True)
        torch.testing.assert_close(found[i][:, mask[i]], pagerank(own, 4, damping))
        assert not bool(found[i][:, ~mask[i]].any())
    torch.testing.assert_close(pagerank(graph, 4, damping, mask=mask.new_ones(1, 1, 8)), pagerank(graph, 4, damping))


def test_flat_and_collapsed_heads_are_left_out_and_the_others_fused_by_root_mean_square():
    """By loops over heads; the range decides which of four heads count, and all do where none is in it."""
    graph = maps(2, 4, 9, 9)
    graph[:, 0] = 1 / 9
    graph[:, 1] = 1e-4 / 8
    graph[:, 1, :, 5] = 1 - 1e-4
    rank = pagerank(graph, 3)[:, :, 1:]
    for low, high, used in ((0.01, 0.7, (2, 3)), (0, 100, (0, 1, 2, 3)), (5, 100, (1,)), (50, 60, (0, 1, 2, 3))):
        for i in range(2):
            spread = [(rank[i, h] / rank[i, h].mean()).var(correction=0) for h in range(4)]
            counted = tuple(h for h in range(4) if low <= spread[h] <= high) or (0, 1, 2, 3)
            assert counted == used, "the example is not one"
            want = (sum(rank[i, h] ** 2 for h in used) / len(used)) ** 0.5
            torch.testing.assert_close(importance(graph, 1, 3, (low, high))[i], want)


def test_a_sink_does_not_decide():
    """A head that gives all to one patch would put it first; the filter passes it over."""
    graph = maps(1, 3, 12, 12)
    graph[:, 0] = 1e-5
    graph[:, 0, :, 7] = 1 - 11e-5
    assert int(importance(graph, 1, 3, ALL).argmax()) == 6
    torch.testing.assert_close(
        importance(graph, 1, 3, (0.0, 0.7)).argsort(), importance(graph[:, 1:], 1, 3, ALL).argsort()
    )


# Similarity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [8, 9])
@pytest.mark.parametrize("r", [0, 1, 3, 4])
def test_similarity_prune_is_brute_force(n, r):
    g = torch.Generator().manual_seed(n)
    keys, score = torch.randn(2, n, 4, generator=g), torch.rand(2, n, generator=g)
    found = similarity_prune(keys, score, r)
    for i in range(2):
        ranked = sorted(range(n), key=lambda j: -float(score[i, j]))
        high, low = ranked[: n - n // 2], ranked[n - n // 2 :]
        best = {u: max(float(torch.cosine_similarity(keys[i, u], keys[i, v], 0)) for v in high) for u in low}
        gone = sorted(low, key=lambda u: -best[u])[:r]
        assert found[i].tolist() == sorted(set(range(n)) - set(gone))
        assert set(high) <= set(found[i].tolist())


def test_copies_of_important_tokens_go_first():
    g = torch.Generator().manual_seed(0)
    keys, score = torch.randn(1, 10, 6, generator=g), torch.arange(10.0, 0, -1)[None]
    keys[0, 8] = 3 * keys[0, 2]
    assert 8 not in similarity_prune(keys, score, 1)[0].tolist()
    with pytest.raises(ValueError, match=r"^r: got 6"):
        similarity_prune(keys, score, 6)


# The method -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize(("count", "alike"), [(12, 4), (12, 0), (12, 8), (10, 10)])
def test_i_s_i_by_its_steps(prefix, count, alike):
    """Rank; drop by similarity; rank again among the rest, on their own map; drop the lowest."""
    state, evidence = case(prefix)
    method = ZeroTPrune(counts={1: (20 - count - alike, alike)}, iterations=(4, 4, 4))
    after = method.reduce(state, evidence, count)
    for i in range(3):
        graph, keys = evidence.attention[i : i + 1], evidence.keys[i : i + 1, prefix:]
        first = importance(graph, prefix, 4, (0.01, 0.7))
        left = similarity_prune(keys, first, alike)[0].tolist()
        inside = [*range(prefix), *(prefix + j for j in left)]
        own = graph[:, :, inside][..., inside]
        second = importance(own / own.sum(-1, keepdim=True), prefix, 4, (0.01, 0.7))[0]
        kept = sorted(left[int(j)] for j in second.argsort(descending=True)[:count])
        assert after.anchor[i].tolist() == kept
        assert torch.equal(after.slots[i], state.slots[i, kept]) and torch.equal(
            after.x[i, :prefix], state.x[i, :prefix]
        )


def test_i_s_by_its_steps():
    state, evidence = case()
    after = ZeroTPrune(counts={1: (5, 3)}, order="IS").reduce(state, evidence, 12)
    for i in range(3):
        score = importance(evidence.attention[i : i + 1], 1, 30, (0.01, 0.7))
        first = score.argsort(dim=1, descending=True)[:, :15]
        left = similarity_prune(evidence.keys[i : i + 1, 1:].gather(1, first[..., None].expand(-1, -1, 4)),
                                score.gather(1, first), 3)  # fmt: skip
        assert after.anchor[i].tolist() == sorted(first[0, left[0]].tolist())


def test_an_order_of_patches_makes_no_difference():
    state, evidence = case(prefix=1)
    turn = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    tokens = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + turn])
    turned = replace(evidence, q=evidence.q[:, :, tokens], k=evidence.k[:, :, tokens])
    one, two = ZeroTPrune().reduce(state, evidence, 11), ZeroTPrune().reduce(state, turned, 11)
    for i in range(3):
        assert set(turn[two.anchor[i]].tolist()) == set(one.anchor[i].tolist())


def test_steps_by_depth():
    state, evidence = case(prefix=0)
    method = ZeroTPrune(iterations=(7, 3, 1), similar=0.0, variance=ALL)
    for depth, steps in ((12, [7] * 3 + [3] * 6 + [1] * 3), (6, [7, 7, 3, 3, 3, 1]), (1, [7]), (2, [7, 3])):
        for layer, number in enumerate(steps):
            shown = replace(evidence, stage=Stage(layer, depth, 20))
            score = importance(evidence.attention, 0, number, ALL)
            want = score.argsort(dim=1, descending=True, stable=True)[:, :7].sort(1).values
            assert torch.equal(method.reduce(state, shown, 7).anchor, want)


def test_counts():
    method = ZeroTPrune(counts={3: (10, 4), 0: (0, 5)})
    assert method.plan(PATCHES, DEPTH) == [59, 59, 59, 45, 45, 45] and method.stages(DEPTH) == [0, 3]
    assert method == ZeroTPrune(counts=((0, (0, 5)), (3, (10, 4)))) and hash(method) == hash(replace(method))
    model, x = built("timm-vit"), pixels()
    with torch.no_grad():
        plain = model(x)
        with vistok.apply(model, ZeroTPrune(counts={})):
            assert torch.equal(model(x), plain)
        with vistok.apply(model, method) as session:
            model(x)
    assert session.tokens == [59, 59, 59, 45, 45, 45]


# The search -----------------------------------------------------------------------------------------------------------


def test_search_takes_the_best_plan_within_the_budget():
    seen = []

    def score(plan):
        seen.append(plan)
        return dict(plan.counts)[2][1] / (1 + dict(plan.counts)[2][0])  # likes similarity at block 2

    best = search(
        score, PATCHES, DEPTH, 0.7, layers=(1, 2, 4), draws=30, seed=1, method=ZeroTPrune(iterations=(3, 2, 1))
    )
    assert len(seen) > 20 and len(set(seen)) == len(seen) and best.iterations == (3, 2, 1)
    shares = [sum(plan.plan(PATCHES, DEPTH)) / (PATCHES * DEPTH) for plan in seen]
    assert max(shares) <= 0.7 and min(shares) > 0.6, "as little goes as the budget asks for"
    assert score(best) == max(map(score, seen[:]))
    assert all(plan.stages(DEPTH) == [1, 2, 4] for plan in seen)
    assert best == search(score, PATCHES, DEPTH, 0.7, layers=(1, 2, 4), draws=30, seed=1, method=best)


def test_search_on_a_model():
    model, x = built("timm-vit"), pixels(4)
    with torch.no_grad():
        whole = model(x).argmax(1)

        def agreement(plan):
            with vistok.apply(model, plan):
                return (model(x).argmax(1) == whole).float().mean().item()

        best = search(agreement, PATCHES, DEPTH, 0.8, draws=4)
        with vistok.apply(model, best) as session:
            model(x)
    assert sum(session.tokens) <= 0.8 * PATCHES * DEPTH


def test_wrong_arguments_are_named():
    for name, wrong in (
        ("similar", 1.5),
        ("iterations", (1, 0, 1)),
        ("variance", (0.7, 0.01)),
        ("order", "SI"),
        ("counts", {1: (-1, 0)}),
        ("keep", 0),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: got"):
            ZeroTPrune(**{name: wrong})
    with pytest.raises(ValueError, match=r"^budget: got 1"):
        search(lambda plan: 0, 64, 6, 1)
    with pytest.raises(ValueError, match=r"^budget: got 0\.3, but none of 5 plans"):
        search(lambda plan: 0, 64, 6, 0.3, layers=(5,), draws=5)
    with pytest.raises(ValueError, match=r"^draws: got 0"):
        search(lambda plan: 0, 64, 6, 0.5, draws=0)
