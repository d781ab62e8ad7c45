"""plainmamba: what its sheet says must hold, the backbone and the claim."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import conv2d, silu, softplus

import vistok
from vistok.attend import plainmamba
from vistok.attend.plainmamba import PlainMamba, PlainMamba2D, claim, serpentine_orders

SIZES = [(3, 3), (4, 5), (1, 6), (5, 1), (2, 2), (1, 1)]
MOVES = {(0, 1): 1, (0, -1): 2, (-1, 0): 3, (1, 0): 4}


def operator(parity="paper", dim=4, state=3, conv=3, seed=0):
    """With every parameter at random, and steps that are not small."""
    torch.manual_seed(seed)
    model = PlainMamba2D(dim, state, conv, parity=parity).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    return model


def made(size, dim=4, b=2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(b, size[0] * size[1], dim, dtype=torch.float64, generator=rng)


def by_hand(model, x, size):
    """Token by token; released code scans u alone in order, and adds the bias of the steps twice."""
    released = model.parity == "authors"
    u, z = model.in_proj(x).chunk(2, 2)
    grid = u.transpose(1, 2).unflatten(2, size)
    u = silu(conv2d(grid, model.conv2d.weight, model.conv2d.bias, padding="same", groups=u.shape[2]))
    u = u.flatten(2).transpose(1, 2)
    rank, state = model.sizes[:2]
    dt, b, c = model.x_proj(u).split([rank, state, state], 2)
    bias = model.dt_proj.bias * (2 if released else 1)
    dt, a = softplus(dt @ model.dt_proj.weight.T + bias), -model.A_log.exp()
    order, _, direction = serpentine_orders(*size)
    total = torch.zeros_like(u)
    for o in range(4):
        h = x.new_zeros(len(x), *a.shape)
        for t, i in enumerate(order[o].tolist()):
            own = t if released else i
            written = b[:, own] + model.direction_Bs[direction[o, t]]
            h = (dt[:, own, :, None] * a).exp() * h + (dt[:, own] * u[:, i])[..., None] * written[:, None]
            total[:, i] += (h * c[:, own, None]).sum(2) + model.D * u[:, i]
    return model.out_proj(total * silu(z))


@pytest.mark.parametrize("size", SIZES)
def test_orders(size):
    order, inverse, direction = serpentine_orders(*size)
    n = size[0] * size[1]
    assert order.shape == inverse.shape == direction.shape == (4, n)
    for o in range(4):
        assert torch.equal(order[o][inverse[o]], torch.arange(n)) and torch.equal(inverse[o][order[o]], torch.arange(n))
        places = [(i // size[1], i % size[1]) for i in order[o].tolist()]
        steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(places)]
        assert [0] + [MOVES[step] for step in steps] == direction[o].tolist()
    assert torch.equal(order[1], order[0].flip(0)) and torch.equal(order[3], order[2].flip(0))
    assert order[0, 0] == order[2, 0] == 0


def test_orders_of_a_small_grid():
    order, _, direction = serpentine_orders(2, 3)
    assert order.tolist() == [[0, 1, 2, 5, 4, 3], [3, 4, 5, 2, 1, 0], [0, 3, 4, 1, 2, 5], [5, 2, 1, 4, 3, 0]]
    assert direction.tolist() == [[0, 1, 1, 4, 2, 2], [0, 1, 1, 3, 2, 2], [0, 4, 1, 3, 1, 4], [0, 3, 2, 4, 2, 3]]


@pytest.mark.parametrize("parity", ["paper", "authors"])
@pytest.mark.parametrize("size", [(3, 3), (4, 5), (1, 6), (1, 1)])
def test_equal_to_a_loop(size, parity):
    model, x = operator(parity), made(size)
    with torch.no_grad():
        torch.testing.assert_close(model(x, size), by_hand(model, x, size))


def test_parity_is_another_model():
    x = made((3, 3))
    paper, authors = operator(), operator("authors")
    assert not torch.allclose(paper(x, (3, 3)), authors(x, (3, 3)))
    for model in (paper, authors):  # with steps, B and C that are the same everywhere, and no bias of the steps
        with torch.no_grad():
            model.x_proj.weight.zero_()
            model.dt_proj.bias.zero_()
    torch.testing.assert_close(paper(x, (3, 3)), authors(x, (3, 3)))


def test_gradients():
    model, x = operator(), made((3, 2), b=1).requires_grad_()
    given = torch.autograd.grad(model(x, (3, 2)).square().sum(), [x, *model.parameters()])
    wanted = torch.autograd.grad(by_hand(model, x, (3, 2)).square().sum(), [x, *model.parameters()])
    for ours, plain in zip(given, wanted, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


def test_a_state_that_forgets_leaves_each_token_to_itself():
    model, x = operator(conv=1), made((3, 4))
    with torch.no_grad():
        model.A_log.fill_(20.0)
        before = model(x, (3, 4))
        x[:, 5] += 1
        moved = ((model(x, (3, 4)) - before).abs() > 1e-12).any(2)
        assert moved.sum(1).tolist() == [1, 1] and bool(moved[:, 5].all())
        model.A_log.fill_(-2.0)
        assert bool(((model(x, (3, 4)) - before).abs() > 1e-12).any(2).all())


@pytest.mark.parametrize(("size", "commutes"), [((3, 5), True), ((4, 5), False)])
def test_half_a_turn_of_the_grid(size, commutes):
    """Without directions the set of orders is its own half turn where both sides are odd."""
    model = operator(conv=1)
    torch.nn.init.zeros_(model.direction_Bs)
    x = made(size)
    turned = model(x.flip(1), size).flip(1)
    assert torch.allclose(turned, model(x, size)) is commutes


def test_backbone():
    torch.manual_seed(0)
    small = PlainMamba(image=64, state=4, conv=3)
    net = small.of(16, 4, 2, True, num_classes=3)
    x = torch.randn(2, 3, 70, 40)
    net(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    maps = small.of(16, 4, features_only=True)
    assert [tuple(m.shape) for m in maps(x)] == [(2, 16, 5, 3)] * 4
    assert maps.feature_info.channels() == [16] * 4 and maps.feature_info.reduction() == [16] * 4
    net.eval()
    with torch.no_grad():
        torch.testing.assert_close(net(x)[:1], net(x[:1]))


@pytest.mark.parametrize(("size", "millions"), [("l1", 7.3), ("l2", 25.7), ("l3", 50.5)])
def test_number_of_parameters(size, millions):
    """Of the backbone without its head."""
    with torch.device("meta"):
        net = vistok.create("plainmamba", size=size).build(num_classes=0)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.07)


def test_what_does_not_fit_is_said():
    for call, said in (
        (lambda: PlainMamba2D(4, conv=2), "conv: got 2, must be odd"),
        (lambda: PlainMamba2D(4, parity="released"), "parity: got 'released'"),
        (lambda: PlainMamba2D(4)(torch.zeros(1, 5, 4), (2, 3)), "size: got 2 x 3, must have the 5 tokens"),
        (lambda: PlainMamba("l9").build(), "size: got 'l9'"),
        (lambda: PlainMamba().of(8, 5), "depth: got 5, must be a multiple of 4"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


@pytest.mark.parametrize(("told", "holds"), [(0.7, True), (0.85, False)])
def test_the_claim_can_hold_and_can_fail(monkeypatch, told, holds):
    class Trial:
        seed = 0
        errors = iter([0.9, told])

        def fit(self, model, steps, **how):
            free = model.mixer.direction_Bs.requires_grad
            assert bool(model.mixer.direction_Bs.any()) is free
            assert how["loss"](model, torch.Generator().manual_seed(0)).requires_grad
            left.append(torch.tensor(next(self.errors)))

    left = []
    missed = plainmamba._missed
    monkeypatch.setattr(plainmamba, "_missed", lambda *given: left[-1] if len(given) == 3 else missed(*given))
    outcome = claim(Trial(), steps=1)
    assert outcome.holds is holds and outcome.value < outcome.baseline
