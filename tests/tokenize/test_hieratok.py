"""HieraTok: its pyramid, who sees whom, and that one scale is the plain tokenizer."""

from __future__ import annotations

import pytest
import torch

from tests.tokenize.test_contract import SIZE, built, pictures
from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.core.visibility import scale_causal
from vistok.parts.quantize import Gaussian
from vistok.tokenize.hieratok import HieraTok, claim, pyramid
from vistok.tokenize.vq_grid import GridNetwork

SMALL = dict(size="T", image=SIZE, patch=4, channels=5, scales=(1, 2, 4))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_the_pyramid_is_means_over_cells():
    z = torch.randn(2, 64, 3)
    found = pyramid(z, (1, 2, 8))
    assert found.shape == (2, 1 + 4 + 64, 3) and torch.equal(found[:, 5:], z)
    whole = z.view(2, 8, 8, 3)
    for i in range(2):
        for j in range(2):
            cell = whole[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].mean((1, 2))
            torch.testing.assert_close(found[:, 1 + 2 * i + j], cell)
    torch.testing.assert_close(found[:, 0], z.mean(1))


def test_pooling_what_is_pooled_is_pooling():
    z = torch.randn(2, 256, 4)
    every = pyramid(z, (1, 2, 4, 8, 16))
    assert every.shape[1] == 341
    starts = {1: 0, 2: 1, 4: 5, 8: 21}
    for fine in (2, 4, 8):
        pooled = every[:, starts[fine] : starts[fine] + fine**2]
        for coarse in (s for s in (1, 2, 4) if s < fine):
            again = pyramid(pooled, (coarse, fine))[:, : coarse**2]
            torch.testing.assert_close(again, every[:, starts[coarse] : starts[coarse] + coarse**2])


def test_a_token_sees_its_scale_and_the_coarser_ones():
    model = built("hieratok")
    scale = torch.tensor([0] + [1] * 4 + [2] * 16)
    assert torch.equal(model.visible, scale[:, None] >= scale[None])
    assert torch.equal(model.visible, scale_causal([1, 4, 16]))


@torch.no_grad()
def test_a_scale_knows_only_what_its_means_tell():
    """Noise that is 0 in the mean of each cell of 2 x 2 changes the finest scale and no other."""
    model, z = built("hieratok"), torch.randn(2, 16, 5)
    noise = torch.randn(2, 2, 2, 2, 2, 5)  # rows and columns of cells, then inside them
    noise = (noise - noise.mean((3, 4), keepdim=True)).permute(0, 1, 3, 2, 4, 5).reshape(2, 16, 5)
    before, after = model.decoded(z), model.decoded(z + noise)
    for one, two in zip(before[:2], after[:2], strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before[2], after[2], atol=1e-2)
    moved = model.decoded(z + 1)
    assert all(not torch.allclose(a, b, atol=1e-2) for a, b in zip(before, moved, strict=True))


@torch.no_grad()
def test_one_scale_is_the_plain_tokenizer():
    model = built("hieratok", scales=(4,))
    plain = GridNetwork(SIZE, 4, 96, 4, 3, Gaussian(5)).eval()
    plain.up = torch.nn.Linear(5, 96)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k != "scale_embed"})
    model.scale_embed.zero_()
    z = model.encode(pictures()).z
    assert model.visible is None and torch.equal(plain.encode(pictures()).z, z)
    torch.testing.assert_close(model.render(z), plain.render(z))


def test_coarse_scales_learn_the_picture_averaged_down():
    model = built("hieratok").train()
    sides = [x.shape[-1] for x in model.drawn(model.encode(pictures()))]
    assert sides == [4, 8, 16]
    torch.manual_seed(1)
    with_them = model.objective(pictures())
    torch.manual_seed(1)
    model.auxiliary = 0.0
    without = model.objective(pictures())
    torch.manual_seed(1)
    drawn = model.drawn(model.encode(pictures()))
    small = pictures().unflatten(3, (4, 4)).unflatten(2, (4, 4)).mean((3, 5))
    half = pictures().unflatten(3, (8, 2)).unflatten(2, (8, 2)).mean((3, 5))
    wanted = ((drawn[0] - small).square().mean() + (drawn[1] - half).square().mean()) / 2
    torch.testing.assert_close(with_them - without, wanted)


def test_nothing_more_is_stored():
    codes = built("hieratok").encode(pictures())
    assert codes.z.shape == (3, 16, 5) and codes.ids is None and codes.bits.tolist() == [32 * 16 * 5] * 3


def test_refusals():
    with pytest.raises(ValueError, match="size: got 'XL', must be one of T, S, B, L"):
        HieraTok("XL").build()
    for scales in ((), (0, 4), (1, 2), (4, 2), (3, 4), (2, 2, 4)):
        with pytest.raises(ValueError, match=r"scales: got .*, must rise to the map's 4, each dividing the next"):
            HieraTok(**{**SMALL, "scales": scales}).build()


def test_claim():
    outcome = claim(TokenizeTrial(pictures=8), steps=2)
    assert 0 < outcome.baseline < 40 and 0 < outcome.value < 40
    assert outcome.holds == (outcome.value >= outcome.baseline + 0.1)
