"""STViT and STViT-R: what the sheet says must hold, the whole networks and the claim."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import unfold
from torch.utils.flop_counter import FlopCounterMode

from tests.vit.made_trial import MadeTrial, tiny_vit
from vistok.vit.stvit_semantic import (
    CrossAttention,
    Dumbbell,
    Recover,
    SemanticTokens,
    SemanticTokenViT,
    claim,
    neighbourhoods,
)


def test_count_does_not_hang_on_the_content():
    tokens = SemanticTokens(8, 2, (14, 14))
    assert tokens.num_tokens == 36
    for x in (torch.randn(2, 196, 8), torch.zeros(2, 196, 8), 1e3 * torch.randn(2, 196, 8)):
        assert tokens(x).shape == (2, 36, 8)
        assert tokens(x).isfinite().all()


def test_raster_order_of_the_whole_map():
    """Centre (r, c) of the map of centres is the maximum of its own cell of the picture."""
    tokens = SemanticTokens(1, 1, (6, 4), window=2, samples=2, neighbourhood=3)
    x = torch.arange(24.0).view(1, 24, 1)
    ordered = tokens._raster(tokens.centres(x))
    assert ordered.flatten().tolist() == list(range(24))  # 2x2 samples of 2x2 windows: every token, in raster order
    tokens = SemanticTokens(1, 1, (8, 8), window=4, samples=2, neighbourhood=6)
    ordered = tokens._raster(tokens.centres(torch.arange(64.0).view(1, 64, 1))).flatten().tolist()
    assert ordered == [(2 * r + 1) * 8 + 2 * c + 1 for r in range(4) for c in range(4)]


def test_recovery_with_scales_of_nothing_leaves_the_map():
    recover = Recover(8, 2, layer_scale=0.0)
    x = torch.randn(2, 49, 8)
    assert torch.equal(recover(x, torch.randn(2, 9, 8)), x)


def test_constant_map_pools_to_itself():
    tokens = SemanticTokens(8, 2, (14, 14))
    x = torch.randn(1, 1, 8).expand(1, 196, 8)
    assert torch.equal(tokens.centres(x), x[:, :36].reshape(1, 4, 9, 8))


def test_centres_see_themselves_and_a_hundred_tokens():
    """A row of attention sums to 1: where all values are alike, the attention gives just that value."""
    tokens = SemanticTokens(8, 2, (14, 14), layer_scale=1.0)
    seen = []
    tokens.generate.attn.register_forward_pre_hook(lambda _, given: seen.append([tuple(t.shape) for t in given]))
    tokens.local(torch.randn(3, 196, 8))
    assert seen == [[(12, 9, 8), (12, 109, 8)]]
    attention = tokens.generate.attn
    y = torch.randn(1, 1, 8).expand(1, 109, 8)
    expected = attention.proj(attention.kv(y)[..., 8:])[:, :9]
    torch.testing.assert_close(attention(torch.randn(1, 9, 8), y), expected)


def test_neighbourhoods_are_the_released_ones_at_14():
    index = torch.arange(196.0).view(1, 1, 14, 14)
    assert torch.equal(neighbourhoods((14, 14), 7, 10), unfold(index, 10, stride=4)[0].T.long())


@pytest.mark.parametrize(
    ("grid", "window", "side"), [((28, 21), 7, 10), ((6, 6), 6, 9), ((12, 4), 4, 5), ((3, 9), 3, 3)]
)
def test_neighbourhoods_hold_their_window(grid, window, side):
    found = neighbourhoods(grid, window, side)
    across = grid[1] // window
    for number, places in enumerate(found.tolist()):
        rows = range(number // across * window, number // across * window + window)
        columns = range(number % across * window, number % across * window + window)
        assert {r * grid[1] + c for r in rows for c in columns} <= set(places)
        assert len(set(places)) == len(places) and max(places) < grid[0] * grid[1]


def test_shifting_by_a_window_shifts_the_centres():
    tokens = SemanticTokens(8, 2, (28, 28), window=7, samples=2)
    x = torch.randn(1, 28, 28, 8)
    before, after = (tokens.centres(t.flatten(1, 2)).view(1, 4, 4, 4, 8) for t in (x, x.roll(7, 2)))
    assert torch.equal(after, before.roll(1, 2))


@pytest.mark.parametrize("samples", [1, 3])
def test_layers_behind_cost_what_the_semantic_tokens_cost(samples):
    costs, slots = [], 4 * samples**2
    for depth in (6, 8):
        model = SemanticTokenViT(early=2, window=3, samples=samples).build(tiny_vit(depth=depth)).eval()
        seen = []
        for block in model.vit.blocks:
            block.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out.shape[1]))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.randn(1, 3, 24, 24))
        assert seen == [37, 37] + [1 + slots] * (depth - 4)
        costs.append(counter.get_total_flops())
    tokens, c = 1 + slots, 16
    assert costs[1] - costs[0] == 2 * (2 * tokens * 12 * c * c + 4 * tokens * tokens * c)


def test_without_the_shortcut_tokens_start_at_nothing():
    x = torch.randn(2, 196, 8)
    assert SemanticTokens(8, 2).local(x).abs().max() < 1e-2
    with_it = SemanticTokens(8, 2, shortcut=True)
    torch.testing.assert_close(with_it.local(x), with_it._raster(with_it.centres(x)), rtol=0, atol=1e-2)


def test_dumbbell_gives_map_and_tokens_and_learns():
    unit = Dumbbell(8, 2, (14, 14), queries=True)
    x, semantic = unit(torch.randn(2, 196, 8))
    assert x.shape == (2, 196, 8) and semantic.shape == (2, 36, 8)
    (x.sum() + semantic.square().sum()).backward()
    assert all(p.grad is not None for p in unit.parameters())
    assert Dumbbell(8, 2, (14, 14), queries=False).tokens.queries is None


@pytest.mark.parametrize("given", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}])
def test_whole_network(given):
    vit = tiny_vit(**given)
    model = SemanticTokenViT(early=1, window=3).build(vit).eval()
    x = torch.randn(3, 3, 24, 24)
    assert model(x).shape == (3, 5)
    torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=1e-4, atol=1e-5)
    assert len(vit.blocks) == 4 and len(model.vit.blocks) == 2


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"window: got 4, must divide both sides of the grid, \(14, 14\)"):
        SemanticTokens(8, 2, window=4)
    with pytest.raises(ValueError, match="samples, neighbourhood: got 3, 5"):
        SemanticTokens(8, 2, neighbourhood=5)
    with pytest.raises(ValueError, match="early: got 3, must be between 0 and 2"):
        SemanticTokenViT(early=3, window=3).build(tiny_vit())
    with pytest.raises(ValueError, match="heads: got 3"):
        CrossAttention(8, 3)
    with pytest.raises(ValueError, match="x: got 36 tokens, must be the 14 x 14"):
        SemanticTokens(8, 2)(torch.zeros(1, 36, 8))


def test_claim():
    trial = MadeTrial(0.9)
    trial.classifier = tiny_vit(depth=12)
    outcome = claim(trial, steps=2)
    assert (outcome.baseline, outcome.value) == (0.9, 0.9)
    assert "16 of 36 tokens" in outcome.note and len(trial.trained[0][1]) == 2
    assert not outcome.holds  # of 36 tokens 16 are too many to save half of the operations
