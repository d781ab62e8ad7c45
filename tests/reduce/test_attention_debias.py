"""Attention debiasing: what its sheet says must hold, the wrapper around other methods, and the calibration."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vistok
from tests.host.families import FAMILIES, prompt
from tests.reduce.synthetic import Trial, evidence
from vistok.host.reducer import Evidence, Reducer, Reduction
from vistok.reduce import attention_debias
from vistok.reduce.attention_debias import AttentionDebias, calibrate, debias, fit_recency, padding_mask
from vistok.reduce.fastv import FastV
from vistok.reduce.pyramiddrop import PyramidDrop


def trend(n, mu, sigma):
    return mu * (sigma * torch.arange(n, dtype=torch.float64) / n).exp()


# The fit ------------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.floats(1e-4, 10), st.floats(-3, 3), st.integers(2, 600), st.integers(1, 3))
def test_fit_is_exact_on_noiseless_data(mu, sigma, n, pictures):
    found = fit_recency(trend(n, mu, sigma).expand(pictures, n))
    assert found == pytest.approx((mu, sigma), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_fit_is_the_least_squares_of_the_mean(seed):
    """No curve near it, and none on a grid, is nearer to the mean score."""
    g = torch.Generator().manual_seed(seed)
    scores = trend(50, 0.3, 1.2) * (0.2 + torch.rand(6, 50, generator=g, dtype=torch.float64))
    mu, sigma = fit_recency(scores)

    def error(mu, sigma):
        return float((scores.mean(0) - trend(50, mu, sigma)).square().sum())

    least = error(mu, sigma)
    assert all(least <= error(mu * a, sigma + b) + 1e-15 for a in (0.99, 1, 1.01) for b in (-0.01, 0, 0.01))
    assert all(least <= error(m / 20, s / 5) + 1e-12 for m in range(1, 20) for s in range(-15, 16))


def test_debiased_averages_have_no_trend_left():
    g = torch.Generator().manual_seed(0)
    content = 0.5 + torch.rand(2000, 64, generator=g, dtype=torch.float64)
    scores = trend(64, 0.01, 1.5) * content
    mu, sigma = fit_recency(scores)
    assert sigma == pytest.approx(1.5, abs=0.05)
    assert abs(fit_recency(debias(scores, mu, sigma))[1]) < 0.05


@pytest.mark.parametrize("scores", [torch.ones(4), torch.ones(0, 4), torch.ones(2, 1), torch.zeros(2, 4)])
def test_what_cannot_be_fitted_is_named(scores):
    with pytest.raises(ValueError, match=r"^scores: "):
        fit_recency(scores)


# The letterbox ------------------------------------------------------------------------------------------------------


def share_of_padding(width, height, grid, row, column):
    """Of one patch, from the corners of the picture on a square of side 1."""
    long = max(width, height)
    w, h = width / long, height / long
    x0, x1, y0, y1 = column / grid, (column + 1) / grid, row / grid, (row + 1) / grid
    over = lambda a, b, side: max(0.0, min(b, 0.5 + side / 2) - max(a, 0.5 - side / 2))  # noqa: E731
    return 1 - over(x0, x1, w) * over(y0, y1, h) * grid * grid


@given(st.integers(1, 900), st.integers(1, 900), st.integers(1, 30), st.floats(0.01, 0.99))
@settings(max_examples=40)
def test_padding_against_areas(width, height, grid, threshold):
    mask = padding_mask(width, height, grid, threshold)
    for row in range(grid):
        for column in range(grid):
            share = share_of_padding(width, height, grid, row, column)
            assert abs(share - threshold) < 1e-9 or bool(mask[row, column]) == (share > threshold)


@pytest.mark.parametrize("rule", ["area", "whole"])
def test_square_pictures_have_no_padding(rule):
    assert not padding_mask(640, 640, rule=rule).any()


@given(st.integers(1, 900), st.integers(1, 900), st.integers(2, 30))
def test_masked_area_is_the_letterbox_s_to_within_a_row_a_side(width, height, grid):
    area = 1 - min(width, height) / max(width, height)
    mask = padding_mask(width, height, grid)
    assert abs(float(mask.double().mean()) - area) <= 1 / grid + 1e-9
    whole = padding_mask(width, height, grid, rule="whole")
    assert float(whole.double().mean()) <= area + 1 / grid + 1e-9
    assert torch.equal(mask, mask.flip(0)) and torch.equal(mask, mask.flip(1))


@pytest.mark.parametrize(
    ("change", "named"),
    [({"width": 0}, "width"), ({"height": -1}, "height"), ({"grid": 0}, "grid"), ({"threshold": 2}, "threshold")],
)
def test_wrong_letterboxes_are_named(change, named):
    with pytest.raises(ValueError, match=f"^{named}: got"):
        padding_mask(**({"width": 4, "height": 3} | change))
    with pytest.raises(ValueError, match=r"^rule: got"):
        padding_mask(4, 3, rule="floor")


# The score ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 9999), st.floats(0.01, 100), st.floats(-3, 3))
@settings(max_examples=40)
def test_ranking_is_that_of_the_content(seed, mu, sigma):
    content = torch.rand(3, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    fair = debias(trend(40, mu, sigma) * content, 1.0, sigma)
    assert torch.equal(fair.argsort(1), content.argsort(1))
    assert torch.equal(debias(content, mu, sigma).argsort(1), debias(content, 1.0, sigma).argsort(1))
    assert torch.equal(debias(content, mu, 0.0).argsort(1), content.argsort(1))


def test_padding_comes_after_all_else_also_where_attention_is_zero():
    pad = torch.tensor([True, False, False, True, False])
    for dtype in (torch.float16, torch.float32, torch.float64):
        fair = debias(torch.tensor([[0.5, 0.0, 0.1, 0.2, 0.0]], dtype=dtype), 1.0, 0.7, pad)
        assert not fair[0, pad].any() and bool((fair[0, ~pad] > 0).all())


def test_places_are_those_of_the_picture():
    index = torch.tensor([[0, 3, 5, 9]])
    scores = torch.rand(1, 10, dtype=torch.float64)
    torch.testing.assert_close(
        debias(scores[:, [0, 3, 5, 9]], 2, 1.3, index=index), debias(scores, 2, 1.3)[:, index[0]]
    )


# The wrapper --------------------------------------------------------------------------------------------------------


def seen(seed=0, grid=(6, 6), method="fastv", **how):
    return evidence(AttentionDebias(method), grid, seed=seed, **how)


def test_fastv_on_corrected_attention():
    given_, system = seen(), AttentionDebias(sigma=1.7)
    fair = given_.llm_attention.mean(1)[:, 0] / trend(36, 1, 1.7)
    for keep in (1, 9, 30):
        expected = fair.topk(keep).indices.sort(1).values
        assert torch.equal(system.at_layer(given_, keep, 2).keep, expected)
        assert torch.equal(system.reduce(given_, keep).keep, expected)
    assert not torch.equal(FastV().reduce(given_, 9).keep, system.reduce(given_, 9).keep)


@pytest.mark.parametrize("method", ["fastv", "fastervlm", "vtc-cls", "visiondrop", "todre"])
def test_without_a_trend_the_method_is_itself(method):
    given_ = seen(method=method, batch=1)
    alone, system = vistok.create(method), AttentionDebias(method, sigma=0.0)
    assert (system.space, system.position) == (alone.space, alone.position)
    assert (system.whole_picture, system.one_at_a_time) == (alone.whole_picture, alone.one_at_a_time)
    assert system.schedule(36, 9, 12) == alone.schedule(36, 9, 12)
    a, b = alone.reduce(given_, 9), system.reduce(given_, 9)
    assert torch.equal(a.keep, b.keep) and torch.equal(a.source, b.source)
    torch.testing.assert_close(a.tokens, b.tokens)


def test_a_method_s_hyper_parameters_are_kept():
    system = AttentionDebias(PyramidDrop(ratio=0.25), sigma=1.0)
    assert system.schedule(576, 270, 32) == PyramidDrop(ratio=0.25).schedule(576, 270, 32)


@pytest.mark.parametrize("size", [(300, 100), (100, 300), (640, 480)])
def test_padding_is_kept_only_after_all_else(size):
    given_, system = seen(), AttentionDebias(size=size)
    mask = padding_mask(*size, 6).flatten()
    real = int((~mask).sum())
    for keep in (1, real // 2, real, real + 3):
        kept = system.at_layer(given_, keep, 2).keep
        assert int(mask[kept].sum()) == 3 * max(0, keep - real)
    square = AttentionDebias(size=(50, 50)).at_layer(given_, 9, 2).keep
    assert torch.equal(square, AttentionDebias().at_layer(given_, 9, 2).keep)


def test_later_stages_are_corrected_only_when_asked():
    given_ = seen()
    left = given_.take(torch.arange(0, 36, 2).expand(3, 18))
    fair = left.llm_attention.mean(1)[:, 0] / (1.7 * left.index / (left.index[:, -1:] + 1)).exp()
    first = AttentionDebias(sigma=1.7).at_layer(left, 5, 9)
    every = AttentionDebias(sigma=1.7, first_only=False).at_layer(left, 5, 9)
    assert torch.equal(first.keep, FastV().at_layer(left, 5, 9).keep)
    assert torch.equal(every.keep, fair.topk(5).indices.sort(1).values)
    assert not torch.equal(first.keep, every.keep)


@dataclass(frozen=True)
class Asks(Reducer):
    """Notes what it is shown."""

    wants: tuple[str, ...] = ("cls_attention", "encoder_attention")

    @property
    def needs(self):
        return dict.fromkeys(self.wants, slice(0, 2))

    def compress(self, evidence, keep):
        shown.append(evidence)
        return Reduction.select(evidence.features, torch.arange(keep).expand(len(evidence.features), keep))


shown: list[Evidence] = []


def test_all_attention_is_corrected_and_nothing_else():
    shown.clear()
    system = AttentionDebias(Asks(), sigma=0.8)
    given_ = evidence(system, (3, 4))
    system.reduce(given_, 5)
    (found,) = shown
    for name in ("cls_attention", "encoder_attention"):
        for was, now in zip(getattr(given_, name), getattr(found, name), strict=True):
            torch.testing.assert_close(now, (was / trend(12, 1, 0.8)).float())
    same = replace(found, cls_attention=given_.cls_attention, encoder_attention=given_.encoder_attention)
    assert all(getattr(same, name) is getattr(given_, name) for name in vars(given_))


@pytest.mark.parametrize(
    ("hyper", "named"),
    [
        ({"method": "apet"}, "method"),
        ({"method": "attention-debias"}, "method"),
        ({"mu": 0.0}, "mu"),
        ({"size": (0, 4)}, "width"),
        ({"size": (4, 4), "threshold": 1.5}, "threshold"),
    ],
)
def test_wrong_hyper_parameters_are_named(hyper, named):
    with pytest.raises(ValueError, match=f"^{named}: got"):
        AttentionDebias(**hyper)


# Calibration --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_calibration_fits_what_the_method_saw_and_leaves_it_alone():
    family = FAMILIES["llava-clip"]
    batches = [prompt(family, [[0], [0, 0]]).inputs, prompt(family, [[0]]).inputs]
    recorder = attention_debias._Recorder("fastv")
    for method in (recorder, "fastv"):
        kept = []
        with vistok.apply(family.model, method, keep=8) as session:
            for inputs in batches:
                family.model(**inputs)
                kept += [picture.layer_keep[1].tolist() for picture in session.pictures]
        if method is recorder:
            noted = kept
    assert noted == kept and [len(scores) for scores in recorder.scores] == [3, 1]
    assert calibrate(family.model, batches, keep=8) == fit_recency(torch.cat(recorder.scores))


def test_calibration_says_what_is_missing():
    family = FAMILIES["llava-clip"]
    with pytest.raises(ValueError, match=r"^batches: gave pictures of no tokens"):
        calibrate(family.model, [])


def test_recorders_are_never_alike():
    assert repr(attention_debias._Recorder()) != repr(attention_debias._Recorder())


# The claim ----------------------------------------------------------------------------------------------------------


class Recording(Trial):
    """A trial that shows the methods one batch of pictures with a known trend."""

    def accuracy(self, method, keep=1.0, tasks=()):
        attention = trend(36, 0.1, 1.4).expand(2, 1, 1, 36)
        method.at_layer(Evidence(features=torch.zeros(2, 36, 1), llm_attention=attention, grid=(6, 6)), 9, 1)
        return super().accuracy(method, keep, tasks)


@pytest.mark.parametrize(("value", "holds"), [(0.71, True), (0.7, False)])
def test_claim_calibrates_on_the_run_that_it_compares_with(value, holds):
    outcome = attention_debias.claim(trial := Recording(_Recorder=0.7, AttentionDebias=value))
    assert (outcome.baseline, outcome.value, outcome.holds) == (0.7, value, holds)
    system = trial.calls[1][1]
    assert math.isclose(system.sigma, 1.4, rel_tol=1e-6) and math.isclose(system.mu, 0.1, rel_tol=1e-6)
    assert "1.40" in outcome.note and [call[2] for call in trial.calls] == [2 / 9, 2 / 9]
