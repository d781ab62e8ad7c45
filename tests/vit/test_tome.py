"""ToMe in a vision transformer."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import vistok
from tests.vit.test_contract import case
from tests.vit.towers import DEPTH, PATCHES, built, pixels
from vistok.host.vit import Stage
from vistok.vit.tome import ToMe


def brute_force(x, keys, size, prefix, r):
    """Groups of token numbers (prefix counted) and their means, one picture, as the paper's appendix has it."""
    t = len(x)
    unit = keys / keys.norm(dim=1, keepdim=True)
    a, b = list(range(0, t, 2)), list(range(1, t, 2))
    edges = []
    for i in a:
        free = [j for j in b if j >= prefix]
        if i >= prefix and free:
            best = max(free, key=lambda j: (float(unit[i] @ unit[j]), -j))
            edges.append((float(unit[i] @ unit[best]), i, best))
    groups = {i: [i] for i in range(t)}
    for _, i, j in sorted(edges, key=lambda e: (-e[0], e[1]))[:r]:
        groups[j] += groups.pop(i)
    means = {j: sum(size[i] * x[i] for i in g) / sum(size[i] for i in g) for j, g in groups.items()}
    return groups, means


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("r", [1, 4, 7])
def test_merges_as_brute_force_does(prefix, r):
    state, evidence = case(prefix)
    after = ToMe().reduce(state, evidence, 20 - r)
    again = ToMe().reduce(after, case(prefix, n=20 - r, grid=(1, 20 - r))[1], 20 - 2 * r if r < 7 else 7)
    assert torch.equal(again.size.sum(1), torch.full((3,), 20.0))
    for i in range(3):
        size = torch.ones(prefix + 20)
        groups, means = brute_force(state.x[i], evidence.k[i].mean(0), size, prefix, r)
        for slot, (place, group) in enumerate(sorted(groups.items())):
            torch.testing.assert_close(after.x[i, slot], means[place])
            if slot >= prefix:
                assert {int(s) for s in after.source[i, [g - prefix for g in group]]} == {slot - prefix}
                assert int(after.anchor[i, slot - prefix]) == place - prefix
                assert float(after.size[i, slot - prefix]) == len(group)


def test_mass_is_kept():
    """In the model: no patch is lost, and the prefix is as before."""
    model = built("timm-deit-distilled")
    with torch.no_grad(), vistok.apply(model, ToMe(r=9)) as session:
        model(pixels())
    last = session.states[-1]
    assert bool((last.source >= 0).all()) and torch.equal(last.size.sum(1), torch.full((2,), 64.0))
    state, evidence = case(prefix=2)
    after = ToMe().reduce(state, evidence, 13)
    torch.testing.assert_close((after.size[..., None] * after.slots).sum(1), state.slots.sum(1))


def test_large_tokens_are_heard_in_proportion():
    """With the bias, attention to merged tokens that are copies of one another is that of the plain model.

    All patches alike: every merge is exact, so the class token's output must not change, and does without the bias.
    """
    from tests.vit.towers import KINDS

    model = KINDS["timm-vit"].build(pos_embed="none")
    x = pixels(1)[:, :, :4, :4].repeat(1, 1, 8, 8)
    with torch.no_grad():
        plain = model(x)
        with vistok.apply(model, ToMe(r=10)) as session:
            torch.testing.assert_close(model(x), plain, rtol=1e-4, atol=1e-4)
        assert session.tokens == [54, 44, 34, 24, 14, 7]
        with vistok.apply(model, ToMe(r=10, proportional=False)):
            assert not torch.allclose(model(x), plain, rtol=1e-2, atol=1e-2)


def test_r_by_block():
    def fewer(made, patches=PATCHES, depth=DEPTH):
        plan = [patches, *made.plan(patches, depth)]
        return [a - b for a, b in pairwise(plan)]

    assert fewer(ToMe(r=5)) == [5] * 6
    assert fewer(ToMe(r=5, inflect=-1)) == [10, 8, 6, 4, 2, 0]
    assert fewer(ToMe(r=5, inflect=1)) == [0, 2, 4, 6, 8, 10]
    assert fewer(ToMe(r=40)) == [32, 16, 8, 4, 2, 1], "at most half of the tokens find a partner"
    assert sum(fewer(ToMe(keep=0.25))) == 48 and set(fewer(ToMe(keep=0.25))) == {8}
    assert ToMe(keep=10).plan(PATCHES, DEPTH)[-1] == 10 and fewer(ToMe(keep=1.0)) == [0] * 6
    assert ToMe().count(1, Stage(0, 1, 1)) == 1


def test_wrong_arguments_are_named():
    for wrong in (-1, 1.5, True):
        with pytest.raises(ValueError, match=r"^r: got"):
            ToMe(r=wrong)
    with pytest.raises(ValueError, match=r"^inflect: got 2"):
        ToMe(inflect=2)
    with pytest.raises(ValueError, match=r"^keep: got 0"):
        ToMe(keep=0)
