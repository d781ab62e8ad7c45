"""faster-na and gna: what their sheets say must hold, and their claims."""

from __future__ import annotations

import pytest
import torch

import vistok
from vistok.attend import faster_na, gna
from vistok.attend.faster_na import NeighborhoodAttention
from vistok.attend.gna import GeneralizedNeighborhoodAttention
from vistok.core.attention import Dense, attend_grid


def made(*grid, heads=2, d=8, dtype=torch.float64):
    return torch.randn(3, 2, *grid, heads, d, dtype=dtype).unbind()


def dense(q, k, v, causal=False):
    n = q.shape[1:-2].numel()
    return attend_grid(q, k, v, Dense(n, n, causal))


def test_a_window_of_everything_is_dense():
    given = made(4, 5)
    torch.testing.assert_close(NeighborhoodAttention((4, 5))(*given, executor="tiles"), dense(*given))
    line = made(9)
    torch.testing.assert_close(NeighborhoodAttention(9, causal=True)(*line, executor="tiles"), dense(*line, True))


def test_a_window_of_one_is_the_value():
    q, k, v = made(3, 4, 2)
    torch.testing.assert_close(NeighborhoodAttention(1)(q, k, v), v)


def test_dilation_is_neighbourhood_attention_on_subgrids():
    q, k, v = made(9, 8)
    whole = NeighborhoodAttention((3, 4), (2, 2))(q, k, v)
    for i in range(2):
        for j in range(2):
            part = NeighborhoodAttention((3, 4))(*(t[:, i::2, j::2] for t in (q, k, v)))
            torch.testing.assert_close(whole[:, i::2, j::2], part)


def test_stride_one_is_neighbourhood_attention_and_stride_kernel_is_blocks():
    q, k, v = made(6, 8)
    plain = GeneralizedNeighborhoodAttention(3, 1)(q, k, v)
    torch.testing.assert_close(plain, NeighborhoodAttention(3)(q, k, v))
    blocks = GeneralizedNeighborhoodAttention((3, 4), (3, 4))(q, k, v)
    part = (slice(None), slice(3, 6), slice(4, 8))
    torch.testing.assert_close(blocks[part], dense(q[part], k[part], v[part]))


@pytest.mark.parametrize("executor", ["dense", "gather", "tiles"])
def test_extra_keys_are_in_the_same_softmax(executor):
    q, k, v = made(4, 5)
    more = torch.randn(2, 2, 3, 2, 8, dtype=torch.float64).unbind()
    operator = NeighborhoodAttention((4, 5))
    out, lse = operator(q, k, v, 0.3, more, return_lse=True, executor=executor)
    keys, values = (torch.cat([t.flatten(1, 2), m], 1) for t, m in zip((k, v), more, strict=True))
    logits = torch.einsum("bqhd,bkhd->bhqk", q.flatten(1, 2), keys) * 0.3
    expected = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(3), values)
    torch.testing.assert_close(out.flatten(1, 2), expected)
    torch.testing.assert_close(lse.flatten(1, 2), logits.logsumexp(3).transpose(1, 2))


@pytest.mark.parametrize("name", ["gna", "faster-na"])
def test_trains_in_place_of_a_layer(name):
    q, k, v = (t.float().requires_grad_() for t in made(8, 8, heads=4))
    out = vistok.create(name, kernel=5, **({"stride": 2} if name == "gna" else {}))(q, k[..., :2, :], v[..., :2, :])
    out.square().sum().backward()
    assert out.shape == q.shape and all(bool(t.grad.isfinite().all()) and bool(t.grad.any()) for t in (q, k, v))


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="kernel: got 16"):
        vistok.create("gna")(*made(8, 8))


@pytest.mark.parametrize(
    ("claim", "taken", "holds"),
    [
        (faster_na.claim, {"dense": 9.0, "gather": 8.0, "tiles": 2.0}, True),
        (faster_na.claim, {"dense": 9.0, "gather": 1.0, "tiles": 2.0}, False),
        (faster_na.claim, {"dense": 1.0, "gather": 8.0, "tiles": 2.0}, False),
        (gna.claim, {"sliding": 3.0, "strided": 2.0}, True),
        (gna.claim, {"sliding": 2.0, "strided": 2.0}, False),
    ],
)
def test_claims_can_hold_and_can_fail(claim, taken, holds):
    class Trial:
        seed = 0

        def milliseconds(self, runs):
            assert set(runs) == set(taken)
            return taken

    outcome = claim(Trial())
    assert outcome.holds is holds and outcome.value in taken.values() and "density" in outcome.note


def test_the_trial_runs_in_turn():
    from vistok.bench.attend_trial import AttendTrial

    order = []
    taken = AttendTrial(repeats=2).milliseconds({name: lambda name=name: order.append(name) for name in "ab"})
    assert order == ["a", "b"] * 3 and set(taken) == {"a", "b"} and min(taken.values()) >= 0
