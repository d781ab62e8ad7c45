"""Maps of codes: another picture's statistics, affine maps, patches, nearest codes."""

from __future__ import annotations

import pytest
import torch

from vistok.core.token_maps import (
    augmented,
    color_adapt,
    draw_affine,
    draw_color_adapt,
    patched,
    to_codes,
    to_ids,
    unpatched,
)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def moments(x):
    return x.mean((2, 3)), x.std((2, 3))


@pytest.mark.parametrize("count", [2, 4, 5])
def test_color_adapt_gives_the_partners_statistics(count, rng):
    codes = torch.randn(count, 6, 4, 4, generator=rng) * torch.rand(count, 6, 1, 1, generator=rng) * 3
    before = codes.clone()
    made = color_adapt(codes)
    assert torch.equal(codes, before)
    for found, wanted in zip(moments(made), moments(codes.flip(0)), strict=True):
        torch.testing.assert_close(found, wanted)
    assert count % 2 == 0 or torch.equal(made[count // 2], codes[count // 2])
    # the order of places within a channel stays
    assert torch.equal(made.flatten(2).argsort(-1), codes.flatten(2).argsort(-1))


def test_color_adapt_does_nothing_to_one_or_to_equal_ones(rng):
    one = torch.randn(1, 3, 4, 4, generator=rng)
    assert torch.equal(color_adapt(one), one)
    torch.testing.assert_close(color_adapt(one.expand(4, -1, -1, -1)), one.expand(4, -1, -1, -1))
    codes = torch.randn(4, 3, 4, 4, generator=rng)
    which = torch.tensor([True, False, False, False])
    made = color_adapt(codes, which)
    assert torch.equal(made[1:], codes[1:]) and torch.equal(made[0], color_adapt(codes)[0])


def test_flat_channels(rng):
    """Only move; of the authors' they become NaN."""
    codes = torch.randn(2, 2, 3, 3, generator=rng)
    codes[0, 1] = 7
    made = color_adapt(codes)
    assert torch.isfinite(made).all()
    torch.testing.assert_close(made[0, 1], codes[1, 1].mean().expand(3, 3))
    theirs = color_adapt(codes, parity="authors")
    assert torch.isnan(theirs[0, 1]).all() and torch.equal(theirs[0, 0], made[0, 0])


def test_who_is_changed(rng):
    assert draw_color_adapt(7, 1.0, rng).sum() == 3 and draw_color_adapt(7, 0.0, rng).sum() == 0
    drawn = torch.stack([draw_color_adapt(4, 0.5, rng) for _ in range(400)])
    assert 0.4 < float((drawn.sum(1) == 2).float().mean()) < 0.6 and drawn.sum(0).min() > 60


def test_codes_and_ids(rng):
    codebook = torch.randn(50, 8, generator=rng)
    ids = torch.randint(50, (3, 4, 4), generator=rng)
    codes = to_codes(ids, codebook)
    assert codes.shape == (3, 8, 4, 4) and torch.equal(codes[1, :, 2, 3], codebook[ids[1, 2, 3]])
    assert torch.equal(to_ids(codes, codebook), ids)
    plain = torch.cdist(torch.randn(3, 16, 8, generator=rng), codebook).argmin(-1)
    assert plain.shape == (3, 16)
    near = codes + 0.01 * torch.randn(codes.shape, generator=rng)
    assert torch.equal(to_ids(near, codebook), ids)


def test_patches_and_back(rng):
    x = torch.randn(2, 6, 6, 3, generator=rng)
    found = patched(x)
    assert found.shape == (2, 9, 4, 3)
    assert torch.equal(found[1, 5], torch.stack([x[1, 2, 4], x[1, 2, 5], x[1, 3, 4], x[1, 3, 5]]))
    assert torch.equal(unpatched(found, 6), x)
    ids = torch.arange(16).view(1, 4, 4)
    assert patched(ids)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert torch.equal(unpatched(patched(ids), 4), ids)


def test_affine_maps(rng):
    x = torch.rand(3, 2, 8, 8, generator=rng)
    same = torch.eye(2, 3).expand(3, 2, 3)
    torch.testing.assert_close(augmented(x, same, 8), x)
    codebook = torch.randn(9, 5, generator=rng)
    ids = torch.randint(9, (3, 6, 6), generator=rng)
    for mode in ("bilinear", "bicubic"):
        assert torch.equal(to_ids(augmented(to_codes(ids, codebook), same, 6, mode), codebook), ids)
    mirror = torch.tensor([[-1.0, 0, 0], [0, 1, 0]]).expand(3, 2, 3)
    torch.testing.assert_close(augmented(x, mirror, 8), x.flip(3))
    drawn = draw_affine(2000, rng)
    assert drawn.shape == (2000, 2, 3)
    area = torch.linalg.det(drawn[:, :, :2])
    assert 0.4 < float((area < 0).float().mean()) < 0.6  # mirrored
    assert 0.12 < float(area.abs().min()) and float(area.abs().max()) < 1.05
    plain = (drawn[:, 0, 1] == 0) & (drawn[:, 1, 0] == 0)
    assert 0.4 < float(plain.float().mean()) < 0.6
    edge = drawn[plain, :, :2].abs().diagonal(dim1=1, dim2=2) + drawn[plain, :, 2].abs()
    assert float(edge.max()) <= 1 + 1e-5, "a mere crop stays inside of the picture"
