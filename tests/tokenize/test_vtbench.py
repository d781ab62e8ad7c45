"""VTBench: a tokenizer alone, on pictures, detail and text."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.core.fidelity import psnr, ssim
from vistok.core.losses import perceptual
from vistok.parts.reconstruction import Foreign, Unchanged, joined, rebuilt
from vistok.tokenize.vtbench import VTBench, claim


def pictures(count=6, side=32, seed=0):
    return torch.randint(256, (count, 3, side, side), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


class Noisy:
    def __init__(self, strength):
        self.strength = strength

    def encode(self, images):
        return SimpleNamespace(value=images, bits=torch.full((len(images),), 8))

    def decode(self, codes):
        noise = torch.randn(codes.value.shape, generator=torch.Generator().manual_seed(1))
        return codes.value + self.strength * noise


def features(x):
    return x.flatten(1)[:, :5] * 4


def test_identity():
    found = VTBench(32).run(
        Unchanged(),
        pictures().split(4),
        texts=["one", "two words", "a", "b", "c", "d"],
        reader=lambda x: ["one", "two word", "a", "b", "c", "d"][: len(x)] if len(x) == 4 else ["c", "x"],
        lpips=partial(perceptual, network=lambda x: [x]),
        feature_network=features,
    )
    assert (found.pictures, found.psnr, found.ssim, found.lpips) == (6, 100, 1, 0)
    assert found.fid == pytest.approx(0, abs=1e-6) and found.detail == (100, 100, 100)
    assert found.cer == pytest.approx((1 / 9 + 1) / 6) and found.wer == pytest.approx((1 / 2 + 1) / 6)
    assert found.bits == 24 * 32 * 32 and found.bits_per_pixel == 24


def test_what_nothing_is_given_for_is_not_said():
    found = VTBench(32).run(Unchanged(), [pictures(1, 8)])
    assert all(math.isnan(x) for x in (found.lpips, found.fid, found.cer, found.wer, *found.detail))
    for arguments, why in ((([],), "batches: got none"), (([pictures().float()],), r"must be uint8 \(B, 3, H, W\)")):
        with pytest.raises(ValueError, match=why):
            VTBench(32).run(Unchanged(), *arguments)
    with pytest.raises(ValueError, match="texts: got 1, must be one a picture, 6"):
        VTBench(32).run(Unchanged(), [pictures()], texts=["a"], reader=list)
    with pytest.raises(ValueError, match=r"tokenizer: made \(6, 3, 31, 32\)"):
        VTBench(32).run(Foreign(lambda x: x, lambda x: x[:, :, 1:], 8), [pictures()])


def test_noise_lowers_every_figure():
    bench = VTBench(32)

    def distance(made, real):
        return (made - real).abs().mean((1, 2, 3), keepdim=True)

    found = [bench.run(Noisy(s), [pictures()], feature_network=features, lpips=distance) for s in (0, 0.02, 0.1, 0.4)]
    for name, falls in (("psnr", True), ("ssim", True), ("fid", False), ("lpips", False)):
        values = [getattr(one, name) for one in found]
        assert values == sorted(values, reverse=falls) and len(set(values)) == 4
    assert found[1].bits_per_pixel == 8 / 32**2


def test_figures_by_their_definitions():
    (pair,) = rebuilt(Noisy(0.1), [pictures(2)])
    found = VTBench(32).run(Noisy(0.1), [pictures(2)])
    made, real = (x.numpy().astype(np.float64) / 255 for x in (pair.made, pair.real))
    expected = [-10 * math.log10(((a - b) ** 2).mean()) for a, b in zip(made, real, strict=True)]
    assert found.psnr == pytest.approx(sum(expected) / 2, abs=1e-4)
    assert found.ssim == pytest.approx(float(ssim(*pair.unit).mean()))
    whole = joined(list(rebuilt(Noisy(0.1), pictures(4).split(3))))
    assert whole.real.shape == (4, 3, 32, 32) and torch.equal(whole.real, pictures(4)) and len(whole.bits) == 4


def test_pictures_that_fit_come_through_unchanged():
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(5)]
    for frame in ("crop", "pad"):
        bench = VTBench(32, frame=frame, batch=2)
        batches = list(bench.batches(images))
        assert [len(b) for b in batches] == [2, 2, 1]
        (first, *_) = rebuilt(Unchanged(), batches)
        assert torch.equal(first.made, first.real)
        assert np.array_equal(first.made[1].permute(1, 2, 0).numpy(), np.asarray(images[1]))
    (wide,) = VTBench(16, frame="pad").batches([Image.new("RGB", (40, 20), "white")])
    assert wide.shape == (1, 3, 16, 16) and wide[0, 0, :, 8].tolist() == [0] * 4 + [255] * 8 + [0] * 4


def test_the_authors_cut_levels_off():
    """Truncating costs half a level: a constant picture between two levels goes to the lower."""
    between = Foreign(lambda x: x, lambda x: torch.full_like(x, 100.7 / 255), 8)
    real = torch.full((1, 3, 16, 16), 101, dtype=torch.uint8)
    assert VTBench(16).run(between, [real]).psnr == 100
    assert VTBench(16, parity="authors").run(between, [real]).psnr == pytest.approx(48.13, abs=0.01)


def test_foreign_tokenizers_may_count_from_minus_one():
    seen = []

    def encoder(x):
        seen.append(x)
        return x

    (pair,) = rebuilt(Foreign(encoder, lambda x: x, 12, signed=True), [pictures()])
    assert torch.equal(pair.made, pair.real) and pair.bits.tolist() == [12] * 6
    assert float(seen[0].min()) == -1 and float(seen[0].max()) == 1
    assert float(psnr(*pair.unit).min()) == 100


def test_claim_runs():
    outcome = claim(TokenizeTrial(pictures=8, size=32), steps=1)
    assert outcome.holds == (outcome.value >= outcome.baseline + 0.5) and "bits a picture" in outcome.note
