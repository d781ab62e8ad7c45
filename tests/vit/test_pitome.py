"""PiToMe, line by line of its sheet."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import vistok
from tests.vit.test_contract import case
from tests.vit.towers import DEPTH, KINDS, PATCHES, built, pixels
from vistok.host.vit import Stage, TokenState, ViTEvidence
from vistok.vit.pitome import PiToMe, energy


def shown(keys, layer=1, prefix=0, depth=6):
    """A state and the evidence of one picture with ``keys`` (K, d)."""
    n = len(keys)
    evidence = ViTEvidence(keys[None, None], keys[None, None], 1.0, prefix, prefix > 0, Stage(layer, depth, n - prefix))
    x = torch.randn(1, n, 8, generator=torch.Generator().manual_seed(2))
    return TokenState.start(x, prefix, (1, n - prefix)), evidence


def merged_by_loops(x, keys, size, r, margin, alpha=1.0, parity="paper", split_all=False):
    """Groups by their destination, from the sheet: one picture, no prefix. Returns {dst: members} and energies."""
    t = len(keys)
    unit = keys / keys.norm(dim=1, keepdim=True)
    s = [[float(unit[i] @ unit[j]) for j in range(t)] for i in range(t)]

    def f(c):
        return (c if parity == "paper" else c - margin) if c >= margin else alpha * (math.exp(c - margin) - 1)

    e = [sum(f(c) for c in row) / t for row in s]
    ranked = sorted(range(t), key=lambda i: -e[i])
    free = ranked if split_all else ranked[: 2 * r]
    a, b = free[::2], free[1::2]
    pairs = sorted(((max(s[i][j] for j in b), i, max(b, key=lambda j: s[i][j])) for i in a), key=lambda p: -p[0])
    groups = {i: [i] for i in range(t)}
    for _, i, j in pairs[:r]:
        groups[j] += groups.pop(i)
    means = {j: sum(size[i] * x[i] for i in g) / sum(size[i] for i in g) for j, g in groups.items()}
    return groups, means, e


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("r", [1, 4, 10])
@pytest.mark.parametrize(("parity", "layer"), [("paper", 1), ("paper", 4), ("authors", 1), ("authors", 4)])
def test_merges_as_brute_force_does(prefix, r, parity, layer):
    state, evidence = case(prefix, layer=layer)
    state = replace(state, size=torch.arange(1.0, 21).expand(3, -1))
    method = PiToMe(margin=0.5, alpha=0.7, parity=parity)
    after = method.reduce(state, evidence, 20 - r)
    assert torch.equal(after.x[:, :prefix], state.x[:, :prefix])
    margin = 0.5 * (1 - layer / DEPTH)
    for i in range(3):
        keys = evidence.k[i].mean(0)[prefix:]
        split_all = parity == "authors" and layer < DEPTH // 2
        args = state.slots[i], keys, state.size[i], r, margin, 0.7, parity, split_all
        groups, means, e = merged_by_loops(*args)
        torch.testing.assert_close(energy(keys[None], margin, 0.7, parity)[0], torch.tensor(e))
        assert len(groups) == after.num_slots == 20 - r
        for slot, (place, group) in enumerate(sorted(groups.items())):
            torch.testing.assert_close(after.slots[i, slot], means[place])
            assert {int(j) for j in after.source[i, group]} == {slot} and int(after.anchor[i, slot]) == place
            assert float(after.size[i, slot]) == sum(float(state.size[i, j]) for j in group)


def test_the_two_energies_can_rank_differently():
    """A neighbour just above the margin is worth all of its cosine by the paper, next to nothing by the code."""
    angles = torch.tensor([0.0, 0.44, 2.0, 2.5, 3.0, 1.53], dtype=torch.float64)
    keys = torch.stack([angles.cos(), angles.sin()], 1)[None]
    paper, authors = energy(keys, 0.9), energy(keys, 0.9, parity="authors")
    above = (torch.cos(angles[:, None] - angles[None]) >= 0.9).sum(1)[None].double()
    torch.testing.assert_close(paper - authors, 0.9 * above / 6)
    assert paper.argsort().tolist() != authors.argsort().tolist()


def test_isolated_tokens_survive_a_crowd_exactly():
    g = torch.Generator().manual_seed(0)
    crowd = torch.eye(16)[0] + 0.05 * torch.randn(12, 16, generator=g)
    keys = torch.cat([crowd, torch.eye(16)[1:9]])[torch.randperm(20, generator=g)]
    alone = [i for i in range(20) if float(keys[i, 0]) < 0.5]
    for layer in (0, 3, 5):
        for parity in ("paper", "authors"):
            e = energy(keys[None], 0.9 * (1 - layer / 6), parity=parity)[0]
            assert set(e.argsort()[:8].tolist()) == set(alone)
        state, evidence = shown(keys, layer)
        after = PiToMe().reduce(state, evidence, 14)
        for i in alone:
            slot = int(after.source[0, i])
            assert torch.equal(after.slots[0, slot], state.slots[0, i]) and float(after.size[0, slot]) == 1


def test_identical_tokens_merge_without_change_of_value():
    keys = torch.cat([torch.eye(8)[:1].expand(8, -1), torch.eye(8)[1:5]])
    state, evidence = shown(keys)
    state = state.with_slots(keys[None])
    after = PiToMe().reduce(state, evidence, 8)
    assert torch.equal(after.unmerge(), state.slots) and after.size.max() > 1


def test_mass_is_kept():
    model = built("timm-deit-distilled")
    with torch.no_grad(), vistok.apply(model, PiToMe(ratio=0.8)) as session:
        model(pixels())
    last = session.states[-1]
    assert bool((last.source >= 0).all()) and torch.equal(last.size.sum(1), torch.full((2,), 64.0))
    state, evidence = case(prefix=2)
    after = PiToMe().reduce(state, evidence, 13)
    torch.testing.assert_close((after.size[..., None] * after.slots).sum(1), state.slots.sum(1))


def test_an_order_of_patches_makes_no_difference():
    """Unlike ToMe, which splits by place."""
    state, evidence = case(prefix=0)
    turn = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    turned = replace(evidence, q=evidence.q[:, :, turn], k=evidence.k[:, :, turn])

    def values(method, state, evidence):
        slots = method.reduce(state, evidence, 13).slots
        return slots.gather(1, slots[..., :1].argsort(1).expand_as(slots))

    for name, same in (("pitome", True), ("tome", False)):
        method = vistok.create(name)
        one, two = values(method, state, evidence), values(method, state.with_slots(state.slots[:, turn]), turned)
        assert torch.allclose(one, two, atol=1e-5) is same


def test_numbers_by_block():
    assert PiToMe(ratio=1.0).plan(196, 12) == [196] * 12
    n = 196
    for left in PiToMe(ratio=0.9).plan(196, 12):
        n -= math.floor(n - n * 0.9)
        assert left == n
    assert PiToMe(ratio=0.97).count(32, Stage(0, 12, 196)) == 32, "nothing to merge is no error"
    assert PiToMe(ratio=0.5).plan(9, 4) == [5, 3, 2, 1]
    assert PiToMe(keep=0.25).plan(PATCHES, DEPTH) == vistok.create("tome", keep=0.25).plan(PATCHES, DEPTH)


def test_large_tokens_are_heard_in_proportion():
    model = KINDS["timm-vit"].build(pos_embed="none")
    x = pixels(1)[:, :, :4, :4].repeat(1, 1, 8, 8)
    with torch.no_grad():
        plain = model(x)
        with vistok.apply(model, PiToMe(ratio=0.7)):
            torch.testing.assert_close(model(x), plain, rtol=1e-4, atol=1e-4)
        with vistok.apply(model, PiToMe(ratio=0.7, proportional=False)):
            assert not torch.allclose(model(x), plain, rtol=1e-2, atol=1e-2)


def test_wrong_arguments_are_named():
    for name, wrong in (("ratio", 0.4), ("ratio", 1.1), ("keep", 0), ("margin", 2.0), ("alpha", -1.0), ("parity", "x")):
        with pytest.raises(ValueError, match=rf"^{name}: got"):
            PiToMe(**{name: wrong})
