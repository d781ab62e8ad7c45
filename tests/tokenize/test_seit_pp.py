"""SeiT++: stored tokens, masked token modelling, augmentations."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.core.token_maps import augmented, draw_affine, to_codes
from vistok.parts.token_store import TokenAdapt, TokenStore, jpeg_bytes
from vistok.tokenize.seit_pp import SeiTPP, claim
from vistok.world import photos

HYPER = SeiTPP(20, 8, 8, 24, 2, 2, 16, 1, 2)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return HYPER.network().eval()


def ids(rng, count=3):
    return torch.randint(20, (count, 8, 8), generator=rng)


def test_as_many_are_masked_and_dropped_as_said(model, rng):
    seen = set()
    for _ in range(200):
        masked, dropped = model.draw(5, rng)
        (count,) = set(masked.sum(1).tolist())
        assert set(dropped.sum(1).tolist()) == {math.ceil(0.4 * 16)} and bool((masked | ~dropped).all())
        seen.add(count)
    assert min(seen) == 7 and max(seen) > 12
    always = replace(HYPER, mean=0.55, std=1e-3).network()
    assert always.draw(2, rng)[0].sum(1).tolist() == [math.ceil(0.55 * 16)] * 2


def test_the_masked_share_is_a_truncated_normal(rng):
    model = replace(HYPER, crop=28).network()
    share = torch.tensor([float(model.draw(1, rng)[0].float().mean()) for _ in range(1500)])
    drawn = 0.45 + 0.25 * torch.randn(200_000, generator=rng)
    expected = drawn[(drawn >= 0.4) & (drawn <= 1)]
    for q in (0.1, 0.5, 0.9):
        assert float(share.quantile(q)) == pytest.approx(float(expected[:100_000].quantile(q)), abs=0.025)


def test_the_loss_is_of_masked_patches_alone(model, rng):
    x = ids(rng)
    masked, dropped = model.draw(3, rng)
    model.draw = lambda *_: (masked, dropped)
    found = model(x)
    logits, total = model.logits(x, masked, dropped), []
    assert logits.shape == (3, 16, 4, 20)
    for b, i in masked.nonzero().tolist():
        r, c = 2 * (i // 4), 2 * (i % 4)
        target = torch.stack([x[b, r, c], x[b, r, c + 1], x[b, r + 1, c], x[b, r + 1, c + 1]])
        total.append(cross_entropy(logits[b, i], target))
    torch.testing.assert_close(found, torch.stack(total).mean())


def test_masked_ids_are_not_seen(model, rng):
    """Changing what is masked changes no logits; changing what is visible does."""
    x = ids(rng)
    masked, dropped = model.draw(3, rng)
    hidden = masked.view(3, 4, 4).repeat_interleave(2, 1).repeat_interleave(2, 2)
    other = torch.where(hidden, (x + 1) % 20, x)
    assert torch.equal(model.logits(other, masked, dropped), model.logits(x, masked, dropped))
    visible = torch.where(hidden, x, (x + 1) % 20)
    assert not torch.allclose(model.logits(visible, masked, dropped), model.logits(x, masked, dropped))


def test_embeddings_learn_as_inputs_and_not_as_targets(model, rng):
    model(ids(rng), rng).backward()
    assert model.bias.grad is not None and model.embed.weight.grad.abs().sum() > 0
    model.zero_grad()
    masked = torch.ones(2, 16, dtype=torch.bool)
    dropped = masked.clone()
    dropped[:, 10:] = False
    model.logits(ids(rng, 2), masked, dropped).square().sum().backward()
    assert model.embed.weight.grad is None or not bool(model.embed.weight.grad.any())
    assert model.mask_token.grad.abs().sum() > 0


def test_it_learns(rng):
    torch.manual_seed(0)
    model, x = HYPER.network(), torch.arange(6)[:, None, None].expand(6, 8, 8)  # what is seen tells what is not
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for _ in range(250):
        loss = model(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(math.log(20), abs=0.1) and sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert model.features(x).shape == (6, 24)
    with pytest.raises(ValueError, match="crop: got 7, must be even"):
        replace(HYPER, crop=7).network()


def test_store(rng):
    maps = torch.randint(391, (5, 32, 32), generator=rng)
    store = TokenStore(maps, 391)
    assert torch.equal(store.crop(torch.tensor([4, 0]), 32), maps[[4, 0]])
    crops = store.crop(torch.arange(5), 28, rng)
    assert crops.shape == (5, 28, 28)
    for i, crop in enumerate(crops):
        places = [(r, c) for r in range(5) for c in range(5) if torch.equal(maps[i, r : r + 28, c : c + 28], crop)]
        assert len(places) == 1
    assert store.bytes_per_picture(coded=False) == 1024 * 9 / 8
    assert 1024 * 8.5 / 8 < store.bytes_per_picture() < 1024 * 8.7 / 8  # log2 391 is 8.6
    assert TokenStore(torch.zeros(1, 8, 8, dtype=torch.int64), 4).bytes_per_picture() == 8
    for wrong, why in ((maps[0], r"ids: got \(32, 32\)"), (maps - 1, "in 0 .. 390"), (maps + 1, "in 0 .. 390")):
        with pytest.raises(ValueError, match=why):
            TokenStore(wrong, 391)
    with pytest.raises(ValueError, match="side: got 33, must be at most 32"):
        store.crop(torch.arange(2), 33)


def test_ids_take_a_tenth_of_a_photographs_jpeg():
    pytest.importorskip("skimage")
    found = [p.image for p in photos(256) if not p.name.startswith("digit")]
    images = torch.stack([torch.tensor(one) for one in found]).permute(0, 3, 1, 2) / 255
    assert 1024 * 9 / 8 < 0.11 * jpeg_bytes(images)
    assert jpeg_bytes(images, 30) < jpeg_bytes(images)


def test_token_adapt(rng):
    """Shapes; the conversion is twice as large; and it learns to move ids as pixels move."""
    torch.manual_seed(0)
    codebook = torch.randn(6, 4, generator=rng)
    adapt = TokenAdapt(6, 4, 32, 2)
    assert adapt.convert(torch.randn(2, 4, 8, 8)).shape == (2, 4, 16, 16)
    assert adapt(torch.randn(2, 4, 8, 8), draw_affine(2, rng), 6).shape == (2, 6, 6, 6)
    optimizer = torch.optim.Adam(adapt.parameters(), 5e-3)
    same = torch.eye(2, 3)
    losses = []
    for _ in range(120):
        x = torch.randint(6, (16, 4, 4), generator=rng)
        flip = torch.where(torch.rand(16, 1, 1, generator=rng) < 0.5, -1.0, 1.0)
        affine = torch.cat([same[:1].expand(16, 1, 3) * flip, same[1:].expand(16, 1, 3)], 1)
        target = augmented(x[:, None].float(), affine, 4)[:, 0].round().long()
        loss = adapt.loss(to_codes(x, codebook), affine, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_claim_runs():
    outcome = claim(TokenizeTrial(pictures=8, size=32), steps=1, stored=1)
    assert outcome.holds == (outcome.value >= outcome.baseline + 0.01) and "bytes each" in outcome.note
