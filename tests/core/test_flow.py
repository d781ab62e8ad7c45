"""Rectified flow: analytic cases, and that conventions cannot be mixed up."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vistok.core.flow import (
    FLEXTOK,
    MING,
    NOISE_FIRST,
    RectifiedFlow,
    cfg,
    guided,
    logit_normal,
    over,
    power_schedule,
    renorm,
    shifted_schedule,
)
from vistok.parts.guidance import APG

FLOWS = [FLEXTOK, MING, NOISE_FIRST, RectifiedFlow(0, "noise")]
flows = pytest.mark.parametrize("flow", FLOWS, ids=lambda f: f"noise at {f.noise_at} to {f.points_to}")


def pair(seed=0, shape=(5, 2, 3)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


@flows
def test_the_path_goes_from_noise_to_data(flow):
    data, noise = pair()
    at = torch.full((5,), float(flow.noise_at))
    assert torch.equal(flow.mix(data, noise, at), noise)
    assert torch.equal(flow.mix(data, noise, 1 - at), data)


@flows
def test_the_target_is_the_derivative_of_the_path_up_to_the_two_signs(flow):
    data, noise = (t.double() for t in pair())
    t, step = torch.full((5,), 0.3, dtype=torch.float64), 1e-6
    slope = (flow.mix(data, noise, t + step) - flow.mix(data, noise, t)) / step
    towards_data = slope if flow.noise_at == 0 else -slope
    value = flow.target(data, noise).value
    torch.testing.assert_close(value if flow.points_to == "data" else -value, towards_data, atol=1e-6, rtol=1e-6)


@flows
@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("steps", [1, 3, [1.0, 0.9, 0.2, 0.0]])
def test_the_exact_velocity_arrives_in_one_step_and_in_many(flow, method, steps):
    data, noise = pair()
    seen = []

    def oracle(x, t):
        seen.append(float(t[0]))
        return flow.target(data, noise)

    torch.testing.assert_close(flow.sample(oracle, noise, steps, method), data)
    assert seen[0] == flow.noise_at and all(0 <= t <= 1 for t in seen)
    assert seen == sorted(seen, reverse=flow.noise_at == 1)


@flows
@given(st.floats(0.01, 0.99))
def test_where_a_point_comes_from_and_goes_to(flow, time):
    data, noise = pair()
    t = torch.full((5,), time)
    x, v = flow.mix(data, noise, t), flow.target(data, noise)
    torch.testing.assert_close(flow.data_of(x, t, v), data, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(flow.noise_of(x, t, v), noise, atol=1e-5, rtol=1e-5)


def gaussian_velocity(flow, mean, std):
    """The best velocity between N(0, 1) and N(mean, std^2): the mean of (noise - data) given x, in closed form."""

    def model(x, t):
        s = over(flow.share(t), x)
        variance = s**2 + (1 - s) ** 2 * std**2
        slope = (s - (1 - s) * std**2) / variance
        to_noise = slope * (x - (1 - s) * mean) - mean
        return flow.velocity(to_noise if flow.points_to == "noise" else -to_noise)

    return model


@flows
def test_gaussian_to_gaussian(flow):
    """The marginals along the way are Gaussian, and the path of a point keeps its quantile: x -> mean + std x."""
    noise = torch.randn(1000, 1, dtype=torch.float64)
    mean, std = 3.0, 0.25
    model = gaussian_velocity(flow, mean, std)
    expected = mean + std * noise
    euler, heun = (
        [float((flow.sample(model, noise, n, m) - expected).abs().max()) for n in (10, 20, 40)]
        for m in ("euler", "heun")
    )
    assert heun[-1] < 0.02
    assert 1.5 < euler[1] / euler[2] < 3 and 3 < heun[1] / heun[2] < 6  # first and second order


@flows
def test_the_closed_form_is_what_regression_finds(flow):
    data = 3 + 0.25 * torch.randn(400_000, 1, dtype=torch.float64)
    noise = torch.randn_like(data)
    t = torch.full((len(data),), 0.4, dtype=torch.float64)
    x, y = flow.mix(data, noise, t), flow.target(data, noise).value
    slope = float(((x - x.mean()) * (y - y.mean())).mean() / x.var())
    at = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    line = gaussian_velocity(flow, 3.0, 0.25)(at, t[:2]).value
    assert slope == pytest.approx(float(line[1] - line[0]), abs=0.01)


@flows
@pytest.mark.parametrize("other", FLOWS, ids=str)
def test_conventions_cannot_be_mixed_up(flow, other):
    data, noise = pair()
    model = gaussian_velocity(other, 3.0, 0.25)
    wrong = other.target(data, noise)
    if other == flow:
        assert float(flow.loss(wrong, flow.target(data, noise))) == 0
        return
    for call in (
        lambda: flow.loss(wrong, flow.target(data, noise)),
        lambda: flow.loss(flow.target(data, noise), wrong),
        lambda: flow.sample(model, noise),
        lambda: flow.data_of(noise, torch.ones(5), wrong),
        lambda: flow.noise_of(noise, torch.ones(5), wrong),
        lambda: guided(lambda x, t, c: wrong, lambda c, u: c, flow)(noise, torch.ones(5)),
    ):
        with pytest.raises(ValueError, match="velocity: got one of RectifiedFlow"):
            call()
    assert torch.equal(flow.of(wrong).value, flow.target(data, noise).value)


@flows
def test_bare_numbers_are_refused(flow):
    data, noise = pair()
    with pytest.raises(TypeError, match="velocity: got a Tensor, must be a Velocity"):
        flow.sample(lambda x, t: noise - data, noise)


def test_why_the_type_is_needed():
    """A model of one convention run blindly in another ends far from the data, without any error."""
    noise = torch.randn(500, 1)
    model = gaussian_velocity(NOISE_FIRST, 3.0, 0.25)
    right = NOISE_FIRST.sample(model, noise, 40)
    blind = FLEXTOK.sample(lambda x, t: FLEXTOK.velocity(model(x, t).value), noise, 40)
    assert abs(float(right.mean()) - 3) < 0.1 and abs(float(blind.mean()) - 3) > 1


@pytest.mark.parametrize("steps", [0, [1.0, 0.5], [0.9, 0.0], [1.0, 0.2, 0.3, 0.0], [1.0]])
def test_steps_that_cannot_be(steps):
    with pytest.raises(ValueError, match="steps: got"):
        FLEXTOK.sample(lambda x, t: FLEXTOK.velocity(x), torch.randn(2, 3), steps)


def test_fields_that_cannot_be():
    with pytest.raises(ValueError, match="noise_at: got 2"):
        RectifiedFlow(2, "data")
    with pytest.raises(ValueError, match="points_to: got 'up'"):
        RectifiedFlow(1, "up")
    with pytest.raises(ValueError, match="method: got 'rk4'"):
        FLEXTOK.sample(lambda x, t: FLEXTOK.velocity(x), torch.randn(2, 3), 2, "rk4")


# Times and guidance ----------------------------------------------------------------------------------------------


def test_schedules():
    assert power_schedule(4) == shifted_schedule(4) == [1, 0.75, 0.5, 0.25, 0]
    assert power_schedule(4, 2.0)[2] == pytest.approx(math.sqrt(0.5))
    for schedule in (power_schedule(7, 3.0), shifted_schedule(7, 2.0)):
        assert schedule[0] == 1 and schedule[-1] == 0 and schedule == sorted(schedule, reverse=True)
        assert sum(a - b for a, b in pairwise(schedule)) == pytest.approx(1)
    assert shifted_schedule(4, 3.0)[2] > 0.5


def test_logit_normal_times():
    t = logit_normal(100_000, torch.Generator().manual_seed(0))
    assert 0 < float(t.min()) and float(t.max()) < 1
    assert float(t.logit().mean()) == pytest.approx(0, abs=0.02) and float(t.logit().std()) == pytest.approx(
        1, abs=0.02
    )


def test_apg_without_its_parts_is_cfg():
    cond, uncond = pair()
    torch.testing.assert_close(APG(4.0, momentum=0, eta=1, clip=0)(cond, uncond), cfg(cond, uncond, 4.0))
    torch.testing.assert_close(APG(1.0)(cond, uncond), cond)
    torch.testing.assert_close(cfg(cond, uncond, 1.0), cond)


def test_apg_parts():
    cond, uncond = pair()
    flat = lambda x: x.flatten(1)  # noqa: E731
    added = APG(2.0, momentum=0, eta=0, clip=0)(cond, uncond) - cond
    assert (flat(added) * flat(cond)).sum(1).abs().max() < 1e-5  # nothing along the conditional prediction
    clipped = APG(2.0, momentum=0, eta=1, clip=0.5)(cond, uncond) - cond
    torch.testing.assert_close(flat(clipped).norm(dim=1), torch.full((5,), 0.5))
    run = APG(2.0, momentum=-0.5, eta=1, clip=0)
    first = run(cond, uncond) - cond
    second = run(cond, uncond) - cond
    torch.testing.assert_close(first, cond - uncond)
    torch.testing.assert_close(second, 0.5 * (cond - uncond))


@pytest.mark.parametrize("make", [lambda: APG(3.0), lambda: lambda c, u: cfg(c, u, 3.0)], ids=["apg", "cfg"])
def test_guidance_gives_the_same_in_every_convention(make):
    noise = torch.randn(20, 2)
    found = []
    for flow in FLOWS:
        cond, uncond = gaussian_velocity(flow, 2.0, 0.5), gaussian_velocity(flow, 0.0, 1.0)
        model = guided(lambda x, t, c, a=cond, b=uncond: a(x, t) if c else b(x, t), make(), flow)
        found.append(flow.sample(model, noise, 6))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-4, rtol=1e-4)


def test_renorm_is_never_longer_than_the_conditional():
    v, cond = pair(shape=(50, 4))
    out = renorm(v, cond)
    assert (out.norm(dim=1) <= cond.norm(dim=1) * (1 + 1e-5)).all()
    short = v.norm(dim=1) < cond.norm(dim=1)
    assert short.any() and torch.equal(out[short], v[short])
    assert (renorm(torch.zeros(1, 4), cond[:1]) == 0).all()
