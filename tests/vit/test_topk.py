"""Top-k and random patches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vistok
from tests.vit.test_contract import case
from tests.vit.towers import DEPTH, PATCHES, built, pixels
from vistok.vit.random_drop import RandomDrop, _scrambled
from vistok.vit.topk import TopK


def brute_force_row(evidence):
    """The class token's softmax over all tokens, head by head, picture by picture; prefix columns left out."""
    out = []
    for q, k in zip(evidence.q, evidence.k, strict=True):
        out.append(torch.stack([(qh[0] @ kh.T * evidence.scale).softmax(-1) for qh, kh in zip(q, k, strict=True)]))
    return torch.stack(out)[:, :, evidence.prefix :]


@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_the_best_by_class_attention_stay(prefix):
    state, evidence = case(prefix)
    score = brute_force_row(evidence).mean(1)
    after = TopK().reduce(state, evidence, 7)
    for i in range(3):
        best = sorted(sorted(range(20), key=lambda j: -float(score[i, j]))[:7])
        assert after.anchor[i].tolist() == best
        assert torch.equal(after.slots[i], state.slots[i, best])
        dropped = [j for j in range(20) if j not in best]
        assert bool((after.source[i, dropped] == -1).all())


def test_the_whole_map_and_the_keys():
    """Also with grouped keys and a bias: what a block's attention would have computed."""
    evidence = case(prefix=2)[1]
    bias = torch.rand(3, 1, 1, 22)
    grouped = replace(evidence, k=evidence.k[:, :1], bias=bias)
    whole = (evidence.q @ evidence.k[:, :1].transpose(2, 3) * evidence.scale + bias).softmax(-1)
    torch.testing.assert_close(grouped.attention, whole)
    torch.testing.assert_close(grouped.class_row, whole[:, :, 0, 2:])
    torch.testing.assert_close(grouped.received, whole.mean((1, 2))[:, 2:])
    headless = replace(grouped, class_token=False)
    torch.testing.assert_close(headless.class_row, whole.mean(2)[:, :, 2:])
    torch.testing.assert_close(evidence.keys, evidence.k.mean(1))


def test_without_class_token_the_attention_received_ranks():
    state, evidence = case(prefix=0)
    whole = (evidence.q @ evidence.k.transpose(2, 3) * evidence.scale).softmax(-1)
    score = whole.mean((1, 2))
    torch.testing.assert_close(evidence.class_row.mean(1), score)
    torch.testing.assert_close(evidence.received, score)
    after = TopK().reduce(state, evidence, 7)
    assert torch.equal(after.anchor, score.topk(7).indices.sort().values)


def test_an_order_of_patches_makes_no_difference():
    model, x = built("timm-vit"), pixels()
    with torch.no_grad(), vistok.apply(model, TopK(keep=0.5, layers=(1,))) as session:
        model(x)
        kept = session.states[-1].source >= 0
        swapped = x.unflatten(3, (8, 4)).flip(3).flatten(3)  # columns of patches mirrored
        position = model.pos_embed.clone()
        turned = torch.cat([position[:, :1], position[:, 1:].view(1, 8, 8, -1).flip(2).flatten(1, 2)], 1)
        model.pos_embed.data.copy_(turned)
        try:
            model(swapped)
        finally:
            model.pos_embed.data.copy_(position)
        assert torch.equal((session.states[-1].source >= 0).view(2, 8, 8).flip(2).flatten(1), kept)


@pytest.mark.parametrize(
    ("keep", "left"), [(0.7, [45, 32, 23]), (1.0, [64] * 3), (20, [20] * 3), (0.001, [1] * 3), (100, [64] * 3)]
)
def test_keep_is_a_share_rounded_up_at_each_block_or_a_number(keep, left):
    plan = TopK(keep=keep, layers=(0, 2, 4)).plan(PATCHES, DEPTH)
    assert plan == [n for n in left for _ in range(2)]


@pytest.mark.parametrize("made", [TopK, RandomDrop])
def test_wrong_arguments_are_named(made):
    for keep in (0, 1.5, -1, True, "half"):
        with pytest.raises(ValueError, match=r"^keep: got"):
            made(keep=keep)
    for layers in ((-1,), (1, 1), (0.5,)):
        with pytest.raises(ValueError, match=r"^layers: got"):
            made(layers=layers)
    with pytest.raises(ValueError, match=r"layers: got 9, but the model has the blocks 0..5"):
        vistok.apply(built("timm-vit"), made(layers=(3, 9)))


@pytest.mark.parametrize(("depth", "layers"), [(12, [3, 6, 9]), (24, [6, 12, 18]), (4, [1, 2, 3]), (1, [0])])
def test_blocks_are_those_after_each_quarter_unless_given(depth, layers):
    assert list(TopK().stages(depth)) == layers


def test_random_places_depend_on_seed_and_block_only():
    state, evidence = case()
    one = RandomDrop(seed=3).reduce(state, evidence, 8)
    assert torch.equal(one.anchor, one.anchor[:1].expand(3, -1))
    assert torch.equal(one.anchor, RandomDrop(seed=3).reduce(state, evidence, 8).anchor)
    assert not torch.equal(one.anchor, RandomDrop(seed=4).reduce(state, evidence, 8).anchor)
    assert not torch.equal(one.anchor, RandomDrop(seed=3).reduce(state, case(layer=2)[1], 8).anchor)


def test_random_places_are_uniform():
    """Over 2,000 seeds each of 20 patches stays 40% of the time, give or take five standard deviations (5.5 points)."""
    state, evidence = case(b=1)
    stays = torch.zeros(20)
    for seed in range(2000):
        stays[RandomDrop(seed=seed).reduce(state, evidence, 8).anchor[0]] += 1 / 2000
    assert bool(((stays - 0.4).abs() < 0.055).all())
    places = torch.arange(100_000)
    assert len(_scrambled(places).unique()) == 100_000 and bool((_scrambled(places) >= 0).all())


def test_without_a_seed_each_picture_and_pass_draws_anew():
    state, evidence = case()
    torch.manual_seed(0)
    first, second = (RandomDrop(seed=None).reduce(state, evidence, 8).anchor for _ in range(2))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, second)
