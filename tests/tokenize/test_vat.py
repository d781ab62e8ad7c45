"""VAT: a set in, scales out, planes that tell what is inside."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import interpolate

from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.core.codes import Codes
from vistok.tokenize.vat import VAT, claim, fourier, iou, solids

RECIPE = VAT(6, 24, 1, 3, 16, 4, (1, 2, 4), 3, 2, 5, 2, 1e-2, 3)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def model():
    made = RECIPE.network()
    for _ in range(2):
        made.encode(torch.randn(3, 20, 6))
    return made.eval()


@torch.no_grad()
def test_the_order_of_points_does_not_matter(model):
    points = torch.randn(2, 20, 6)
    one, two = model.latent(points)[0], model.latent(points[:, torch.randperm(20)])[0]
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
    assert torch.equal(model.encode(points).ids, model.encode(points[:, torch.randperm(20)]).ids)
    assert not torch.allclose(one, model.latent(torch.randn(2, 20, 6))[0], atol=1e-3)


@torch.no_grad()
def test_solids_do_not_see_one_another(model):
    points = torch.randn(3, 20, 6)
    together, alone = model.encode(points), model.encode(points[1:2])
    assert torch.equal(together.ids[1:2], alone.ids)
    torch.testing.assert_close(model.decode(together)[1:2], model.decode(alone), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_round_trip_closes_and_a_beginning_of_scales_decodes(model):
    codes = model.encode(torch.randn(2, 20, 6))
    assert codes.ids.shape == (2, 7) and codes.format.scales == (1, 2, 4) and codes.z.shape == (2, 4, 4)
    planes = model.decode(codes)
    assert planes.shape == (2, 3, 5, 6, 6)
    assert torch.equal(model.decode(Codes(codes.ids, None, codes.format)), planes)
    for k in (1, 3):
        assert model.decode(codes.prefix(k)).shape == planes.shape
        assert not torch.allclose(model.decode(codes.prefix(k)), planes)
    with pytest.raises(ValueError, match="k: got 2, must end on a scale: 1, 3, 7"):
        codes.prefix(2)


@torch.no_grad()
def test_scales_against_the_plain_way(model):
    z, table = torch.randn(3, 4, 4), model.bottleneck.inner.codebook
    rest, total, ids = z, torch.zeros_like(z), []
    for length in (1, 2, 4):
        small = interpolate(rest.transpose(1, 2), length, mode="area").transpose(1, 2)
        found = torch.cdist(small, table).argmin(2)
        added = table[found].repeat_interleave(4 // length, 1)
        rest, total = rest - added, total + added
        ids.append(found)
    codes = model.bottleneck(z)
    assert torch.equal(codes.ids, torch.cat(ids, 1))
    torch.testing.assert_close(codes.z, total)


@torch.no_grad()
def test_more_scales_are_never_worse_where_the_table_has_a_zero(model):
    model.bottleneck.inner.codebook[0] = 0
    for size in (0.01, 0.3, 3.0):
        z = size * torch.randn(64, 4, 4)
        codes = model.bottleneck(z)
        errors = [z.square().sum((1, 2))]
        errors += [(z - model.bottleneck.ids_to_z(codes.prefix(k).ids)).square().sum((1, 2)) for k in (1, 3, 7)]
        for before, after in pairwise(errors):
            assert bool((after <= before * (1 + 1e-5)).all())


def test_latents_are_drawn_in_training_and_means_otherwise(model):
    points = torch.randn(2, 20, 6)
    assert torch.equal(model.latent(points)[0], model.latent(points)[0])
    assert not torch.equal(model.train().latent(points)[0], model.latent(points)[0])
    model.down.weight.data.zero_()
    model.down.bias.data.zero_()  # mean 0 and log-variance 0: the normal distribution itself
    assert float(model.latent(points)[1]["kl"].detach()) == 0
    plain = VAT(**{**vars(RECIPE), "kl": None}).network().train()
    assert torch.equal(plain.latent(points)[0], plain.latent(points)[0]) and plain.latent(points)[1] == {}


def test_bytes(model):
    assert model.bytes() == 7 * 4 / 8 and model.bytes(2) == 3 * 4 / 8
    assert sum(VAT().scales) == 255 and VAT().codes == 256  # int8 tokens


@torch.no_grad()
def test_a_point_is_read_off_three_planes(model):
    """At the centres of cells the sample is the cell: x runs along columns of the first plane, y along its rows."""
    planes = torch.randn(1, 3, 5, 6, 6)
    x, y, z = 1, 4, 2
    xyz = (torch.tensor([x, y, z]) + 0.5) / 3 - 1
    met = planes[0, 0, :, y, x] + planes[0, 1, :, z, y] + planes[0, 2, :, x, z]
    wanted = model.head(torch.nn.functional.silu(met))
    torch.testing.assert_close(model.occupancy(planes, xyz[None, None])[0], wanted)


def test_positions_are_told_at_frequencies():
    points = torch.randn(2, 3, 6)
    found = fourier(points, 2)
    assert found.shape == (2, 3, 18) and torch.equal(found[..., 12:], points)
    torch.testing.assert_close(found[..., 1], (2 * torch.pi * points[..., 0]).sin())
    torch.testing.assert_close(found[..., 6 + 2], (torch.pi * points[..., 1]).cos())


def test_training_teaches_all_of_it():
    model = RECIPE.network().train()
    data = solids(6, "train", 24, 64)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for step in range(40):
        loss = model.objective(*data)
        optimizer.zero_grad()
        loss.backward()
        if step == 1:
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert 0 <= iou(model, *data) <= 1


def test_refusals(model):
    with pytest.raises(ValueError, match=r"scales: got \(2, 3\), must each divide the next"):
        VAT(scales=(2, 3)).network()
    with pytest.raises(ValueError, match=r"points: got shape \(2, 5, 3\), must be \(B, N, 6\)"):
        model.encode(torch.randn(2, 5, 3))


def test_claim():
    outcome = claim(TokenizeTrial(pictures=8), steps=1)
    assert 0 <= outcome.baseline <= 1 and outcome.holds == (outcome.value >= outcome.baseline + 0.01)
